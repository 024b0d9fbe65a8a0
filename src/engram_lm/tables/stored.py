"""A table over a store: read, update and encode records where the store holds them, fetching ahead.

A prefetch is exact: rows that are updated between its start and its end are read again, so results are those of a run
that fetches at the last moment. `asynchronous=True` leaves that out: rows may then miss the last update.
"""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import codec
from .base import Fetch, Table
from .dedup import deduplicate
from .store import Held, Staged, Store
from .streams import Handed, SideStream

FEW = 512  # rows


class StoredTable(Table):
    """Rows wherever `store` has them, delivered to `device`.

    asynchronous: rows that were fetched ahead are not refreshed; faster where most rows repeat, and not exact.
    """

    def __init__(self, store: Store, device: torch.device | str = "cpu", *, asynchronous: bool = False) -> None:
        super().__init__(store.num_rows, store.form, device)
        self.address_device = torch.device("cpu")
        self.store, self.asynchronous, self.writable = store, asynchronous, store.writable
        self.lock = threading.RLock()
        self.travelling: weakref.WeakSet[Travelling] = weakref.WeakSet()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="engram-fetch")
        self.side, self.sends = SideStream(self.device), self.device.type == "cuda"

    @property
    def resident(self) -> int:
        """Bytes of RAM that the store takes."""
        return self.store.resident

    def fetch(self, ids: Tensor, *, encoded: bool = False) -> Tensor:
        """Rows [..., d] of ids [...], or their bytes."""
        flat = self.check(ids.cpu())
        if self.store.in_memory:
            rows = self.read(flat.numpy(), encoded=encoded)
        else:
            unique, inverse = deduplicate(flat)
            rows = self.read(unique.numpy(), encoded=encoded).index_select(0, inverse)
        return self.deliver(rows).take().view(*ids.shape, rows.shape[1])

    def prefetch(self, ids: Tensor, *, encoded: bool = False) -> Fetch:
        """Start reading on another thread, and copying to the device on another stream.

        For the few rows of a decoding step the system is asked to read ahead instead: waking a thread would take longer.
        """
        if not self.sends and (self.store.in_memory or (ids.numel() <= FEW and not self.asynchronous)):
            later = super().prefetch(ids, encoded=encoded)
            self.store.advise(ids.reshape(-1).cpu().numpy())
            return later
        return Travelling(self, ids, encoded=encoded)

    def update(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Row-wise Adagrad on distinct ids, where the records are held."""
        self._alterable()
        numbers = self.check(ids.cpu()).numpy()
        gradients = grads.detach().to("cpu", torch.float32).contiguous().numpy()
        with self.lock:
            held = self.store.hold(numbers)
            codec.update_rows(self.form, held.records, held.slots, numbers, gradients, lr, self.clock)
            self._changed(numbers, held)
            self.clock += 1

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Set rows."""
        self._alterable()
        numbers = self.check(ids.cpu()).numpy()
        encoded = codec.encode(self.form, rows.detach().to("cpu", torch.float32).contiguous().numpy())
        with self.lock:
            held = self.store.hold(numbers)
            held.records[held.slots, : self.form.row_bytes] = encoded
            self._changed(numbers, held)

    def begin(self, *, again: bool = False) -> None:
        """Start from what the store was opened with. Raises MismatchError when that holds another run's updates."""
        with self.lock:
            self.clock = self.store.begin(self.clock, again=again)
            self._all_stale()

    def save(self, directory: Path) -> None:
        """Commit the store under the present clock; if it stays in place, leave word where."""
        with self.lock:
            self.store.save(directory, self.clock, self.digest)
        if self.place:
            there = os.path.relpath(self.place.absolute(), directory.absolute())
            (directory / "table.txt").write_text(there, encoding="utf-8")

    def load(self, directory: Path, clock: int) -> None:
        """Roll the store back to that commit."""
        with self.lock:
            self.store.load(directory, clock, self.digest)
            self.clock = clock
            self._all_stale()

    def settle(self, clock: int) -> None:
        """Let the store drop what only earlier commits need."""
        with self.lock:
            self.store.settle(clock)

    def close(self) -> None:
        """Wait for reads under way and release the store."""
        self.worker.shutdown()
        self.store.close()

    def restore(self, ids: Tensor, records: Tensor) -> None:
        """Set records."""
        self._alterable()
        numbers = self.check(ids.cpu()).numpy()
        with self.lock:
            held = self.store.hold(numbers)
            held.records[held.slots] = records.cpu().numpy()
            self._changed(numbers, held)

    def read(self, ids: np.ndarray, *, encoded: bool = False) -> Tensor:
        """Rows [U, d] of ids [U] in RAM; pinned where they go on to a GPU."""
        with self.lock:
            return self.gather(self.store.hold(ids), ids, encoded=encoded)

    def gather(self, held: Held, ids: np.ndarray, *, encoded: bool = False) -> Tensor:
        """Rows of held records."""
        if encoded:
            return codec.read_bytes(self.form, held.records, held.slots)
        rows = torch.empty(len(ids), self.dim, pin_memory=self.sends)
        codec.read_rows(self.form, held.records, held.slots, ids, rows.numpy())
        return rows

    def deliver(self, rows: Tensor) -> Handed[Tensor]:
        """Rows on the device; on a GPU a copy on a stream of its own."""
        with self.side.current():
            return Handed(rows.to(self.device, non_blocking=True))

    def _changed(self, ids: np.ndarray, held: Held) -> None:
        self.store.changed(ids, held)
        for fetch in self.travelling:
            fetch.stale.append(ids)

    def _all_stale(self) -> None:
        for fetch in self.travelling:
            fetch.stale.append(fetch.ids)


class Travelling(Fetch):
    """Rows [..., d] that are being read on the table's own thread.

    What is read ahead are the records that were not in memory. On a CPU they are decoded when the rows are taken, from
    wherever the newest version is by then. For a GPU (and if asynchronous) rows are decoded and sent ahead as well.
    """

    def __init__(self, table: StoredTable, ids: Tensor, *, encoded: bool = False) -> None:
        self.table, self.shape, self.encoded = table, ids.shape, encoded
        self.early = table.sends or table.asynchronous
        flat = table.check(ids.cpu())
        self.inverse: Tensor | None = None  # of ids that are distinct and ascending already, as those of a batch are
        if not bool((flat[1:] > flat[:-1]).all()):
            flat, self.inverse = deduplicate(flat)
        self.ids = flat.numpy()
        self.stale: list[np.ndarray] = []  # ids that were updated since they were read
        with table.lock:
            table.travelling.add(self)
        self.staged: Future[Staged | Handed[Tensor]] = table.worker.submit(self._ahead)

    def _ahead(self) -> Staged | Handed[Tensor]:
        staged = self.table.store.stage(self.ids)
        if not self.early:
            return staged
        with self.table.lock:
            rows = self._decode(staged)
            self.stale.clear()
        return self.table.deliver(rows)

    def rows(self) -> Tensor:
        """Wait, and read again what was updated meanwhile."""
        table, ahead = self.table, self.staged.result()
        with table.lock:
            table.travelling.discard(self)
            rows = ahead.take() if isinstance(ahead, Handed) else self._decode(ahead)
            if self.early and self.stale and not table.asynchronous:
                again = np.flatnonzero(np.isin(self.ids, self._updated(), assume_unique=True))
                there = torch.from_numpy(again).to(rows.device)
                newer = table.deliver(table.read(self.ids[again], encoded=self.encoded)).take()
                rows.index_copy_(0, there, newer)
        if self.inverse is not None:
            rows = rows.index_select(0, self.inverse.to(rows.device))
        return rows.view(*self.shape, rows.shape[1])

    def _decode(self, staged: Staged) -> Tensor:
        """Rows [U, d] as they are now."""
        held = self.table.store.hold(self.ids, staged.without(self._updated()))
        return self.table.gather(held, self.ids, encoded=self.encoded)

    def _updated(self) -> np.ndarray:
        return np.sort(np.concatenate(self.stale)) if self.stale else np.empty(0, np.int64)
