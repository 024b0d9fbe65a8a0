"""Hit rate against cache size: what share of the rows that a text asks for is found in a cache of so many rows.

A stream of calls is replayed through the kernel that decides in tables/cached.py, ids only, so tables of any size can be
judged from text alone. The first part of the stream fills the cache, or is where hot rows are counted; the rest is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Policy = Literal["s3fifo", "static", "half"]


@dataclass(frozen=True)
class Stream:
    """Calls for rows, one after another.

    rows: [D] the different rows, ascending. asked: [n] int64, what each call asks for, as indices of `rows`, distinct in a
    call. edges: [calls + 1] where the calls begin and end. warm: how many of them come before the measurement.
    """

    rows: np.ndarray
    asked: np.ndarray
    edges: np.ndarray
    warm: int

    @staticmethod
    def of(ids: np.ndarray, tokens: int = 1, warm: float = 0.5) -> Stream:
        """The rows ids [T, K] of T tokens, `tokens` at a call; those that remain at the end are left out."""
        calls = len(ids) // tokens
        ids = np.sort(ids[: calls * tokens].reshape(calls, -1))
        first = np.ones(ids.shape, bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        rows, asked = np.unique(ids[first], return_inverse=True)
        return Stream(rows, asked, np.concatenate([[0], np.cumsum(first.sum(1))]), int(calls * warm))

    @property
    def measured(self) -> np.ndarray:
        """[m] the part of `asked` that is measured."""
        return self.asked[self.edges[self.warm] :]

    @cached_property
    def by_frequency(self) -> np.ndarray:
        """Indices of the rows that were asked for before the measurement, the most frequent first."""
        counts = np.bincount(self.asked[: self.edges[self.warm]], minlength=len(self.rows))
        return np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]

    def hits(self, slots: int, policy: Policy = "s3fifo") -> np.ndarray:
        """[m] bool: whether each row of `measured` was in a cache of `slots` rows when it was asked for.

        s3fifo: what kernels/cache.py keeps. static: the most frequent rows. half: these in half the slots, and the policy
        in the others.
        """
        from ..kernels.cache import Slots, replay

        hot = self.by_frequency[: {"s3fifo": 0, "static": slots, "half": slots // 2}[policy]]
        where = np.full(len(self.rows), -1, np.int64)
        where[hot] = np.arange(len(hot))
        found = np.empty(len(self.asked), bool)
        replay(self.asked, self.edges, where, found, *Slots.empty(len(hot) if policy == "static" else slots, len(hot)))
        return found[self.edges[self.warm] :]


def curve(
    stream: Stream, sizes: Sequence[int], policy: Policy = "s3fifo", group: np.ndarray | None = None
) -> np.ndarray:
    """Hit rates [sizes, 1 + groups]: of all rows, then of each group, where group [D] says which one a row is of."""
    measured = stream.measured
    groups = np.zeros(len(measured), np.int64) if group is None else group[measured]
    asked = np.bincount(groups)
    rates = []
    for slots in sizes:
        found = np.bincount(groups[stream.hits(slots, policy)], minlength=len(asked))
        each = [] if group is None else (found / np.maximum(asked, 1)).tolist()
        rates.append([found.sum() / len(measured), *each])
    return np.array(rates)
