"""Rows out of records and into them: by the compiled kernels, or by the truth where those are off. The same bits either way.

First for arrays, which are on the CPU; then for tensors, on any device, with indices [U] contiguous. On a GPU none of
these waits, so none raises for a slot outside of the records: it reads as a row of NaN, and nothing is written there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import compiled, on_gpu
from . import rows as truth
from .dedup import deduplicate
from .expand import add_up
from .rows import RowFormat


def read_rows(form: RowFormat, records: np.ndarray, slots: np.ndarray, ids: np.ndarray, out: np.ndarray) -> None:
    """Rows [U, dim] float32 into `out`. records: uint8 [S, stride]; slots: [U] where the rows are; ids: [U] who they are."""
    if compiled():
        from ..kernels.rows import read_rows as fast

        fast(form, records, slots, ids + form.first if form.first else ids, out)
    else:
        out[:] = truth.read_rows(form, *map(torch.from_numpy, (records, slots, ids))).numpy()


def read_bytes(form: RowFormat, records: np.ndarray, slots: np.ndarray) -> Tensor:
    """Rows [U, wire] as they are kept, uint8: `decode` makes rows of them, here or in another process."""
    return torch.from_numpy(gather(records[:, : form.wire], slots))


def decode(form: RowFormat, data: Tensor, ids: Tensor) -> Tensor:
    """Rows [U, dim] float32 of their bytes [U, wire] on any device. ids: [U] who they are."""
    if form.encoding == "fp32" and not form.std:
        return data.view(torch.float32)
    if data.device.type == "cpu" and not on_gpu(data.device):
        return torch.from_numpy(decoded(form, ids.numpy(), data.numpy()))
    return read(form, data, torch.arange(len(ids), device=data.device), ids)


def decoded(form: RowFormat, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Rows [n, dim] float32 of records [n, stride], or of their bytes [n, wire]."""
    rows = np.empty((len(ids), form.dim), np.float32)
    read_rows(form, records, np.arange(len(ids)), ids, rows)
    return rows


def gather(records: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """records[slots], uint8 [U, n]."""
    if not compiled():
        return records[slots]
    from ..kernels.rows import gather as fast

    out = np.empty((len(slots), records.shape[1]), np.uint8)
    fast(records, slots, out)
    return out


def encode(form: RowFormat, rows: np.ndarray) -> np.ndarray:
    """Bytes [U, row_bytes] uint8 of float32 rows [U, dim], rounded to the nearest."""
    if not compiled():
        return truth.encode(form, torch.from_numpy(rows)).numpy()
    from ..kernels.rows import encode as fast

    data = np.empty((len(rows), form.row_bytes), np.uint8)
    fast(form, rows, data)
    return data


def update_rows(
    form: RowFormat, records: np.ndarray, slots: np.ndarray, ids: np.ndarray, grads: np.ndarray, lr: float, clock: int
) -> None:
    """Row-wise Adagrad on distinct rows of trainable records, in place; see rows.update_rows."""
    if compiled():
        from ..kernels.rows import update_rows as fast

        fast(form, records, slots, ids + form.first if form.first else ids, grads, lr, clock)
    else:
        held, where, who, gradients = map(torch.from_numpy, (records, slots, ids, grads))
        truth.update_rows(form, held, where, who, gradients, lr, clock)


# --- tensors --------------------------------------------------------------------------------------------------------


class Copies(NamedTuple):
    """Copies of some records in nearer memory, direct-mapped: that of slot i has its place at i mod C, or is not there."""

    owners: Tensor  # [C] int64: the slot of each copy, -1 for none
    records: Tensor  # uint8 [C, n]

    def places(self, slots: Tensor) -> Tensor:
        """[U] int64, -1 for slots [U] without a copy."""
        places = slots % len(self.owners)
        return torch.where((self.owners[places] == slots) & (slots >= 0), places, -1)


def take(records: Tensor, slots: Tensor, copies: Copies | None = None) -> Tensor:
    """records[slots], uint8 [U, n]; bytes of 255 for slots outside. records: where slots are, or in pinned RAM.

    Of records that have a copy it is the copy that is read.
    """
    if on_gpu(slots.device):
        from ..kernels.gpu.rows import gather as fast

        out = torch.empty(len(slots), records.shape[1], dtype=torch.uint8, device=slots.device)
        fast(records, slots, out, copies)
        return out
    if copies is not None:
        places = copies.places(slots)
        far = take(records, slots.where(places < 0, -1))
        return torch.where((places < 0)[:, None], far, take(copies.records, places))
    inside = (slots >= 0) & (slots < len(records))
    return records.index_select(0, slots.where(inside, 0)).masked_fill_(~inside[:, None], 255)


def put(records: Tensor, slots: Tensor, source: Tensor) -> None:
    """records[slots] = source [U, n] for distinct slots; slots outside are passed over."""
    if not on_gpu(slots.device):
        inside = (slots >= 0) & (slots < len(records))
        records[slots[inside]] = source[inside]
        return
    from ..kernels.gpu.rows import scatter as fast

    fast(records, slots, source.contiguous())


def read(form: RowFormat, records: Tensor, slots: Tensor, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [U, dim], as float32 or rounded to a narrower `dtype`; see rows.read_rows."""
    if not on_gpu(slots.device):
        return truth.read_rows(form, records, slots, ids).to(dtype)
    from ..kernels.gpu.rows import read_rows as fast

    out = torch.empty(len(slots), form.dim, dtype=dtype, device=slots.device)
    fast(form, records, slots, ids, out)
    return out


def encoded(form: RowFormat, rows: Tensor) -> Tensor:
    """Bytes [U, row_bytes] uint8 of float32 rows [U, dim], rounded to the nearest."""
    if not on_gpu(rows.device):
        return truth.encode(form, rows)
    from ..kernels.gpu.rows import encode as fast

    out = torch.empty(len(rows), form.row_bytes, dtype=torch.uint8, device=rows.device)
    fast(form, rows.contiguous(), out)
    return out


def update(form: RowFormat, records: Tensor, slots: Tensor, ids: Tensor, grads: Tensor, lr: float, clock: int) -> None:
    """Row-wise Adagrad on distinct rows, in place; see rows.update_rows."""
    if not form.trainable or not on_gpu(slots.device):
        truth.update_rows(form, records, slots, ids, grads.float(), lr, clock)  # refuses rows that are only read
        return
    from ..kernels.gpu.rows import update_rows as fast

    fast(form, records, slots, ids, grads.contiguous(), lr, clock)


def update_reads(
    form: RowFormat, records: Tensor, slots: Tensor, ids: Tensor, grads: Tensor, lr: float, clock: int
) -> None:
    """The same from gradients [N, dim] of reads, in float32, bfloat16 or float16: those of equal slots [N] are summed."""
    if not form.trainable or not on_gpu(slots.device):
        distinct, inverse = deduplicate(slots)
        owners = torch.empty_like(distinct).scatter_(0, inverse, ids)
        truth.update_rows(form, records, distinct, owners, add_up(grads, inverse, len(distinct)), lr, clock)
        return
    from ..kernels.gpu.rows import update_rows as fast
    from ..kernels.gpu.sums import reads_of_distinct

    if not len(slots):
        return
    reads = reads_of_distinct(slots)
    one = reads.order[reads.starts[:-1].clamp(max=len(slots) - 1)]  # read of each row
    fast(form, records, slots[one], ids[one], grads.contiguous(), lr, clock, reads)
