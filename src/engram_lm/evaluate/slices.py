"""Where a loss is lost or won: validation loss by how often training showed the n-gram, by position, by kind of token.

A memory of n-grams knows only those that it has seen: its gain over the base should lie in their slices, and be about nothing
where training never showed the n-gram. A branch that helps in all slices alike helps by something else.

    seen 2-gram                          how often training held the n-gram that the memory looks up there (canonical ids)
    seen 2-gram with its next token      how often training had the same target to predict after it: could be known by heart
    position                             how many tokens of its document the window shows before the target
    token class                          what the target is, see `class_of`

Counts are exact, and only of the windows that a run has read; n-grams end at the borders of windows and documents, as they do
for the memory. "start" is where the n-gram would begin before such a border: the memory looks up one filled up with pads there.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..errors import MismatchError
from ..statistics import over_documents
from ..tokens import CanonicalVocabulary
from ..train.loader import Batch
from ..train.ngrams import Positions, seen_ngrams
from .loss import TokenLosses, pieces_of_tokens

TIMES_SEEN = (0, 1, 4, 32)  # where slices begin
CONTEXT = (1, 4, 16, 64, 256, 1024, 4096)
CLASSES = (
    "word start",
    "capitalised word start",
    "word continuation",
    "number",
    "punctuation",
    "white space",
    "other script",
    "other",
)


@dataclass(frozen=True)
class Slicing:
    """Which of `labels` each target that counts belongs to: number [N]."""

    labels: tuple[str, ...]
    number: np.ndarray


def slicings(
    evaluation: Iterable[Batch],
    training: Iterable[Batch],
    tokenizer: Tokenizer,
    vocabulary: CanonicalVocabulary,
    orders: Sequence[int],
) -> dict[str, Slicing]:
    """Every kind of slice of the evaluation's targets, by name; training: the batches that the run has read."""
    evaluation = list(evaluation)
    positions = Positions.of(evaluation)
    seen, followed = seen_counts(training, evaluation, vocabulary, orders)
    found = {f"seen {order}-gram": by_count(seen[:, column]) for column, order in enumerate(orders)}
    for column, order in enumerate(orders):
        found[f"seen {order}-gram with its next token"] = by_count(followed[:, column])
    return found | {"position": by_context(positions), "token class": by_class(positions, tokenizer)}


def seen_counts(
    training: Iterable[Batch], evaluation: Iterable[Batch], vocabulary: CanonicalVocabulary, orders: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """How often training held the n-gram that is looked up for each of the evaluation's N targets, and how often with that target.

    Both are int64 [N, len(orders)], -1 where the n-gram would begin before its window or document. N-grams are of canonical
    ids, as the memory sees them; targets are compared as they are. Training batches are held one at a time.
    """

    def canonical(batch: Batch) -> Batch:
        return replace(batch, tokens=vocabulary(batch.tokens))

    text = Positions.of(map(canonical, evaluation))
    seen, followed = seen_ngrams((Positions.of([canonical(batch)]) for batch in training), text, orders)
    return seen[text.counted], followed[text.counted]


def by_count(counts: np.ndarray) -> Slicing:
    """Slices of how often something was seen [N]: start (-1), 0, 1-3, 4-31, 32+."""
    return Slicing(("start", *_ranges(TIMES_SEEN)), np.searchsorted(TIMES_SEEN, counts, side="right"))


def by_context(positions: Positions) -> Slicing:
    """Slices of how many tokens of its document the window shows before a target: 1-3, 4-15, ...

    The last one begins where windows reach at least twice as far, so that it is not made of a few tokens.
    """
    context = positions.reach[positions.counted]
    edges = [edge for edge in CONTEXT if edge == 1 or 2 * edge <= context.max(initial=0)]
    return Slicing(_ranges(edges), np.searchsorted(edges, context, side="right") - 1)


def _ranges(edges: Sequence[int]) -> tuple[str, ...]:
    """Names of the ranges that begin at each edge: 0, 1-3, 4-31, 32+."""
    inner = [f"{low}-{high - 1}" if high - low > 1 else f"{low}" for low, high in pairwise(edges)]
    return (*inner, f"{edges[-1]}+")


def by_class(positions: Positions, tokenizer: Tokenizer) -> Slicing:
    """Slices of what the target is, see `class_of`.

    A word goes on where the target begins with its letters and the token before ends in a letter, a digit or half a character.
    """
    pieces = pieces_of_tokens(tokenizer)
    classes = np.array([CLASSES.index(class_of(piece)) for piece in pieces])
    joins = np.array([_begins_with_letters(piece) for piece in pieces])
    open_ended = np.array([_ends_inside_a_word(piece) for piece in pieces])
    counted = positions.counted
    before, target = positions.tokens[counted], positions.targets[counted]
    goes_on = joins[target] & open_ended[before]
    return Slicing(CLASSES, np.where(goes_on, CLASSES.index("word continuation"), classes[target]))


def class_of(piece: bytes) -> str:
    """The class of a token's bytes where it does not go on with a word; the first letter or digit in it decides.

    word start, capitalised word start: a Latin letter. number: a digit. other script: a letter of any other script.
    Without either: white space, if there is nothing else; punctuation, with symbols; other: the rest, such as parts of a
    character (no UTF-8), control characters and special tokens.
    """
    text = _text(piece)
    if text.isspace():
        return "white space"
    first = next(filter(str.isalnum, text), None)
    if first is None:
        marks = text and all(mark.isspace() or unicodedata.category(mark)[0] in "PS" for mark in text)
        return "punctuation" if marks else "other"
    if not first.isalpha():
        return "number"
    if not _is_latin(first):
        return "other script"
    return "word start" if first.islower() else "capitalised word start"


def _text(piece: bytes) -> str:
    """What a token spells; nothing if it is only part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return ""


def _is_latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("LATIN")


def _begins_with_letters(piece: bytes) -> bool:
    """Latin letters at once, or after an apostrophe: what can go on with a word."""
    text = _text(piece).lstrip("'’")
    return text[:1].isalpha() and _is_latin(text[0])


def _ends_inside_a_word(piece: bytes) -> bool:
    text = _text(piece)
    return text[-1].isalnum() if text else bool(piece)


def slice_losses(losses: TokenLosses, slicing: Slicing) -> dict[str, Any]:
    """Sums by slice and document, plain JSON: {"labels": [S], "nats": [S][D], "tokens": [S][D]}.

    D are the documents that have a target, in the order of their numbers: the same for all slicings and models.
    Raises MismatchError for a slicing of other targets.
    """
    if len(slicing.number) != len(losses.nats):
        raise MismatchError(
            f"slices of {len(slicing.number):,} targets for {len(losses.nats):,} losses: they come from different batches, and "
            "losses would be booked on the wrong slices."
        )
    documents, document = np.unique(losses.positions.documents[losses.positions.counted], return_inverse=True)
    shape = len(slicing.labels), len(documents)
    cell = slicing.number * len(documents) + document
    nats = np.bincount(cell, losses.nats, minlength=shape[0] * shape[1]).reshape(shape)
    tokens = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    return {"labels": list(slicing.labels), "nats": nats.round(6).tolist(), "tokens": tokens.tolist()}


def compare_slices(per_arm: Mapping[str, Sequence[Mapping[str, Any]]], base: str = "base") -> dict[str, Any]:
    """What each slice says about each arm; per_arm: `slice_losses` of every seed, of the same slicing for all arms.

    Returns {"labels": [S], "share": [S] of the tokens, "arms": {arm: {"loss": [S] nats a token, "less_base":
    [S] {"difference", "interval"}, "part": [S]}}}. Seeds are pooled. The interval is the paired 95 % one over documents, None
    for fewer than two of them. Part: how much of the arm's whole gain over the base lies in the slice; the parts add up to 1,
    and are None unless the whole gain's interval excludes 0. Where a slice is empty, loss and less_base are None.

    Raises MismatchError when arms have other slices, seeds or tokens than the base, or there is no base.
    """
    if base not in per_arm:
        raise MismatchError(f"there is no arm {base} among {', '.join(per_arm)}: gains would have no origin.")
    labels, tokens = per_arm[base][0]["labels"], _stacked(per_arm[base], "tokens")
    for arm, seeds in per_arm.items():
        if any(seed["labels"] != labels for seed in seeds) or not np.array_equal(_stacked(seeds, "tokens"), tokens):
            raise MismatchError(
                f"{arm} and {base} were not measured on the same slices of the same text, seed by seed."
            )
    nats = {arm: _stacked(seeds, "nats") for arm, seeds in per_arm.items()}
    sizes = tokens.mean(0)  # [S, D]; what was seen in training may differ between seeds
    return {
        "labels": labels,
        "share": (sizes.sum(1) / sizes.sum()).tolist(),
        "arms": {arm: _of_arm(own, nats[base], sizes) for arm, own in nats.items()},
    }


def _stacked(seeds: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """[seeds, S, D] of what `slice_losses` gave."""
    return np.array([seed[name] for seed in seeds], np.float64)


def _of_arm(own: np.ndarray, base: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """One arm's part of `compare_slices`; own, base: nats [seeds, S, D]; sizes: tokens [S, D]."""
    loss: list[float | None] = []
    less: list[dict[str, Any] | None] = []
    for number, tokens in enumerate(sizes):
        if not tokens.any():
            loss.append(None)
            less.append(None)
            continue
        loss.append(float(own[:, number].mean(0).sum() / tokens.sum()))
        difference, interval = over_documents(own[:, number], base[:, number], tokens)
        less.append({"difference": difference, "interval": interval})
    _, whole = over_documents(own.sum(1), base.sum(1), sizes.sum(0))
    change = (own.mean(0) - base.mean(0)).sum(1)  # [S] nats
    part = (change / change.sum()).tolist() if whole is not None and whole[1] < 0 else [None] * len(sizes)
    return {"loss": loss, "less_base": less, "part": part}
