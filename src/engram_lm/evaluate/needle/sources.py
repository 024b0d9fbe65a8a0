"""What fills the distance: a noise that needs no data, the sentences of any text, the paragraphs of a question set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError

NOISE = "The kettle is on the stove. The rain taps on the roof. The cat is asleep. Nobody is in a hurry. The clock ticks on."
_BOUNDARY = re.compile(r"(?<=[.!?]\s)|(?<=[。！？\n])")
_PIECE = re.compile(r".{1,240}(?:\s|$)|.{1,240}", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the paragraphs that answer it: one (SQuAD) or several (HotpotQA)."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What the samples of one task and length draw on.

    depth: percent of the haystack in front of a lone needle; None draws it.
    """

    length: int
    sentences: Sequence[str] = ()
    questions: Sequence[Question] = ()
    depth: float | None = None


def split_sentences(text: str) -> list[str]:
    """The text in pieces that end where sentences or lines do, and are at most 241 characters long; joined, they are the text."""
    return [piece for sentence in _BOUNDARY.split(text) for piece in _PIECE.findall(sentence)]


def insert(units: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """The units with needles[i] in front of units[places[i]]; places ascend, and len(units) is the end."""
    result = list(units)
    for needle, place in zip(reversed(needles), reversed(places), strict=True):
        result.insert(place, needle)
    return result


def read_questions(path: Path | str) -> list[Question]:
    """Questions from a file: SQuAD's or XQuAD's JSON, or JSON lines of {"question", "answers", "context"}.

    "answers" is a string or a list, "context" a paragraph or a list of paragraphs. SQuAD's unanswerable questions are left out.
    Raises DataError for a file in another layout, or without questions.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = path.suffix == ".jsonl"
        data = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        found = list(_of_squad(data) if isinstance(data, dict) else map(_of_record, data))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: neither SQuAD's JSON nor lines of {{question, answers, context}} ({type(error).__name__}: {error})."
        ) from None
    if not found:
        raise DataError(f"{path}: no question with an answer in it.")
    return found


def _of_squad(data: dict[str, Any]) -> Iterable[Question]:
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))
                if answers:
                    yield Question(item["question"], answers, (paragraph["context"],))


def _of_record(record: dict[str, Any]) -> Question:
    question = Question(str(record["question"]), _strings(record["answers"]), _strings(record["context"]))
    if not all((question.question, question.answers, question.paragraphs)):
        raise ValueError(f"something is empty in {record!r:.120}")
    return question


def _strings(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))
