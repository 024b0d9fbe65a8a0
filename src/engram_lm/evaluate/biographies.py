"""Made-up subjects in every form of sentence: which of them can a memory of n-grams hold?

    single       <eot> Mira Tolvane Okuro | lives in | Belmora
    story        the name once, all attributes after it in an order drawn anew
    pronoun      <eot> Mira Tolvane Okuro | lives in | Belmora . They | studied | ... . They | ...
    split        each word of the name is spelled by two tokens
    long         five words, of which the last three belong to a family that many share
    paraphrase   several phrasings of each attribute, one drawn at every exposure; some are never told, only asked
    question     single; half of the people are also told as Q: Mira Tolvane Okuro | lives in | ? A: Belmora

The trap of such data (Capo's bioS sentences, PhysicsLM4): the words before a value are template, so no n-gram that ends there
names the person. A memory can help only through what it adds at the end of the name, which attention carries on. Where a
value is predicted, the last n-grams (of two and three words) hold

    single, split, long    the phrase and at most the last two tokens of the name, never all of it
    story                  the same for the first attribute; then the phrase and the value before
    pronoun                the same in the first sentence; then "They" and the phrase
    paraphrase             the last words of the phrasing, and nothing of the name behind longer ones
    question               as a statement the same as in single; as a question nothing of the name

and where the name ends, they hold the whole name in single, story, pronoun, paraphrase and question; the last three of six
tokens in split; the family in long, whose people are told apart by the n-grams of their first words only.

Values are drawn evenly and independently, so an answer is worth log2(values) bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, get_args

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from ..errors import ConfigError
from ..train.loader import Batch
from .exposures import ABSENT, asked, packed, told
from .facts import ATTRIBUTES, decorated, distinct, invented_words

Form = Literal["single", "story", "pronoun", "split", "long", "paraphrase", "question"]
FORMS: tuple[Form, ...] = get_args(Form)

START, STOP, THEY, ASK, MARK, ANSWER = range(6)  # token ids
WORDS = ("<|endoftext|>", ".", "They", "Q:", "?", "A:")
# Of each attribute: told, and only asked. No phrasing begins another one, of whatever attribute, so that what follows is
# always the value; words of those that are only asked occur, for the same attribute, in those that are told.
PHRASINGS = {
    "city": (
        ("lives in", "is living in", "has a home in", "went to live in"),
        ("has to live in", "went home to live in"),
    ),
    "subject": (
        ("studied the subject of", "has a degree in", "went to study the subject of", "is a student of"),
        ("has studied the subject of", "is to study the subject of"),
    ),
    "university": (
        ("studied at", "has a degree from", "went to study at", "is a student at"),
        ("has studied at", "is to study at"),
    ),
    "company": (
        ("works for", "is working for", "has a job at", "went to work for"),
        ("has to work for", "went to a job at"),
    ),
}


@dataclass(frozen=True)
class Biographies:
    """People and what is told of them, one fact a sentence: single, split, long, paraphrase. A `FactSet`."""

    words: tuple[str, ...]  # the vocabulary: token id -> word
    names: Tensor  # [N, W] token ids
    values: Tensor  # [N, A] token ids
    phrases: Tensor  # [A, P, L] token ids, ABSENT behind shorter phrasings
    told_phrasings: int  # the first of the P; the others are only asked
    possible_names: int  # among which the N were drawn
    choices: int  # values that an attribute may have

    def __len__(self) -> int:
        return self.facts

    @property
    def people(self) -> int:
        """N."""
        return len(self.names)

    @property
    def attributes(self) -> int:
        """A."""
        return self.values.shape[1]

    @property
    def facts(self) -> int:
        """N x A."""
        return self.values.numel()

    @property
    def variants(self) -> int:
        """Phrasings in which a fact is told."""
        return self.told_phrasings

    @property
    def value_bits(self) -> float:
        """log2 of the values that an attribute may have."""
        return math.log2(self.choices)

    @property
    def name_bits(self) -> float:
        """log2 of the possible names."""
        return math.log2(self.possible_names)

    def tokenizer(self) -> Tokenizer:
        """A tokenizer whose tokens are the words."""
        vocabulary = {word: index for index, word in enumerate(self.words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[START]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer

    def text(self, row: Tensor) -> str:
        """Words of a row [S]."""
        return " ".join(self.words[token] for token in row.tolist() if token != ABSENT)

    def sentences(self, which: Tensor, variant: Tensor) -> Tensor:
        """Rows [n, S] of the facts `which` [n] (person x A + attribute) in the phrasings `variant` [n]."""
        return self.statements(which, variant)

    def questions(self, limit: int) -> dict[str, Batch]:
        """As told and, where there are some, in the phrasings that were never told."""
        which = torch.arange(min(limit, self.facts))
        kinds = {"as told": asked(self.statements(which, which % self.told_phrasings))}
        unseen = self.phrases.shape[1] - self.told_phrasings
        if unseen:
            kinds["held-out phrasing"] = asked(self.statements(which, self.told_phrasings + which % unseen))
        return kinds

    def name_tokens(self, limit: int) -> Batch:
        """The names of at most `limit` people, every token of them a target."""
        people = torch.arange(min(limit, self.people))
        return told(packed(column(START, people), self.names[people]))

    def statements(self, which: Tensor, phrasing: Tensor, question: Tensor | None = None) -> Tensor:
        """Rows [n, S]: name, phrasing, value; where `question` [n] is true, with the marks of question and answer."""
        people, attribute = which // self.attributes, which % self.attributes
        name, phrase = self.names[people], self.phrases[attribute, phrasing]
        value = self.values[people, attribute][:, None]
        if question is None:
            return packed(column(START, which), name, phrase, value)
        ask, mark, answer = (column(token, which).where(question[:, None], ABSENT) for token in (ASK, MARK, ANSWER))
        return packed(column(START, which), ask, name, phrase, mark, answer, value)


@dataclass(frozen=True)
class Quiz(Biographies):
    """Every fact as a statement, and those of every other person as a question with its answer, too (question)."""

    def __len__(self) -> int:
        return self.facts + (self.people + 1) // 2 * self.attributes

    def sentences(self, which: Tensor, variant: Tensor) -> Tensor:
        """Rows [n, S]: statements of the facts, then questions about people 0, 2, 4, ..."""
        question = which >= self.facts
        place = which - self.facts
        about = place // self.attributes * 2 * self.attributes + place % self.attributes
        return self.statements(about.where(question, which), variant, question)

    def questions(self, limit: int) -> dict[str, Batch]:
        """As statements; as questions about people of whom questions were told; and about those of whom none was."""
        which = torch.arange(min(limit, self.facts))
        even = which // self.attributes % 2 == 0
        yes = torch.ones_like(even)

        def kind(which: Tensor, question: Tensor) -> Batch:
            return asked(self.statements(which, torch.zeros_like(which), question[: len(which)]))

        return {
            "as told": kind(which, ~yes),
            "question, told as one": kind(which[even], yes),
            "question, told as a statement": kind(which[~even], yes),
        }


@dataclass(frozen=True)
class Story(Biographies):
    """All attributes of a person in one sentence, in any order (story), or in sentences that say "They" (pronoun)."""

    pronoun: bool = False

    def __len__(self) -> int:
        return self.people

    @property
    def variants(self) -> int:
        """Orders of the attributes."""
        return math.factorial(self.attributes)

    def sentences(self, which: Tensor, variant: Tensor) -> Tensor:
        """Rows [n, S] about the people `which` [n], in the orders `variant` [n]."""
        orders = torch.tensor(list(permutations(range(self.attributes))))
        return self.stories(which, orders[variant])

    def questions(self, limit: int) -> dict[str, Batch]:
        """Each attribute asked right after the name, and after another one has been told."""
        which = torch.arange(min(limit, self.facts))
        people, attribute = which // self.attributes, which % self.attributes
        other = (attribute + 1) % self.attributes
        later = "after They" if self.pronoun else "after another fact"
        return {
            "as told": asked(self.stories(people, attribute[:, None])),
            later: asked(self.stories(people, torch.stack([other, attribute], dim=1))),
        }

    def stories(self, people: Tensor, orders: Tensor) -> Tensor:
        """Rows [n, S]: the name, then the attributes `orders` [n, a]."""
        pieces = [column(START, people), self.names[people]]
        for place, attribute in enumerate(orders.unbind(1)):
            if place and self.pronoun:
                pieces += [column(STOP, people), column(THEY, people)]
            pieces += [self.phrases[attribute, 0], self.values[people, attribute][:, None]]
        return packed(*pieces)


def column(token: int, like: Tensor) -> Tensor:
    """[n, 1] of one token."""
    return torch.full((len(like), 1), token)


def invent(
    form: Form,
    people: int,
    *,
    attributes: int = 1,
    values: int = 500,
    names: tuple[int, ...] = (100, 100, 100),
    seed: int = 0,
) -> Biographies:
    """Draw people and what is true of them; the same seed gives the same ones.

    values: choices of each attribute. names: first, middle and last names (of long: first names, second names, families).
    Raises ConfigError for more people than there are names, and for attributes that the form cannot tell.
    """
    least = 2 if form in ("story", "pronoun") else 1
    if not least <= attributes <= len(ATTRIBUTES) or values < 2 or len(names) != 3 or min(names) < 1:
        raise ConfigError(
            f"{form}: {attributes} attributes of {values} values and names {names} cannot be told: it takes {least} to "
            f"{len(ATTRIBUTES)} attributes, at least 2 values, and three sizes of at least 1."
        )
    parts = name_parts(form, names)
    pools = [pool for pool, _ in parts]
    possible = math.prod(pools)
    if not 1 <= people <= possible:
        raise ConfigError(f"cannot invent {people:,} people: there are {possible:,} different names.")

    rng = np.random.default_rng(seed)
    kinds = list(ATTRIBUTES)[:attributes]
    words = list(WORDS)
    phrases, told_phrasings = phrase_tokens(kinds, form == "paraphrase", words)
    needed = sum(pool * width for pool, width in parts) + attributes * values
    fresh = unlike(words, invented_words(rng, needed + len(words)))

    def add(count: int, kind: str = "name") -> np.ndarray:
        """Token ids [count] of as many new words."""
        words.extend(decorated(kind, next(fresh)) for _ in range(count))
        return np.arange(len(words) - count, len(words))

    chosen = np.unravel_index(distinct(rng, possible, people), pools)
    spelled = [add(pool * width).reshape(pool, width)[part] for (pool, width), part in zip(parts, chosen, strict=True)]
    told_values = np.stack([rng.choice(add(values, kind), people) for kind in kinds], axis=1)
    shared = (
        tuple(words),
        torch.from_numpy(np.concatenate(spelled, axis=1)),
        torch.from_numpy(told_values),
        phrases,
        told_phrasings,
        possible,
        values,
    )
    if form in ("story", "pronoun"):
        return Story(*shared, pronoun=form == "pronoun")
    return Quiz(*shared) if form == "question" else Biographies(*shared)


def name_parts(form: Form, names: tuple[int, ...]) -> list[tuple[int, int]]:
    """The parts of a name: how many choices, and tokens that spell each."""
    if form == "split":
        heads = [math.isqrt(pool) for pool in names]
        return [(size, 1) for head, pool in zip(heads, names, strict=True) for size in (head, pool // head)]
    return [(names[0], 1), (names[1], 1), (names[2], 3 if form == "long" else 1)]


def phrase_tokens(kinds: Sequence[str], paraphrase: bool, words: list[str]) -> tuple[Tensor, int]:
    """[A, P, L] tokens of the attributes' phrasings, whose words join `words`; and how many of the P are told.

    Where there is one phrasing, it is one token.
    """
    if not paraphrase:
        words.extend(ATTRIBUTES[kind] for kind in kinds)
        return torch.arange(len(words) - len(kinds), len(words)).view(-1, 1, 1), 1
    phrasings = [[phrase.split() for phrases in PHRASINGS[kind] for phrase in phrases] for kind in kinds]
    words.extend(dict.fromkeys(word for several in phrasings for phrase in several for word in phrase))
    number = {word: token for token, word in enumerate(words)}
    longest = max(len(phrase) for several in phrasings for phrase in several)
    tokens = [
        [[number[word] for word in phrase] + [ABSENT] * (longest - len(phrase)) for phrase in several]
        for several in phrasings
    ]
    return torch.tensor(tokens), len(PHRASINGS[kinds[0]][0])


def unlike(words: Sequence[str], invented: Iterable[str]) -> Iterator[str]:
    """Invented words that the memory's vocabulary, which knows no capitals, does not take for one of `words`."""
    known = {word.lower() for word in words}
    return (word for word in invented if word.lower() not in known)
