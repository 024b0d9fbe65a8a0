"""The thirteen tasks: what is hidden in which haystack, what is asked, and what must be answered.

A task draws everything but the haystack's size once; `Draft.write(size)` is the same sample in a haystack of `size` units,
so that the size can be fitted to a length in tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ...errors import ConfigError
from .sources import NOISE, Question, Source, insert
from .words import invented, letters, numbers, uuids, words

DEPTHS = np.round(np.linspace(0, 100, 40))  # percent; RULER's
ZETA_2 = np.pi**2 / 6


class Text(NamedTuple):
    """One sample's words. depths: percent of the haystack in front of each needle."""

    prompt: str
    prefix: str
    references: tuple[str, ...]
    depths: tuple[float, ...]


class Draft(NamedTuple):
    """A sample in haystacks of `smallest` to `largest` units."""

    write: Callable[[int], Text]
    smallest: int
    largest: int


Draw = Callable[[np.random.Generator, Source, int], Draft]  # the last is the sample's number


@dataclass(frozen=True)
class Task:
    """budget: tokens that may be generated. needs: data that the user brings."""

    draw: Draw
    budget: int
    metric: Literal["string_match_all", "string_match_part"] = "string_match_all"
    needs: Literal["nothing", "corpus", "questions"] = "nothing"


# --- needles in a haystack --------------------------------------------------------------------------------------------

DRAWN = {"word": words, "number": numbers, "code": uuids}
NEEDLE = "A {kind} to remember for {key}: {value}."
FIND = (
    "The following text hides one or more {kind}s to remember. Afterwards you will be asked for some of them.\n\n{context}\n\n"
    "Question: What is to be remembered for {asked}?"
)
FOUND_ONE, FOUND_SOME = (
    "Answer: The {kind} to remember for {asked} is",
    "Answer: The {kind}s to remember for {asked} are",
)


def niah(
    haystack: Literal["noise", "essay", "needles"],
    *,
    key: Literal["word", "code"] = "word",
    value: Literal["number", "code"] = "number",
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Draw:
    """`values` values under each of `keys` keys, `asked` of which are asked for, all values together being the answer.

    haystack: noise lines; a user's text; or more needles like those hidden, under other keys.
    """

    def draw(rng: np.random.Generator, source: Source, number: int) -> Draft:
        names = DRAWN[key](rng, keys)
        hidden = np.reshape(DRAWN[value](rng, keys * values), (keys, values)).tolist()
        needles = [NEEDLE.format(kind=value, key=n, value=v) for n, vs in zip(names, hidden, strict=True) for v in vs]
        rng.shuffle(needles)
        chosen = rng.choice(keys, asked, replace=False).tolist()
        wanted = enumerated([names[i] for i in chosen])
        references = tuple(v for i in chosen for v in hidden[i])
        depths = drawn_depths(rng, haystack, len(needles), source.depth)
        start, seed = int(rng.integers(2**31)), int(rng.integers(2**31))

        def write(size: int) -> Text:
            units = hay(size)
            places = [int(len(units) * depth / 100) for depth in depths]
            context = ("" if haystack == "essay" else "\n").join(insert(units, placed, places))
            found = FOUND_ONE if len(references) == 1 else FOUND_SOME
            return Text(
                FIND.format(kind=value, context=context, asked=wanted),
                found.format(kind=value, asked=wanted),
                references,
                tuple(round(100 * place / len(units), 1) for place in places),
            )

        def hay(size: int) -> list[str]:
            if haystack == "noise":
                return [NOISE] * size
            if haystack == "essay":
                return [source.sentences[(start + i) % len(source.sentences)] for i in range(size)]
            other = np.random.default_rng(seed)
            others = [name for name in DRAWN[key](other, size + keys) if name not in names][:size]
            wrong = [v for v in DRAWN[value](other, size + len(references)) if v not in references][:size]
            return [NEEDLE.format(kind=value, key=n, value=v) for n, v in zip(others, wrong, strict=True)]

        placed = [f"{needle} " for needle in needles] if haystack == "essay" else needles
        return Draft(write, 1, len(source.sentences) if haystack == "essay" else source.length)

    return draw


def drawn_depths(rng: np.random.Generator, haystack: str, count: int, given: float | None) -> list[float]:
    """Percent of the haystack in front of each needle, ascending: in an essay RULER's forty points, elsewhere anywhere."""
    if given is not None:
        return [given] * count
    drawn = rng.choice(DEPTHS, count, replace=False) if haystack == "essay" else 100 * rng.random(count)
    return sorted(drawn.tolist())


def enumerated(items: Sequence[str]) -> str:
    """`a, b, c and d`; a lone one as it is."""
    return " and ".join([*([", ".join(items[:-1])] if len(items) > 1 else []), items[-1]])


# --- variable tracking ------------------------------------------------------------------------------------------------

HOPS, EXAMPLE_NOISE = 4, 5
TRACK = "Variables are given values in the following text.\n\n{context}\n\nQuestion: Which variables have the value {value}?"
TRACKED = "Answer: The {count} variables that have the value {value} are"


def variable_tracking(rng: np.random.Generator, source: Source, number: int) -> Draft:
    """One chain of assignments, four hops long, in noise; the names of all five variables are the answer.

    A solved example with shorter names stands in front.
    """
    example = chain(rng, 3)(EXAMPLE_NOISE)
    asked = chain(rng, 5)
    return Draft(lambda size: after(example, " ".join(example.references), asked(size)), HOPS, source.length)


def chain(rng: np.random.Generator, name_length: int) -> Callable[[int], Text]:
    """A chain with names of so many letters, in so many lines of noise."""
    names = letters(rng, HOPS + 1, name_length, string.ascii_uppercase)
    value, seed = str(rng.integers(10_000, 100_000)), int(rng.integers(2**31))
    statements = [f"LET {name} = {of}" for name, of in zip(names, [value, *names], strict=False)]

    def write(size: int) -> Text:
        places = sorted(np.random.default_rng(seed).choice(size + 1, len(names), replace=False).tolist())
        context = "\n".join(insert([NOISE] * size, statements, places))
        return Text(
            TRACK.format(context=context, value=value),
            TRACKED.format(count=len(names), value=value),
            tuple(names),
            tuple(round(100 * place / size, 1) for place in places),
        )

    return write


def after(example: Text, answer: str, text: Text) -> Text:
    """The text with a solved example in front."""
    return text._replace(prompt=f"{example.prompt}\n{example.prefix} {answer}\n\n{text.prompt}")


# --- word counts ------------------------------------------------------------------------------------------------------

COMMON = 10
COUNT = (
    "The following numbered list has some words more often than others.\n\n{context}\n\n"
    "Question: Which ten words does the list have most often?"
)
COUNTED = "Answer: The ten words that the list has most often are"


def common_words(rng: np.random.Generator, source: Source, number: int) -> Draft:
    """A shuffled list in which ten words are common and all others rare; the size is the number of different words.

    Words are invented, so that there are enough for any length. Common ones come 30 times and others 3 times, below 4,096
    tokens 6 times and once; the solved example in front has 40 words, 10 and 3 times, or 20 words, 3 times and once.
    """
    long = source.length >= 4096
    common, rare = (30, 3) if long else (6, 1)
    example_size, example_common, example_rare = (40, 10, 3) if long else (20, 3, 1)
    seed = int(rng.integers(2**31))

    def write(size: int) -> Text:
        fresh = np.random.default_rng(seed)
        drawn = invented(fresh, example_size + size)
        example = counted_words(fresh, drawn[:example_size], example_common, example_rare)
        asked = counted_words(fresh, drawn[example_size:], common, rare)
        return after(example, numbered(example.references), asked)

    return Draft(write, 2 * COMMON, source.length)


def counted_words(rng: np.random.Generator, drawn: list[str], common: int, rare: int) -> Text:
    """The first ten words `common` times, the others `rare` times, in random order."""
    listed = [*drawn[:COMMON] * common, *drawn[COMMON:] * rare]
    rng.shuffle(listed)
    return Text(COUNT.format(context=numbered(listed)), COUNTED, tuple(drawn[:COMMON]), ())


def numbered(items: Sequence[str]) -> str:
    """`1. a 2. b`."""
    return " ".join(f"{i}. {item}" for i, item in enumerate(items, start=1))


FREQUENT = 3
FEWEST_WORDS = 74  # from here on, ranks 4 and 5 differ by a whole word: 74 / ZETA_2 * (1/16 - 1/25) > 1
NOTICE = (
    "Some words of the following coded text come up more often than others; dots are not words.\n\n{context}\n\n"
    "Question: Which three words come up most often in the coded text?"
)
NOTICED = "Answer: The three words that come up most often are"


def frequent_words(rng: np.random.Generator, source: Source, number: int) -> Draft:
    """Six-letter coded words in random order, their counts falling as rank^-2; the first rank is dots, the next three the answer.

    The vocabulary has a word for every 50 tokens of length, and the size is the number of words (of which the ranks
    whose count is below one are left out).
    """
    vocabulary = ["...", *letters(rng, max(10, source.length // 50) - 1, 6)]
    shares = np.arange(1, len(vocabulary) + 1) ** -2.0 / ZETA_2
    seed = int(rng.integers(2**31))

    def write(size: int) -> Text:
        coded = np.repeat(vocabulary, (size * shares).astype(int))
        context = " ".join(np.random.default_rng(seed).permutation(coded))
        return Text(NOTICE.format(context=context), NOTICED, tuple(vocabulary[1 : 1 + FREQUENT]), ())

    return Draft(write, FEWEST_WORDS, 2 * source.length)  # up to half of them are left out


# --- question answering -----------------------------------------------------------------------------------------------

READ = (
    "Documents follow, and then a question about them. Answer it with the answer alone.\n\n{context}\n\n"
    "Answer the question from the documents above, with the answer alone.\n\nQuestion: {question}"
)


def question_answering(rng: np.random.Generator, source: Source, number: int) -> Draft:
    """The question's own paragraphs among those of other questions, in random order; any accepted answer will do.

    The size is the number of documents.
    """
    question: Question = source.questions[number]
    others = sorted({p for item in source.questions for p in item.paragraphs} - set(question.paragraphs))
    rng.shuffle(others)
    seed = int(rng.integers(2**31))

    def write(size: int) -> Text:
        own = len(question.paragraphs)
        documents = [*question.paragraphs, *others[: size - own]]
        order = np.random.default_rng(seed).permutation(size).tolist()
        context = "\n\n".join(f"Document {i}:\n{documents[j]}" for i, j in enumerate(order, start=1))
        depths = tuple(round(100 * order.index(j) / size, 1) for j in range(own))
        return Text(READ.format(context=context, question=question.question), "Answer:", question.answers, depths)

    return Draft(write, len(question.paragraphs), len(question.paragraphs) + len(others))


TASKS = {
    "niah_single_1": Task(niah("noise"), 128),
    "niah_single_2": Task(niah("essay"), 128, needs="corpus"),
    "niah_single_3": Task(niah("essay", value="code"), 128, needs="corpus"),
    "niah_multikey_1": Task(niah("essay", keys=4), 128, needs="corpus"),
    "niah_multikey_2": Task(niah("needles"), 128),
    "niah_multikey_3": Task(niah("needles", key="code", value="code"), 128),
    "niah_multivalue": Task(niah("essay", values=4), 128, needs="corpus"),
    "niah_multiquery": Task(niah("essay", keys=4, asked=4), 128, needs="corpus"),
    "vt": Task(variable_tracking, 30),
    "cwe": Task(common_words, 120),
    "fwe": Task(frequent_words, 50),
    "qa_1": Task(question_answering, 32, "string_match_part", "questions"),
    "qa_2": Task(question_answering, 32, "string_match_part", "questions"),
}
ONE_NEEDLE = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_2", "niah_multikey_3")
ONE_ANSWER = (*ONE_NEEDLE, "niah_multikey_1")


def task_named(name: str) -> Task:
    """Raises ConfigError for a name that is none."""
    if name not in TASKS:
        raise ConfigError(f"no task is called {name!r}; there are {', '.join(TASKS)}.")
    return TASKS[name]
