"""Records in pinned host RAM, read and written by a GPU over the bus: a table larger than the device, and hardly slower.

    prefetch   records -> device, on a side stream                 under the blocks before the first memory, or the step before
    rows       decoded from that copy when they are taken
    update     of that copy, by the device                         rows that are on their way for the next step are renewed
    write-back copy -> records, on the side stream                 under the next step

The side stream keeps its order, so a read that follows a write-back sees it, and one that went before is renewed from the
device: rows are exact, and nobody waits for the bus unless it is too slow. On a CPU the same happens at once.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from . import codec
from .base import Fetch, Table
from .host import huge_pages
from .rows import RowFormat
from .saved import load_records, save_records
from .streams import Handed, SideStream

PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class PinnedTable(Table):
    """`num_rows` rows in pinned RAM, delivered to `device`. Raises ConfigError when the system cannot pin that much memory."""

    by_device = True
    hot: codec.Copies | None = None

    def __init__(self, num_rows: int, form: RowFormat, device: torch.device | str = "cpu") -> None:
        super().__init__(num_rows, form, device)
        self.records = pin(huge_pages(num_rows * form.stride), self.device).view(num_rows, form.stride)
        self.side = SideStream(self.device)
        self.lock = threading.RLock()  # batches are prepared on another thread
        self.travelling: weakref.WeakSet[Arriving] = weakref.WeakSet()
        self.taken: Arriving | None = None  # the last one, if no row was altered since

    def keep(self, rows: np.ndarray, memory: int) -> None:
        """From now on have copies of the hottest rows in `memory` bytes on the device; of several with one place the hottest.

        rows: their numbers, hottest first. Raises ConfigError for rows that the table does not have.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise ConfigError(
                f"hot rows run from {rows.min()} to {rows.max()}, but the table has rows 0 to {self.num_rows - 1}: they were "
                "counted for another one."
            )
        owners = np.full(max(memory // (self.form.stride + 8), 1), -1)
        owners[rows[::-1] % len(owners)] = rows[::-1]  # the last one stays
        with self.lock:
            self.side.synchronize()
            records = torch.empty(len(owners), self.form.stride, dtype=torch.uint8, device=self.device)
            self.hot = codec.Copies(torch.from_numpy(owners).to(self.device), records)
            self._copy_hot()

    def fetch(self, ids: Tensor, *, encoded: bool = False) -> Tensor:
        """Rows [..., d] of ids [...], or their bytes."""
        return self.prefetch(ids, encoded=encoded).rows()

    def prefetch(self, ids: Tensor, *, encoded: bool = False) -> Arriving:
        """Start reading on the side stream, once the present one has made the ids."""
        return Arriving(self, ids, encoded=encoded)

    def update(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Row-wise Adagrad on distinct ids: where they are those of the last fetch, on the records that it has brought."""
        self._alterable()
        with self.lock:
            taken = self.taken if self.taken is not None and self.taken.asked is ids else None
            numbers = self.check(ids.to(self.device))
            records = self.read(numbers).take() if taken is None else taken.records
            slots = torch.arange(len(numbers), device=self.device)
            codec.update(self.form, records, slots, numbers, grads.to(self.device), lr, self.clock)
            self._replace(numbers, records)
            self.clock += 1

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Set rows."""
        self._alterable()
        with self.lock:
            numbers = self.check(ids.to(self.device))
            records = self.read(numbers).take()
            records[:, : self.form.row_bytes] = codec.encoded(self.form, rows.to(self.device, torch.float32))
            self._replace(numbers, records)

    def restore(self, ids: Tensor, records: Tensor) -> None:
        """Set records."""
        self._alterable()
        with self.lock:
            self._replace(self.check(ids.to(self.device)), records.to(self.device, copy=True))

    def settled(self) -> Tensor:
        """All records [num_rows, stride] in RAM, after every write-back."""
        with self.lock:
            self.side.synchronize()
        return self.records

    def save(self, directory: Path) -> None:
        """Write directory/table.safetensors."""
        save_records(directory / "table.safetensors", self.settled().numpy(), self.form, self.digest)

    def load(self, directory: Path, clock: int) -> None:
        """Read it."""
        with self.lock:
            self.side.synchronize()
            load_records(directory / "table.safetensors", self.records.numpy(), self.form, self.digest)
            self.clock, self.taken = clock, None
            self._copy_hot()
            for fetch in self.travelling:
                fetch.start()

    def close(self) -> None:
        """Wait for what is under way."""
        self.side.synchronize()

    def read(self, ids: Tensor) -> Handed[Tensor]:
        """Records [U, stride] of ids [U] on the device."""
        return self.side.run(self._take, ids)

    def _take(self, ids: Tensor) -> Tensor:
        return codec.take(self.records, ids, self.hot)

    def _put(self, ids: Tensor, records: Tensor) -> Tensor:
        codec.put(self.records, ids, records)
        if self.hot:
            codec.put(self.hot.records, self.hot.places(ids), records)
        return records

    def _copy_hot(self) -> None:
        """Copy all records anew that have a place on the device: on the side stream, as whoever reads them."""
        if self.hot:
            copies = self.hot
            self.side.run(
                lambda owners: copies.records.copy_(codec.take(self.records, owners.clamp(min=0))), copies.owners
            )

    def _replace(self, ids: Tensor, records: Tensor) -> None:
        """Write records [U, stride] of distinct ids [U] back, and renew them where they are on their way. Both stay as they are."""
        self.taken = None
        for fetch in self.travelling:
            fetch.newer.append(Handed((ids, records)))
        self.side.run(self._put, ids, records)


class Arriving(Fetch):
    """Rows [..., d] whose records are on their way to the device."""

    def __init__(self, table: PinnedTable, ids: Tensor, *, encoded: bool = False) -> None:
        self.table, self.asked, self.encoded = table, ids, encoded
        self.ids = table.check(ids.to(table.device))
        with table.lock:
            table.travelling.add(self)
            self.start()

    def start(self) -> None:
        """Read the records as they are after everything that was done so far."""
        self.newer: list[Handed[tuple[Tensor, ...]]] = []  # ids and records that were altered since
        self.coming = self.table.read(self.ids)

    def rows(self) -> Tensor:
        """Have the present stream wait for them, and renew what was altered meanwhile."""
        self._arrive()
        if self.encoded:
            form = self.table.form
            return self.records[:, : form.wire].reshape(*self.asked.shape, form.wire)
        return self._decode(torch.float32)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The same, decoded into a narrower type."""
        self._arrive()
        return self._decode(dtype)

    def _arrive(self) -> None:
        table = self.table
        with table.lock:
            table.travelling.discard(self)
            self.records = self.coming.take()
            for newer in self.newer:
                self.records = renewed(self.ids, self.records, *newer.take())
            table.taken = self

    def _decode(self, dtype: torch.dtype) -> Tensor:
        slots = torch.arange(len(self.ids), device=self.table.device)
        rows = codec.read(self.table.form, self.records, slots, self.ids, dtype)
        return rows.view(*self.asked.shape, self.table.dim)


def renewed(ids: Tensor, records: Tensor, changed: Tensor, newer: Tensor) -> Tensor:
    """records [U, stride] of ids [U], those of the distinct `changed` [V] replaced by `newer` [V, stride]; on the device alone."""
    if not len(changed):
        return records
    ascending, order = changed.sort()
    place = torch.searchsorted(ascending, ids).clamp_(max=len(changed) - 1)
    same = ascending[place] == ids
    return torch.where(same[:, None], newer.index_select(0, order[place]), records)


def pin(memory: np.ndarray, device: torch.device) -> Tensor:
    """The same bytes as a tensor that a GPU can address, for as long as it lives; on a CPU it can anyway."""
    tensor = torch.from_numpy(memory)
    if device.type == "cuda":
        address, runtime = tensor.data_ptr(), torch.cuda.cudart()
        if error := int(runtime.cudaHostRegister(address, tensor.nbytes, PORTABLE_AND_MAPPED)):
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)  # CUDA tells its last error once more, to whoever is next
            raise ConfigError(
                f"{tensor.nbytes / 1e9:.1f} GB of RAM cannot be pinned (CUDA error {error}): the GPU could not read the table. "
                "Take fewer rows, or tier disk."
            )
        weakref.finalize(memory, runtime.cudaHostUnregister, address)
    return tensor
