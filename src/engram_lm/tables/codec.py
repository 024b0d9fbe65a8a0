"""Rows out of records and into them: by the compiled kernels, or by the truth where those are off. The same bits either way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels import compiled
from . import rows as truth
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
    if data.device.type != "cpu":
        return truth.read_rows(form, data, torch.arange(len(ids), device=data.device), ids)
    return torch.from_numpy(decoded(form, ids.numpy(), data.numpy()))


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
