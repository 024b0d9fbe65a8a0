"""The plainest tier: all records in one tensor of the device that computes.

On a CPU they are read and updated by plain torch: the slow truth of every other tier. On a GPU it is the fast one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import codec
from .base import Fetch, Later, Table
from .rows import RowFormat
from .saved import load_records, save_records


class DeviceTable(Table):
    """Records in the memory of `device`."""

    by_device = True

    def __init__(self, num_rows: int, form: RowFormat, device: torch.device | str = "cpu") -> None:
        super().__init__(num_rows, form, device)
        self.records = torch.zeros(num_rows, form.stride, dtype=torch.uint8, device=device)

    @property
    def rows(self) -> Tensor:
        """The rows [num_rows, d] of an fp32 table as a view, to be looked at or set by hand."""
        return self.records.view(torch.float32)[:, : self.dim]

    def fetch(self, ids: Tensor, *, encoded: bool = False) -> Tensor:
        """Rows [..., d] of ids [...], or their bytes."""
        if encoded:
            flat = self.check(ids.to(self.device))
            return codec.take(self.records[:, : self.form.wire], flat).view(*ids.shape, self.form.wire)
        return self._read(ids, torch.float32)

    def prefetch(self, ids: Tensor, *, encoded: bool = False) -> Fetch:
        """They are at hand."""
        self.check(ids)
        return Later(lambda: self.fetch(ids, encoded=encoded), lambda dtype: self._read(ids, dtype))

    def _read(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        flat = self.check(ids.to(self.device))
        return codec.read(self.form, self.records, flat, flat, dtype).view(*ids.shape, self.dim)

    def update(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Row-wise Adagrad on distinct ids."""
        ids = self.check(ids.to(self.device))
        codec.update(self.form, self.records, ids, ids, grads.to(self.device), lr, self.clock)
        self.clock += 1

    def update_reads(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Row-wise Adagrad on the rows of all reads; on a GPU their gradients are summed within the update."""
        ids = self.check(ids.to(self.device))
        grads = grads.to(self.device).reshape(-1, self.dim)
        codec.update_reads(self.form, self.records, ids, ids, grads, lr, self.clock)
        self.clock += 1

    def restore(self, ids: Tensor, records: Tensor) -> None:
        """Set records."""
        codec.put(self.records, self.check(ids.to(self.device)), records.to(self.device))

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Set rows."""
        ids = self.check(ids.to(self.device))
        data = codec.encoded(self.form, rows.to(self.device, torch.float32))
        codec.put(self.records[:, : self.form.row_bytes], ids, data)

    def settled(self) -> Tensor:
        """All records [num_rows, stride], after every update."""
        return self.records

    def save(self, directory: Path) -> None:
        """Write directory/table.safetensors."""
        save_records(directory / "table.safetensors", self.records.cpu().numpy(), self.form, self.digest)

    def load(self, directory: Path, clock: int) -> None:
        """Read it."""
        records = torch.empty(self.records.shape, dtype=torch.uint8)
        load_records(directory / "table.safetensors", records.numpy(), self.form, self.digest)
        self.records.copy_(records)
        self.clock = clock
