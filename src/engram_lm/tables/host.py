"""Records in host RAM, in transparent huge pages where the system has them.

A random row of a large table costs a miss in the TLB as well as in the caches; with pages of 2 MiB the TLB reaches 512 times as
far. Pages that were never touched take no memory.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import numpy as np
import torch

from .rows import RowFormat
from .saved import load_records, save_records
from .store import Held, Staged, Store
from .stored import StoredTable


class MemoryStore(Store):
    """All records in RAM, zeroed: rows that were never written."""

    in_memory = True

    def __init__(self, num_rows: int, form: RowFormat) -> None:
        self.num_rows, self.form = num_rows, form
        self.records = huge_pages(num_rows * form.stride).reshape(num_rows, form.stride)

    @property
    def resident(self) -> int:
        """Bytes of all records."""
        return self.nbytes

    def hold(self, ids: np.ndarray, staged: Staged | None = None) -> Held:
        """They are where they are."""
        return Held(self.records, ids)

    def changed(self, ids: np.ndarray, held: Held) -> None:
        """Take over what was altered in a copy, such as a cache's."""
        if held.records is not self.records:
            self.records[ids] = held.records[held.slots]

    def save(self, directory: Path, clock: int, digest: str) -> None:
        """Write directory/table.safetensors."""
        save_records(directory / "table.safetensors", self.records, self.form, digest)

    def load(self, directory: Path, clock: int, digest: str) -> None:
        """Read it."""
        load_records(directory / "table.safetensors", self.records, self.form, digest)


class HostTable(StoredTable):
    """`num_rows` rows in host RAM, delivered to `device`."""

    def __init__(
        self, num_rows: int, form: RowFormat, device: torch.device | str = "cpu", *, asynchronous: bool = False
    ) -> None:
        super().__init__(MemoryStore(num_rows, form), device, asynchronous=asynchronous)


def huge_pages(nbytes: int) -> np.ndarray:
    """Zeroed bytes [nbytes], in huge pages where the system gives them on request."""
    block = mmap.mmap(
        -1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared memory gets no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8, nbytes)
