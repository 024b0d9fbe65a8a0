"""The n-grams of a text as the memory addresses them: canonical ids, cut off at the borders of documents and windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..hashing import HashPlan, hash_ngrams
from ..model.lookup import Lookup
from ..tables import deduplicate

CHUNK = 1 << 18  # n-grams that are hashed at a time


def views(lookup: Lookup, tokens: Tensor, segments: Tensor | None = None) -> np.ndarray:
    """What the memory sees from each position of windows [B, T]: int64 [B * T, N].

    Canonical ids of the token itself, of the one before it, ...; the pad where the view is blocked (see `hash_ngrams`).
    """
    plan, canonical = lookup.plan, lookup.vocabulary(tokens.cpu())
    segments = torch.zeros_like(canonical) if segments is None else segments.cpu().long()
    blocked = torch.zeros_like(canonical, dtype=torch.bool)
    by_lag = []
    for lag in range(plan.orders[-1]):
        token, segment = (F.pad(past, (lag, 0))[:, : past.shape[1]] for past in (canonical, segments))
        blocked = blocked | (segment != segments)
        blocked[:, :lag] = True
        by_lag.append(token.masked_fill(blocked, plan.pad))
        if plan.eos is not None and lag > 0:
            blocked = blocked | (token == plan.eos)
    return torch.stack(by_lag, -1).flatten(0, 1).numpy()


def rows_of(plan: HashPlan, seen: np.ndarray) -> np.ndarray:
    """Rows [U, L, orders, heads] that views [U, n] read; those of orders above n mean nothing."""
    ids = [
        hash_ngrams(plan, torch.from_numpy(seen[first : first + CHUNK, ::-1].copy()))[0][:, -1]
        for first in range(0, len(seen), CHUNK)
    ]
    return torch.cat(ids).numpy().reshape(len(seen), len(plan.layers), len(plan.orders), plan.heads)


@dataclass(frozen=True)
class Ngrams:
    """The distinct n-grams of a text for n = 1 .. N, and how often each occurs; entry n - 1 of each tuple is for n.

    keys: [U] ascending, the number of the newest n - 1 tokens * vocabulary + the oldest token: exact, and never too large.
    counts: [U] int64. seen: [U, n] the n-grams themselves, the newest token first, as in `views`.
    """

    vocabulary: int
    keys: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    seen: tuple[np.ndarray, ...]

    @staticmethod
    def of(seen: np.ndarray, vocabulary: int) -> Ngrams:
        """Of views [T, N] of canonical ids below `vocabulary`. Memory is that of the views and the distinct n-grams."""
        keys, counts, ngrams = [], [], []
        number, shorter = np.zeros(len(seen), np.int64), np.zeros((1, 0), np.int64)
        for lag in range(seen.shape[1]):
            unique, number = (
                part.numpy() for part in deduplicate(torch.from_numpy(number * vocabulary + seen[:, lag]))
            )
            shorter = np.column_stack([shorter[unique // vocabulary], unique % vocabulary])
            keys.append(unique)
            counts.append(np.bincount(number, minlength=len(unique)))
            ngrams.append(shorter)
        return Ngrams(vocabulary, tuple(keys), tuple(counts), tuple(ngrams))

    def numbers(self, seen: np.ndarray) -> np.ndarray:
        """Which n-gram of this text each view [T, N] of another one ends in: int64 [T, N], a column for each n; -1 for none."""
        number, columns = np.zeros(len(seen), np.int64), []
        for lag, keys in enumerate(self.keys):
            number = positions_in(keys, np.where(number >= 0, number * self.vocabulary + seen[:, lag], -1))
            columns.append(number)
        return np.stack(columns, axis=1)

    def times(self, seen: np.ndarray) -> np.ndarray:
        """How often this text holds the n-grams that views [T, N] of another one end in: int64 [T, N]."""
        columns = zip(self.counts, self.numbers(seen).T, strict=True)
        return np.stack([np.append(counts, 0)[number] for counts, number in columns], axis=1)  # -1 is the appended 0


def crowding(plan: HashPlan, text: Ngrams, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who else reads the rows of views [T, N], in the first memory layer.

    Returns the rows [T, orders, heads], and [T, orders]: how many other n-grams of `text` share a row with the view's, in
    the head where they are most. More than one head has to be crowded before the memory takes one n-gram for another.
    """
    rows = rows_of(plan, seen)[:, 0]
    known = text.numbers(seen) >= 0
    others = np.empty(rows.shape, np.int64)
    for column, order in enumerate(plan.orders):
        taken = np.sort(rows_of(plan, text.seen[order - 1])[:, 0, column], axis=0)  # [U, heads]
        for head in range(plan.heads):
            first, last = (np.searchsorted(taken[:, head], rows[:, column, head], side) for side in ("left", "right"))
            others[:, column, head] = last - first - known[:, order - 1]
    return rows, others.max(-1)


def positions_in(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Index of each key in the sorted array `known`, -1 where it is absent."""
    if not len(known):
        return np.full(len(keys), -1)
    found = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[found] == keys, found, -1)
