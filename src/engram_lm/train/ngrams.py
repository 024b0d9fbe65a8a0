"""How often the n-grams of one text occur in another: exact counts, without a hash.

An n-gram is known by (number of its first n - 1 tokens, last token), order after order, so that keys never overflow, however
large n and the vocabulary are. The text whose n-grams are asked about is numbered first; the other one streams by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .loader import IGNORED, Batch

Level = tuple[int, bool]  # order of an n-gram, and whether the target after it belongs to it


@dataclass(frozen=True)
class Positions:
    """Every position of some batches, window after window; each field is [P] of integers.

    tokens: what a model reads there. targets: the next token, -100 where that does not count. documents: their numbers.
    reach: how many tokens of its window and document lie up to this one, itself included. It is the context that a
    prediction has, and an n-gram that ends here is whole when n <= reach.
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    reach: np.ndarray

    @staticmethod
    def of(batches: Iterable[Batch]) -> Positions:
        """Of batches on any device; a window without segments is one document, number 0."""
        parts = [_fields(batch) for batch in batches]
        nothing = np.zeros(0, np.int32)
        return Positions(*(np.concatenate([nothing, *(part[field] for part in parts)]) for field in range(4)))

    @property
    def counted(self) -> np.ndarray:
        """[P] bool: where a target counts."""
        return self.targets >= 0


def _fields(batch: Batch) -> tuple[np.ndarray, ...]:
    """The fields of Positions of one batch."""
    tokens, targets = batch.tokens.cpu().numpy(), batch.targets.cpu().numpy()
    segments = np.zeros(tokens.shape, np.int32) if batch.segments is None else batch.segments.cpu().numpy()
    place = np.arange(tokens.shape[1], dtype=np.int32)
    begins = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)  # [B, T] where the document begins in the window
    return tokens.ravel(), targets.ravel(), segments.ravel(), (place - first + 1).ravel()


def seen_ngrams(training: Iterable[Positions], text: Positions, orders: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How often `training` holds the n-gram that ends at each position of `text`, and how often with the same target after it.

    Both are int64 [P, len(orders)]; -1 where the n-gram would begin before its window or document, or has no target. All parts
    of `training` are added up, one at a time: memory is that of `text`, time O(P log P) and O(log P) a training token.
    """
    base = int(max(text.tokens.max(initial=0), text.targets.max(initial=0))) + 1
    known: dict[Level, np.ndarray] = {}

    def learn(level: Level, keys: np.ndarray) -> np.ndarray:
        distinct, numbers = np.unique(np.append(keys, -1), return_inverse=True)
        known[level] = distinct[1:]
        return numbers[:-1] - 1

    def find(level: Level, keys: np.ndarray) -> np.ndarray:
        return _places(known[level], keys)

    own = _numbers(text, orders, base, learn)
    counts = {level: np.zeros(len(known[level]) + 1, np.int64) for level in own}  # number -1 counts in the last one
    for part in training:
        for level, numbers in _numbers(part, orders, base, find).items():
            np.add.at(counts[level], numbers, 1)
    for of_level in counts.values():
        of_level[-1] = -1
    alone, followed = (
        np.stack([counts[order, with_target][own[order, with_target]] for order in orders], axis=1)
        for with_target in (False, True)
    )
    return alone, followed


def _numbers(
    text: Positions, orders: Sequence[int], base: int, seek: Callable[[Level, np.ndarray], np.ndarray]
) -> dict[Level, np.ndarray]:
    """Number [P] of the n-gram at each position by level, -1 where there is none; `seek` turns keys into numbers."""

    def keys(numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.where((numbers >= 0) & (ids >= 0) & (ids < base), numbers * base + ids, -1)

    found: dict[Level, np.ndarray] = {}
    shorter = np.zeros(len(text.tokens), np.int64)  # the n-gram of one token less that ends one token earlier
    for order in range(1, max(orders) + 1):
        numbers = seek((order, False), keys(np.where(text.reach >= order, shorter, -1), text.tokens))
        if order in orders:
            found[order, False] = numbers
            found[order, True] = seek((order, True), keys(numbers, text.targets))
        shorter = np.roll(numbers, 1)  # what comes round to position 0 is out of its reach
    return found


def _places(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Index of each key in the ascending `known`, -1 where it is absent."""
    if not len(known):
        return np.full(len(keys), -1)
    distinct, inverse = np.unique(keys, return_inverse=True)  # several times faster than searching in the text's order
    found = np.searchsorted(known, distinct).clip(max=len(known) - 1)
    return np.where(known[found] == distinct, found, -1)[inverse]


def count_ngrams(training: np.ndarray, text: np.ndarray, orders: Sequence[int]) -> list[list[int]]:
    """How often `training` [N] holds the n-gram that ends at each token of `text` [T], as [T][len(orders)].

    Give canonical ids, as the memory sees them. Each text is one document; n-grams that begin before it count 0.
    """
    seen, _ = seen_ngrams([_document(training)], _document(text), orders)
    return seen.clip(min=0).tolist()


def _document(ids: np.ndarray) -> Positions:
    tokens = torch.from_numpy(np.asarray(ids, np.int64))[None]
    return Positions.of([Batch(tokens, torch.full_like(tokens, IGNORED), None)])
