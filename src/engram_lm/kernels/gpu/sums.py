# mypy: allow-untyped-defs, allow-incomplete-defs
"""The sum of gradients that fell on the same row, without atomics: reads are sorted by row, a program takes some rows.

The reads of a row are added in their order. But the row of a frequent n-gram may have most reads of a batch, and one
program would take them one after another. So the sorted reads are cut into chunks of CHUNK, and those that lie wholly
in one row are summed beforehand, each by a program of its own. A row is then the sum of what precedes its chunks, of the
chunks, and of what follows. The order depends on the reads alone, so results are the same bits from run to run; where a
row has a whole chunk it is another order than on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # about the root of the most reads that a row has, which makes the longest chain of additions short
AHEAD = tl.constexpr(8)  # reads that are loaded before the first of them is added
NUMBERS = 256  # a warp's


class Reads(NamedTuple):
    """N reads sorted by row: those of row u are order[starts[u] : starts[u + 1]]."""

    order: Tensor  # [N] int64; a row's reads keep theirs
    rows: Tensor  # [N] int64, ascending: the row of each
    starts: Tensor  # [U + 1] int64


def reads_of(inverse: Tensor, count: int) -> Reads:
    """The reads of rows 0 to count - 1. inverse: int64 [N], the row of each read; those of other rows are in none."""
    rows, order = torch.sort(inverse, stable=True)
    return Reads(order, rows, torch.searchsorted(rows, torch.arange(count + 1, device=rows.device)))


def reads_of_distinct(ids: Tensor) -> Reads:
    """The reads of each distinct id of int64 [N], N > 0, in ascending order.

    How many there are is known to the device alone, so there are N rows, of which the last have no reads.
    """
    ascending, order = torch.sort(ids, stable=True)
    rows = F.pad((ascending[1:] != ascending[:-1]).cumsum(0), (1, 0))
    return Reads(order, rows, torch.searchsorted(rows, torch.arange(len(ids) + 1, device=ids.device)))


def sum_rows(grads: Tensor, inverse: Tensor, out: Tensor) -> None:
    """out [U, d] float32 = for each row, the sum of those grads [N, d] whose inverse [N] names it.

    grads: float32, bfloat16 or float16, added up in float32; inverse: int64, those outside of 0 .. U-1 are ignored. All
    are contiguous.
    """
    (count, dim), reads = out.shape, reads_of(inverse, len(out))
    rows, width = tile(dim)
    _sum_rows[(triton.cdiv(count, rows),)](
        grads, reads.order, reads.starts, chunk_sums(grads, reads), out, count, CHUNK, dim, rows, width,
        num_warps=warps(rows, width), enable_fp_fusion=False,
    )  # fmt: skip


def chunk_sums(grads: Tensor, reads: Reads) -> Tensor:
    """[N // CHUNK, d] float32: the sums of whole chunks of reads of one row; of others nothing sensible."""
    chunks, dim = len(reads.order) // CHUNK, grads.shape[1]
    sums = torch.empty(chunks, dim, device=grads.device)
    width = triton.next_power_of_2(dim)
    if chunks:
        _sum_chunks[(chunks,)](
            grads, reads.order, reads.rows, sums, CHUNK, dim, width, num_warps=warps(1, width), enable_fp_fusion=False
        )
    return sums


def tile(dim: int, numbers: int = NUMBERS, least: int = 1) -> tuple[int, int]:
    """Rows and columns of a program that is to have so many numbers; of columns a power of two, `least` or more."""
    width = max(least, triton.next_power_of_2(dim))
    return max(1, numbers // width), width


def warps(rows: int, width: int) -> int:
    """A warp has NUMBERS numbers."""
    return max(1, rows * width // NUMBERS)


@triton.jit
def _sum_rows(
    grads, order, starts, chunks, out, count,
    CHUNK: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    first = tl.load(starts + row, mask=row < count, other=0)
    end = tl.load(starts + row + 1, mask=row < count, other=0)
    total = sum_reads(grads, order, chunks, first, end, CHUNK, DIM, ROWS, WIDTH)
    tl.store(out + row[:, None] * DIM + column, total, mask=(row < count)[:, None] & (column < DIM))


@triton.jit
def _sum_chunks(grads, order, rows, sums, CHUNK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK + tl.zeros((1,), tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    if tl.load(rows + chunk * CHUNK) == tl.load(rows + chunk * CHUNK + CHUNK - 1):
        total = _add(tl.zeros((1, WIDTH), tl.float32), grads, order, first, first + CHUNK, DIM, WIDTH)
        tl.store(sums + chunk * DIM + column, total, mask=column < DIM)


@triton.jit
def sum_reads(
    grads, order, chunks, first, end, CHUNK: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """[ROWS, WIDTH] float32: the sums of grads[order[first : end]] for first, end int64 [ROWS], zero beyond DIM."""
    first_chunk = (first + CHUNK - 1) // CHUNK
    end_chunk = tl.maximum(end // CHUNK, first_chunk)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    total = _add(total, grads, order, first, tl.minimum(first_chunk * CHUNK, end), DIM, WIDTH)
    total = _add(total, chunks, None, first_chunk, end_chunk, DIM, WIDTH)
    return _add(total, grads, order, end_chunk * CHUNK, end, DIM, WIDTH)


@triton.jit
def _add(total, source, order, first, end, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """total [ROWS, WIDTH] + source[order[first]] + ... + source[order[end - 1]], one after another."""
    column = tl.arange(0, WIDTH)[None, :]
    for start in range(0, tl.max(end - first), AHEAD):
        for step in tl.static_range(AHEAD):
            place = first + start + step
            more = place < end
            item = place
            if order is not None:
                item = tl.load(order + place, mask=more, other=0)
            added = tl.load(source + item[:, None] * DIM + column, mask=more[:, None] & (column < DIM), other=0.0)
            total += added.to(tl.float32)
    return total
