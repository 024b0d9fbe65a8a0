"""Where records are. A tier is a way to have the records of some rows in memory for a moment.

    held = store.hold(ids)                    # the records of these rows are now held.records[held.slots]
    ... read or alter them there ...
    store.changed(ids, held)                  # what was altered shall stay

In RAM the records are where they always are; on disk they are read into a buffer; behind a cache they sit in its slots.
Reading, updating and encoding rows know no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .rows import RowFormat


class Held(NamedTuple):
    """Records in memory."""

    records: np.ndarray  # uint8 [S, stride], C-contiguous
    slots: np.ndarray  # [U] int64: the i-th row's record is records[slots[i]]


class Staged(NamedTuple):
    """Records that were read ahead."""

    ids: np.ndarray  # [m] int64, ascending
    records: np.ndarray  # uint8 [m, stride]

    def without(self, stale: np.ndarray) -> Staged:
        """What remains when the ids `stale` (ascending) are dropped."""
        if len(stale) == 0:
            return self
        fresh = stale[np.searchsorted(stale, self.ids).clip(max=len(stale) - 1)] != self.ids
        return self if fresh.all() else Staged(self.ids[fresh], self.records[fresh])


class Store(ABC):
    """`num_rows` records of one RowFormat."""

    num_rows: int
    form: RowFormat
    writable: bool = True
    in_memory: bool = False  # all records are always held, so there is nothing to stage

    @property
    def nbytes(self) -> int:
        """Bytes of all records, wherever they are."""
        return self.num_rows * self.form.stride

    @property
    @abstractmethod
    def resident(self) -> int:
        """Bytes of RAM that the store takes for itself."""

    @abstractmethod
    def hold(self, ids: np.ndarray, staged: Staged | None = None) -> Held:
        """The records of distinct ids [U] in memory, until the next `hold`. Records in `staged` need no reading."""

    def stage(self, ids: np.ndarray) -> Staged:
        """The slow part of `hold`: read what is not in memory. May run on a thread of its own beside the others."""
        return Staged(ids[:0], np.empty((0, self.form.stride), np.uint8))

    def advise(self, ids: np.ndarray) -> None:  # noqa: B027  (records in RAM need no advice)
        """These few rows will be held soon: let the system begin to read what is not in memory, and return at once."""

    def changed(self, ids: np.ndarray, held: Held) -> None:  # noqa: B027  (records in RAM are where they belong)
        """Keep the records of `ids`, which were altered where they are held."""

    def begin(self, clock: int, *, again: bool) -> int:
        """A run starts here, at `clock`; `again`: and forgets what an earlier try left. Returns the clock that it starts from."""
        return clock

    @abstractmethod
    def save(self, directory: Path, clock: int, digest: str) -> None:
        """Make every change so far durable under the number `clock`: in place, or in a file of `directory`."""

    @abstractmethod
    def load(self, directory: Path, clock: int, digest: str) -> None:
        """Return to what was saved under `clock`."""

    def settle(self, clock: int) -> None:  # noqa: B027
        """Nobody will roll back to before commit `clock`: what was kept for that may go."""

    def close(self) -> None:  # noqa: B027
        """Release files and memory; the store is not used afterwards."""
