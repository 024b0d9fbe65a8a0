"""Batches from token shards: packed windows in a seeded order, with a state that is a value.

Window i of length T takes the tokens i*T ... i*T + T: its neighbours share one token, so that each token is a
target in exactly one window. The order of an epoch is computed, not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, MismatchError
from .shards import Split

IGNORED = -100  # the target that cross_entropy leaves out


@dataclass(frozen=True)
class Batch:
    """Windows of a packed split.

    Attributes:
        tokens: [B, T] int64.
        targets: [B, T] int64, the next token; -100 where that belongs to another document.
        segments: [B, T] int32, the document's number in the split, from 1; None where a window is one document.
    """

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None


class Batches(Protocol):
    """Where batches come from. The state is a value: the same state always gives the same batch."""

    def next(self, state: LoaderState) -> tuple[Batch, LoaderState]:
        """The batch at `state`, and the state after it."""


@dataclass(frozen=True)
class LoaderState:
    """How far the loader has come: `index` windows into the order of `epoch`."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class Loader:
    """Endless training batches: every window once an epoch, in an order of its own.

    Raises DataError for a split shorter than one batch.
    """

    split: Split
    batch_size: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_windows < self.batch_size:
            raise DataError(
                f"The split holds {len(self.split.tokens):,} tokens, but one batch needs "
                f"{self.batch_size * self.length + 1:,} ({self.batch_size} windows of {self.length}); no "
                f"step could be taken. Give more text, or a smaller batch or length."
            )

    @property
    def num_windows(self) -> int:
        """Windows in an epoch."""
        return (len(self.split.tokens) - 1) // self.length

    def next(self, state: LoaderState) -> tuple[Batch, LoaderState]:
        """The batch at `state`, and the state after it; a batch may end one epoch and begin the next.

        Raises MismatchError for a state that lies outside of the epoch.
        """
        if not 0 <= state.index < self.num_windows:
            raise MismatchError(
                f"{state} lies outside of an epoch of {self.num_windows} windows: it comes from another "
                f"corpus or length, and some text would be skipped or seen twice."
            )
        n = self.num_windows
        epochs, places = np.divmod(state.epoch * n + state.index + np.arange(self.batch_size), n)
        window = [
            permuted(places[epochs == epoch], n, (self.seed, epoch)) for epoch in range(state.epoch, epochs[-1] + 1)
        ]
        after = LoaderState(*divmod(state.epoch * n + state.index + self.batch_size, n))
        return _batch(self.split, np.concatenate(window), self.length), after

    def first(self, batches: int) -> Iterator[Batch]:
        """The first so many batches: what a run of so many steps has read."""
        return first(self, batches)


def first(source: Batches, batches: int) -> Iterator[Batch]:
    """The first so many batches of any source."""
    state = LoaderState()
    for _ in range(batches):
        batch, state = source.next(state)
        yield batch


def windows(split: Split, batch_size: int, length: int, limit: int | None = None) -> Iterator[Batch]:
    """The split's windows in order, for evaluation, or `limit` of them spread evenly; all of them hold each target once.

    The last batch may hold fewer windows, and the last window is filled up with a segment without targets.
    """
    count = -(-(len(split.tokens) - 1) // length)
    chosen = np.arange(count) if limit is None or limit >= count else np.arange(limit) * count // limit
    for first in range(0, len(chosen), batch_size):
        yield _batch(split, chosen[first : first + batch_size], length)


def _batch(split: Split, window: np.ndarray, length: int) -> Batch:
    """Gather the windows numbered `window` [B] from the split."""
    places = window[:, None] * length + np.arange(length + 1)  # [B, T + 1]
    inside = places < len(split.tokens)
    places = np.minimum(places, len(split.tokens) - 1)
    tokens = split.tokens[places].astype(np.int64)
    documents = np.searchsorted(split.starts, places, side="right") + ~inside  # what fills up is one more
    known = inside[:, 1:] & (documents[:, 1:] == documents[:, :-1])
    return Batch(
        tokens=torch.from_numpy(tokens[:, :-1].copy()),
        targets=torch.from_numpy(np.where(known, tokens[:, 1:], IGNORED)),
        segments=torch.from_numpy(documents[:, :-1].astype(np.int32)),
    )


def permuted(places: np.ndarray, n: int, key: Sequence[int]) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), chosen by `key`, sends each of `places`.

    A Feistel network permutes the next power of four; what lands outside of range(n) is sent on until it is
    inside. Any place of any epoch costs the same few operations, and nothing is stored, however large n is.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)

    def feistel(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        return left << half | right

    x = feistel(places.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = feistel(x[outside])
    return x.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of `x` (the finalizer of splitmix64)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
