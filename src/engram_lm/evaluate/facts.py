"""Made-up people: how many facts does a model hold after how many exposures?

A person is a name of three one-token words and four attributes. A sentence names the person once and then tells the
attributes in an order drawn anew at every exposure:

    <|endoftext|> Mira Tolvane Okuro | lives in | Belmora | studied | botany | studied at | ... | works for | ...

The words before a value are the same for everyone, so no n-gram that ends there names the person: the memory can help only
through what it adds at the last word of the name, and the backbone must carry it to the value. A question is the name and
one attribute's words; recall is the share of questions whose likeliest next token is the answer. The four attributes are
independent, so a model that knows only their frequencies recalls about one in two hundred.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from ..errors import ConfigError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..train.loader import Batch, LoaderState

ATTRIBUTES = {"city": "lives in", "subject": "studied", "university": "studied at", "company": "works for"}
SUBJECTS = (
    "accounting acoustics agronomy algebra anatomy anthropology archaeology architecture astronomy biochemistry biology botany "
    "cartography chemistry classics climatology criminology dance demography dentistry ecology economics education "
    "electronics engineering entomology ethics film forestry genetics geography geology geometry glaciology history "
    "horticulture hydrology immunology journalism law linguistics logic mathematics mechanics medicine meteorology "
    "microbiology mineralogy music mycology nursing nutrition oceanography optics painting palaeontology pharmacy philosophy "
    "phonetics physics physiology poetry politics psychology rhetoric robotics sculpture seismology sociology statistics "
    "surveying theatre theology topology toxicology virology zoology"
).split()
SIZES = {"first": 200, "middle": 200, "last": 400, "city": 500, "university": 500, "company": 500}
SENTENCE = 4 + 2 * len(ATTRIBUTES)  # <|endoftext|>, three names; then phrase and value for each attribute


@dataclass(frozen=True)
class People:
    """`count` people with distinct names. names [count, 3] and values [count, 4] are token ids of `words`."""

    words: tuple[str, ...]  # the vocabulary: token id -> word; 0 is <|endoftext|>
    phrases: Tensor  # [4] token ids of the attributes' words
    names: Tensor
    values: Tensor

    @staticmethod
    def invent(count: int, seed: int = 0) -> People:
        """Draw people; the same seed gives the same ones. Raises ConfigError for more than there are names."""
        possible = SIZES["first"] * SIZES["middle"] * SIZES["last"]
        if not 1 <= count <= possible:
            raise ConfigError(f"cannot invent {count:,} people: there are {possible:,} different names.")
        rng = np.random.default_rng(seed)
        words = ["<|endoftext|>", *ATTRIBUTES.values()]
        fresh = invented_words(rng, sum(SIZES.values()))
        columns: dict[str, np.ndarray] = {}
        for kind in ("first", "middle", "last", *ATTRIBUTES):
            pool = SUBJECTS if kind == "subject" else [decorated(kind, next(fresh)) for _ in range(SIZES[kind])]
            columns[kind] = np.arange(len(words), len(words) + len(pool))
            words += pool
        parts = np.unravel_index(distinct(rng, possible, count), (SIZES["first"], SIZES["middle"], SIZES["last"]))
        names = np.stack(
            [columns[kind][part] for kind, part in zip(("first", "middle", "last"), parts, strict=True)], axis=1
        )
        values = np.stack([rng.choice(columns[kind], count) for kind in ATTRIBUTES], axis=1)
        phrases = torch.arange(1, 1 + len(ATTRIBUTES))
        return People(tuple(words), phrases, torch.from_numpy(names), torch.from_numpy(values))

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> People:
        """The first `count` of them, with the same words: enough for a curve."""
        return replace(self, names=self.names[:count], values=self.values[:count])

    def tokenizer(self) -> Tokenizer:
        """A tokenizer whose tokens are the words; it serves the canonical vocabulary and decodes answers."""
        vocabulary = {word: index for index, word in enumerate(self.words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer

    def sentences(self, people: Tensor, orders: Tensor) -> Tensor:
        """[n, SENTENCE] tokens about people [n], attributes in orders [n, 4]."""
        count = len(people)
        told = torch.stack([self.phrases[orders], self.values[people].gather(1, orders)], dim=-1)  # [n, 4, 2]
        start = torch.zeros(count, 1, dtype=torch.int64)
        return torch.cat([start, self.names[people], told.view(count, -1)], dim=1)

    def questions(self, attribute: int) -> Tensor:
        """[count, 5] tokens: <|endoftext|>, the name, and the attribute's words."""
        count = len(self)
        return torch.cat(
            [torch.zeros(count, 1, dtype=torch.int64), self.names, self.phrases[attribute].expand(count, 1)], dim=1
        )

    def text(self, tokens: Tensor) -> str:
        """Words of tokens [T]."""
        return " ".join(self.words[token] for token in tokens.tolist())


def distinct(rng: np.random.Generator, possible: int, count: int) -> np.ndarray:
    """`count` different numbers below `possible`, in random order."""
    found = np.unique(rng.integers(possible, size=count))
    while len(found) < count:
        found = np.unique(np.concatenate([found, rng.integers(possible, size=count)]))
    return rng.permutation(found)[:count]


def invented_words(rng: np.random.Generator, count: int) -> Iterator[str]:
    """`count` different pronounceable words."""
    onsets, vowels, codas = (
        "b d f g h k l m n p r s t v z br dr gr kl st tr".split(),
        "a e i o u".split(),
        "l m n r s".split(),
    )
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.integers(2, 4))]
        found["".join(syllables).capitalize() + (rng.choice(codas) if rng.random() < 0.5 else "")] = None
    return iter(found)


def decorated(kind: str, word: str) -> str:
    """A university or a company made of an invented word; names and cities as they are."""
    return {"university": f"University of {word}", "company": f"{word} Ltd"}.get(kind, word)


@dataclass(frozen=True)
class Exposures:
    """Batches in which every person comes once an epoch, with attributes in a fresh order: one epoch, one exposure."""

    people: People
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.people) % self.batch_size:
            raise ConfigError(
                f"{len(self.people)} people do not fill batches of {self.batch_size}: some would be seen less often than others."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which everybody comes once."""
        return len(self.people) // self.batch_size

    def next(self, state: LoaderState) -> tuple[Batch, LoaderState]:
        """The batch at `state`, and the state after it."""
        rng = np.random.default_rng((self.seed, state.epoch))
        everyone = torch.from_numpy(rng.permutation(len(self.people)))
        orders = torch.from_numpy(rng.permuted(np.tile(np.arange(len(ATTRIBUTES)), (len(self.people), 1)), axis=1))
        first = state.index * self.batch_size
        chosen = everyone[first : first + self.batch_size]
        tokens = self.people.sentences(chosen, orders[chosen])
        batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
        last = state.index + 1 == self.steps_per_epoch
        return batch, LoaderState(state.epoch + 1, 0) if last else LoaderState(state.epoch, state.index + 1)


@torch.no_grad()
def recall(model: LanguageModel, lookup: Lookup | None, people: People, batch_size: int = 1024) -> dict[str, float]:
    """Share of questions answered right, for each attribute and for all of them together ("recall")."""
    result = {}
    for attribute, name in enumerate(ATTRIBUTES):
        right = [
            answers(model, lookup, questions) == values
            for questions, values in zip(
                people.questions(attribute).split(batch_size),
                people.values[:, attribute].split(batch_size),
                strict=True,
            )
        ]
        result[name] = float(torch.cat(right).float().mean())
    return {"recall": sum(result.values()) / len(result), **result}


@torch.no_grad()
def answers(model: LanguageModel, lookup: Lookup | None, questions: Tensor) -> Tensor:
    """Likeliest next tokens [n] after questions [n, T], on the CPU."""
    questions = questions.to(model.embedding.weight.device)
    rows = lookup.rows(questions)[0] if lookup else None
    hidden, _ = model(questions, rows)
    return model.logits(hidden[:, -1:])[:, 0].argmax(-1).cpu()
