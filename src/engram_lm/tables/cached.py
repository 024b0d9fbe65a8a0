"""Hot records in RAM, in front of any store: n-grams are as uneven as words, so few rows answer many lookups."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from ..kernels.index import IdMap
from .rows import RowFormat
from .store import Held, Staged, Store

if TYPE_CHECKING:
    from ..kernels.cache import Slots

CHUNK = 1 << 16  # hot records that are loaded at a time


@dataclass
class Counts:
    """What became of the rows that were asked for."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the rows that were in the cache; 0 when none was asked for."""
        return self.hits / max(1, self.hits + self.misses)

    def reset(self) -> None:
        """Begin again at 0."""
        self.hits = self.misses = self.evictions = 0


class CachedStore(Store):
    """`rows` records of `inner` in RAM. Every change goes through to `inner`, so nothing is lost with the cache.

    hot: ids of rows that are loaded at the start and never leave. All other slots are kept by the policy of
    kernels/cache.py; with `rows = len(hot)` there are none, and rows that are not hot are read each time.
    A call may ask for more rows than there are slots.

    Raises ConfigError when the hot rows are not rows of the table, or more than `rows`.
    """

    def __init__(self, inner: Store, rows: int, *, hot: np.ndarray | None = None) -> None:
        self.inner, self.counts = inner, Counts()
        self.num_rows, self.form, self.writable = inner.num_rows, inner.form, inner.writable
        self.hot = np.unique(np.empty(0, np.int64) if hot is None else hot)
        if len(self.hot) > rows:
            raise ConfigError(f"{len(self.hot):,} hot rows do not fit in a cache of {rows:,}.")
        if len(self.hot) and not 0 <= self.hot[0] <= self.hot[-1] < self.num_rows:
            raise ConfigError(
                f"hot rows run from {self.hot[0]} to {self.hot[-1]}: the table's end at {self.num_rows - 1}, so they were "
                "counted for another one."
            )
        self._records = np.empty((rows, self.form.stride), np.uint8)
        self._where = IdMap(rows)
        self._looking = threading.Lock()  # `stage` looks ids up while `hold` moves them
        self.forget()

    @staticmethod
    def bytes_per_row(form: RowFormat) -> int:
        """Bytes of RAM that a row in the cache takes, at most: its record, its owner and its place in the queues, its index."""
        return form.stride + 17 + 52

    @property
    def resident(self) -> int:
        """Bytes of the slots, of what is kept about them, and of the inner store."""
        return self._records.nbytes + self._slots.nbytes + self._where.nbytes + self.inner.resident

    def hold(self, ids: np.ndarray, staged: Staged | None = None) -> Held:
        """Slots of all ids. What is missing comes from `staged` or the inner store and takes the place of what may leave."""
        from ..kernels.cache import admit

        slots = self._where.get(ids)
        missing = np.flatnonzero(slots < 0)
        self.counts.hits += len(ids) - len(missing)
        self.counts.misses += len(missing)
        read = self.inner.hold(ids[missing], staged) if len(missing) else None
        left = np.empty(len(ids), np.int64)
        admit(ids, slots, left, *self._slots)
        if read is None:
            return Held(self._records, slots)

        admitted = slots[missing] >= 0
        left = left[left >= 0]
        self.counts.evictions += len(left)
        with self._looking:
            self._where.remove(left)
            self._where.put(ids[missing[admitted]], slots[missing[admitted]])
        self._records[slots[missing[admitted]]] = read.records[read.slots[admitted]]
        if admitted.all():
            return Held(self._records, slots)
        records = np.empty((len(ids), self.form.stride), np.uint8)  # more rows than slots can be had
        here = slots >= 0
        records[here] = self._records[slots[here]]
        records[missing[~admitted]] = read.records[read.slots[~admitted]]
        return Held(records, np.arange(len(ids)))

    def stage(self, ids: np.ndarray) -> Staged:
        """Stage what is missing in the inner store."""
        with self._looking:
            slots = self._where.get(ids)
        return self.inner.stage(ids[slots < 0])

    def advise(self, ids: np.ndarray) -> None:
        """What is missing will be read."""
        with self._looking:
            slots = self._where.get(ids)
        if (missing := ids[slots < 0]).size:
            self.inner.advise(missing)

    def changed(self, ids: np.ndarray, held: Held) -> None:
        """Write through. Rows are held once to be read and again to be altered: that counts as one use."""
        slots = held.slots
        if held.records is not self._records:
            slots = self._where.get(ids)
            here = slots >= 0
            slots = slots[here]
            self._records[slots] = held.records[held.slots[here]]
        self._slots.marks[slots] -= self._slots.marks[slots] > 0
        self.inner.changed(ids, held)

    def forget(self) -> None:
        """Drop all copies and load the hot rows anew: for when the inner store was altered other than through this one."""
        from ..kernels.cache import Slots

        self._slots: Slots = Slots.empty(len(self._records), len(self.hot))
        with self._looking:
            self._where.clear()
        for first in range(0, len(self.hot), CHUNK):
            ids = self.hot[first : first + CHUNK]
            read = self.inner.hold(ids)
            self._records[first : first + len(ids)] = read.records[read.slots]
            with self._looking:
                self._where.put(ids, np.arange(first, first + len(ids)))

    def begin(self, clock: int, *, again: bool) -> int:
        """Begin in the inner store and forget all copies of its rows."""
        clock = self.inner.begin(clock, again=again)
        self.forget()
        return clock

    def save(self, directory: Path, clock: int, digest: str) -> None:
        """The inner store has every change."""
        self.inner.save(directory, clock, digest)

    def load(self, directory: Path, clock: int, digest: str) -> None:
        """Load the inner store and forget all copies of its rows."""
        self.inner.load(directory, clock, digest)
        self.forget()

    def settle(self, clock: int) -> None:
        """Pass it on."""
        self.inner.settle(clock)

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()
