# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows in Triton: the same bits as tables/rows.py, which says what they mean.

A program takes a tile [ROWS, WIDTH] of some rows and their columns. Rows begin at multiples of 4 bytes, so a thread
reads and writes 4 bytes at a time and a warp 128 side by side. A slot outside of the records is none: it reads as bytes
of 255, which in every encoding are NaN, and nothing is written there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sums import CHUNK, Reads, chunk_sums, sum_reads, tile, warps

FP32, BF16, FP8, INT8 = (tl.constexpr(code) for code in range(4))
CODE = {"fp32": FP32.value, "bf16": BF16.value, "fp8_e8m0": FP8.value, "int8": INT8.value}
BLOCK = tl.constexpr(32)
INFINITY, MANTISSA = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFF)
LINE = tl.constexpr(32)  # words that cross the bus as one
ON_BUS = 128  # programs that keep it busy, each with some KB on their way; more would only keep others off the device
MANY = 2048  # numbers or words of a program that only moves them, for enough to be on their way


def gather(records: Tensor, slots: Tensor, out: Tensor, copies: Any = None) -> None:
    """out[i] = records[slots[i]]. records: uint8 [S, n]; slots: int64 [U]; out: uint8 [U, n], contiguous.

    As everywhere here, n is a multiple of 4 and a row's bytes lie side by side; rows of `records` may be strided, and in
    pinned host memory. copies: of some records in device memory, which are read in their stead; see codec.Copies.
    """
    _move(records, slots, out, copies, inward=False)


def scatter(records: Tensor, slots: Tensor, source: Tensor) -> None:
    """records[slots[i]] = source[i] for distinct slots. source: uint8 [U, n], contiguous."""
    _move(records, slots, source, None, inward=True)


def read_rows(form: Any, records: Tensor, slots: Tensor, ids: Tensor, out: Tensor) -> None:
    """Rows into out [U, dim], contiguous: float32, or rounded to the nearest bfloat16 or float16.

    form: RowFormat; records: uint8 [S, stride] or [S, wire]; slots, ids: int64 [U], where rows are and, counted from
    form.first, who they are. Records in host memory cross the bus once.
    """
    if _over_bus(records, out):
        near = torch.empty(len(slots), records.shape[1], dtype=torch.uint8, device=out.device)
        gather(records, slots, near)
        records, slots = near, torch.arange(len(slots), device=out.device)
    words = records.view(torch.int32)
    rows, width = _tile(form, MANY)
    _read_rows[(triton.cdiv(len(slots), rows),)](
        words, words.stride(0), len(words), slots, ids, len(slots), _key(form, -1), form.unit, out,
        CODE[form.encoding], form.dim, form.std > 0, words.shape[1], rows, width,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def update_rows(
    form: Any,
    records: Tensor,
    slots: Tensor,
    ids: Tensor,
    grads: Tensor,
    lr: float,
    clock: int,
    reads: Reads | None = None,
) -> None:
    """Row-wise Adagrad in place on trainable records [S, stride] of distinct slots.

    grads: [U, dim] float32, bfloat16 or float16, contiguous. With `reads` it is [N, dim], the gradients of all reads,
    which are summed by row; see sums.py for the order. A row without reads keeps its bytes; its slot may recur.
    """
    words = records.view(torch.int32)
    rows, width = _tile(form)
    summing = (None, None, None) if reads is None else (reads.order, reads.starts, chunk_sums(grads, reads))
    _update_rows[(triton.cdiv(len(slots), rows),)](
        words, words.stride(0), len(words), slots, ids, len(slots), _key(form, -1), form.unit,
        grads, *summing, _key(form, clock), lr,
        CHUNK, CODE[form.encoding], form.dim, form.std > 0, words.shape[1], rows, width,
        num_warps=warps(rows, width), enable_fp_fusion=False,
    )  # fmt: skip


def encode(form: Any, rows: Tensor, out: Tensor) -> None:
    """Bytes of rows [U, dim] float32 into out [U, row_bytes] uint8, both contiguous, to nearest."""
    count, width = _tile(form)
    _encode_rows[(triton.cdiv(len(rows), count),)](
        rows, len(rows), out.view(torch.int32), CODE[form.encoding], form.dim, form.row_bytes, count, width,
        num_warps=warps(count, width), enable_fp_fusion=False,
    )  # fmt: skip


def _tile(form: Any, numbers: int = 256) -> tuple[int, int]:
    """Rows and columns of a program; as many columns as are needed to write whole words."""
    return tile(form.dim, numbers, least=4)


def _key(form: Any, clock: int) -> int:
    """What is mixed with an id, as an int64; see rows.noise."""
    key = _mixed(_mixed(form.seed) + clock) + form.first
    return (key + 2**63) % 2**64 - 2**63


def _mixed(x: int) -> int:
    """splitmix64 modulo 2^64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


# --- moving bytes ---------------------------------------------------------------------------------------------------


def _move(records: Tensor, slots: Tensor, rows: Tensor, copies: Any, *, inward: bool) -> None:
    words, count = records.view(torch.int32), len(slots)
    size = words.shape[1]
    wide = triton.next_power_of_2(size + LINE.value - 1)
    tall = max(1, MANY // wide)
    programs = triton.cdiv(count, tall)
    if _over_bus(records, rows):
        programs = min(programs, ON_BUS)
    owners, near = (None, None) if copies is None else (copies.owners, copies.records.view(torch.int32))
    _move_rows[(programs,)](
        words, words.data_ptr() // 4 % LINE.value, words.stride(0), len(words), slots, rows.view(torch.int32), count,
        owners, near, 1 if owners is None else len(owners),
        inward, size, tall, wide, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _over_bus(records: Tensor, rows: Tensor) -> bool:
    return records.device != rows.device


@triton.jit(do_not_specialize=["base"])
def _move_rows(
    records, base, pitch, size, slots, rows, count, owners, copies, places,
    INWARD: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A warp's 32 words are a line of the records' memory, not of the row; they begin `base` words into a line, copies with one."""
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        slot = tl.load(slots + row, mask=row < count, other=-1)
        there = (slot >= 0) & (slot < size)
        slot = tl.where(there, slot, 0)
        source, line = records + slot * pitch, (slot * pitch + base) % LINE
        if owners is not None:
            place = slot % places
            near = tl.load(owners + place) == slot
            source = tl.where(near, copies + place * WORDS, source)
            line = tl.where(near, place * WORDS % LINE, line)
        word = tl.arange(0, WIDTH)[None, :] - line[:, None]
        inside = (word >= 0) & (word < WORDS)
        outer, inner = source[:, None] + word, rows + row[:, None] * WORDS + word
        if INWARD:
            mask = inside & there[:, None]
            tl.store(outer, tl.load(inner, mask=mask), mask=mask)
        else:
            moved = tl.load(outer, mask=inside & there[:, None], other=-1)
            tl.store(inner, moved, mask=inside & (row < count)[:, None])


# --- using rows -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["origin"])
def _read_rows(
    records, pitch, size, slots, ids, count, origin, unit, out,
    CODE: tl.constexpr, DIM: tl.constexpr, SPREAD: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + item, mask=item < count, other=-1)
    there = (slot >= 0) & (slot < size)
    id = tl.load(ids + item, mask=item < count, other=0)
    numbers = _read(records + slot * pitch, there, id, origin, unit, CODE, DIM, SPREAD, WORDS, ROWS, WIDTH)
    if out.dtype.element_ty == tl.bfloat16:
        numbers = _to_bf16(numbers, 0, False).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    column = tl.arange(0, WIDTH)[None, :]
    place = out + item[:, None] * DIM + column
    tl.store(place, numbers.to(out.dtype.element_ty), mask=(item < count)[:, None] & (column < DIM))


@triton.jit(do_not_specialize=["origin", "key"])
def _update_rows(
    records, pitch, size, slots, ids, count, origin, unit, grads, order, starts, chunks, key, lr, CHUNK: tl.constexpr,
    CODE: tl.constexpr, DIM: tl.constexpr, SPREAD: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """origin and key: of initial rows and of this update's noise."""
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    slot = tl.load(slots + item, mask=item < count, other=-1)
    there = (slot >= 0) & (slot < size)
    id = tl.load(ids + item, mask=there, other=0)
    if order is None:
        grad = tl.load(grads + item[:, None] * DIM + column, mask=there[:, None] & (column < DIM), other=0.0)
        grad = grad.to(tl.float32)
    else:
        first = tl.load(starts + item, mask=there, other=0)
        end = tl.load(starts + item + 1, mask=there, other=0)
        grad = sum_reads(grads, order, chunks, first, end, CHUNK, DIM, ROWS, WIDTH)
    there &= tl.max(_size(grad), 1) > 0
    if tl.max(there.to(tl.int32), 0) == 0:
        return

    record = records + slot * pitch
    numbers = _read(record, there, id, origin, unit, CODE, DIM, SPREAD, WORDS, ROWS, WIDTH)
    moment = tl.load(record + WORDS - 1, mask=there, other=0).to(tl.float32, bitcast=True)
    moment += _mean_square(grad, DIM, ROWS, WIDTH)
    scale = tl.div_rn(lr + tl.zeros_like(moment), tl.sqrt_rn(moment + 1e-24))
    numbers = tl.where(column < DIM, numbers - grad * scale[:, None], 0.0)

    tl.debug_barrier()  # no thread writes before all have read
    noise = _noise(key + id, ROWS, WIDTH) if CODE != FP32 else 0
    _encode(numbers, noise, record, there, CODE != FP32, CODE, DIM, 4 * WORDS - 4, ROWS, WIDTH)
    tl.store(record + WORDS - 1, moment.to(tl.int32, bitcast=True), mask=there)


@triton.jit
def _encode_rows(
    rows, count, out,
    CODE: tl.constexpr, DIM: tl.constexpr, ROW_BYTES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    there = item < count
    numbers = tl.load(rows + item[:, None] * DIM + column, mask=there[:, None] & (column < DIM), other=0.0)
    _encode(numbers, 0, out + item * (ROW_BYTES // 4), there, False, CODE, DIM, ROW_BYTES, ROWS, WIDTH)


@triton.jit
def _read(
    record, there, id, origin, unit,
    CODE: tl.constexpr, DIM: tl.constexpr, SPREAD: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Numbers [ROWS, WIDTH] float32 of records at pointers [ROWS] to their words; beyond DIM they are anything."""
    numbers = _decode(record, there, CODE, DIM, ROWS, WIDTH)
    if SPREAD:
        PADDED: tl.constexpr = triton.next_power_of_2(WORDS)
        word = tl.arange(0, PADDED)[None, :]
        held = tl.load(record[:, None] + word, mask=there[:, None] & (word < WORDS), other=0)
        never = there & (tl.max((held != 0).to(tl.int32), 1) == 0)
        if tl.max(never.to(tl.int32), 0) > 0:  # seldom, once a table is trained
            numbers = tl.where(never[:, None], _initial(origin + id, unit, WIDTH), numbers)
    return numbers


@triton.jit
def _mean_square(grad, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS]; as a tree, upper half onto lower."""
    squares = grad * grad
    for level in tl.static_range(1, 11):
        if WIDTH >> level > 0:
            squares = tl.sum(tl.reshape(squares, (ROWS, 2, WIDTH >> level)), 1)
    return tl.reshape(squares, (ROWS,)) * (1 / DIM)


# --- randomness -----------------------------------------------------------------------------------------------------


@triton.jit
def _mix(x):
    """splitmix64 of int64 or uint64."""
    x = x.to(tl.uint64) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _noise(key, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """uint32 [ROWS, WIDTH] of keys [ROWS] not yet mixed: the low and high halves of WIDTH / 2 words."""
    words = _mix(_mix(key)[:, None] + tl.arange(0, WIDTH // 2)[None, :])
    return tl.reshape(tl.join(words.to(tl.uint32), (words >> 32).to(tl.uint32)), (ROWS, WIDTH))


@triton.jit
def _initial(key, unit, WIDTH: tl.constexpr):
    """float32 [ROWS, WIDTH] of keys [ROWS] not yet mixed."""
    x = _mix(_mix(key)[:, None] + tl.arange(0, WIDTH)[None, :])
    total = (x & 0xFFFF) + (x >> 16 & 0xFFFF) + (x >> 32 & 0xFFFF) + (x >> 48)
    return (total.to(tl.int32) - 2 * 0xFFFF).to(tl.float32) * unit


# --- bytes to numbers -----------------------------------------------------------------------------------------------


@triton.jit
def _decode(record, there, CODE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    held = there[:, None] & (column < DIM)
    if CODE == FP32:
        numbers = tl.load(record[:, None] + column, mask=held, other=-1).to(tl.float32, bitcast=True)
    elif CODE == BF16:
        halves = record.to(tl.pointer_type(tl.uint16), bitcast=True)[:, None]
        numbers = (tl.load(halves + column, mask=held, other=0xFFFF).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif CODE == INT8:
        codes = record.to(tl.pointer_type(tl.int8), bitcast=True)[:, None] + 4
        scale = tl.load(record, mask=there, other=-1).to(tl.float32, bitcast=True)[:, None]
        numbers = tl.load(codes + column, mask=held, other=-1).to(tl.float32) * scale
    else:
        codes = record.to(tl.pointer_type(tl.uint8), bitcast=True)[:, None]
        SPAN: tl.constexpr = min(BLOCK, WIDTH)
        block = tl.arange(0, WIDTH // SPAN)[None, :]
        scales = tl.load(codes + DIM + block, mask=there[:, None] & (block * BLOCK < DIM), other=0xFF)
        scale = _spread(_from_e8m0(scales), ROWS, WIDTH // SPAN, SPAN)
        numbers = _from_e4m3(tl.load(codes + column, mask=held, other=0xFF)) * scale
    return numbers


@triton.jit
def _spread(values, ROWS: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr):
    """Each of values [ROWS, BLOCKS] for the columns of its block."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (ROWS, BLOCKS, SPAN)), (ROWS, BLOCKS * SPAN))


@triton.jit
def _from_e8m0(code):
    code = code.to(tl.uint32)
    bits = tl.where(code == 0, 0x400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _from_e4m3(code):
    """Shifted into place and 120 added to the exponent, it is a float32; below 2^-6 by taking a 2^-6 too much away."""
    code = code.to(tl.uint32)
    size = code & 0x7F
    number = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = ((size << 20) + (121 << 23)).to(tl.float32, bitcast=True) - 0.015625
    bits = tl.where(size >= 8, number, small).to(tl.uint32, bitcast=True)
    bits = tl.where(size < 0x7F, bits, 0x7FC00000)
    return (bits | (code & 0x80) << 24).to(tl.float32, bitcast=True)


# --- numbers to bytes -----------------------------------------------------------------------------------------------


@triton.jit
def _encode(
    numbers, noise, record, there, RANDOM: tl.constexpr,
    CODE: tl.constexpr, DIM: tl.constexpr, ROW_BYTES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store float32 numbers [ROWS, WIDTH], zero beyond DIM, as the rows of records at pointers [ROWS] to their words.

    To nearest, or with noise [ROWS, WIDTH] if RANDOM. Padding is zero.
    """
    column = tl.arange(0, WIDTH)[None, :]
    record, there = record[:, None], there[:, None]
    bytes = record.to(tl.pointer_type(tl.uint8), bitcast=True)
    if CODE == FP32:
        tl.store(record + column, numbers.to(tl.int32, bitcast=True), mask=there & (column < DIM))
    elif CODE == BF16:
        halves = record.to(tl.pointer_type(tl.uint16), bitcast=True)
        codes = _to_bf16(numbers, noise, RANDOM).to(tl.uint16)
        tl.store(halves + column, codes, mask=there & (column < ROW_BYTES // 2))
    elif CODE == INT8:
        largest = tl.max(_size(numbers), 1)[:, None]
        scale = largest.to(tl.float32, bitcast=True) * (1 / 127)
        tl.store(record, scale.to(tl.int32, bitcast=True), mask=there)
        exact = numbers.to(tl.float64) / tl.where(scale == 0, 1e-250, scale.to(tl.float64))  # 0 / 0 is to be 0
        codes = _to_int8(exact, noise, RANDOM).to(tl.uint8, bitcast=True)
        tl.store(bytes + 4 + column, codes, mask=there & (column < ROW_BYTES - 4))
    else:
        SPAN: tl.constexpr = min(BLOCK, WIDTH)
        BLOCKS: tl.constexpr = WIDTH // SPAN
        largest = tl.max(tl.reshape(_size(numbers), (ROWS, BLOCKS, SPAN)), 2)
        scale = (largest >> 23).to(tl.int32) - 8 + ((largest & MANTISSA) > 0x600000).to(tl.int32)  # 448 is 1.75 * 2^8
        scale = tl.maximum(scale, 0)
        factor = _spread((254 - scale << 23).to(tl.float32, bitcast=True), ROWS, BLOCKS, SPAN)
        tl.store(bytes + column, _to_e4m3(numbers * factor, noise, RANDOM).to(tl.uint8), mask=there & (column < DIM))
        block = tl.arange(0, BLOCKS)[None, :]
        tl.store(bytes + DIM + block, scale.to(tl.uint8), mask=there & (block * BLOCK < DIM))
        padding = DIM + (DIM + BLOCK - 1) // BLOCK + tl.arange(0, 4)[None, :]
        tl.store(bytes + padding, tl.zeros_like(padding).to(tl.uint8), mask=there & (padding < ROW_BYTES))


@triton.jit
def _size(numbers):
    """Bits without the sign, which order like the magnitude; uint32."""
    return numbers.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _to_bf16(numbers, noise, RANDOM: tl.constexpr):
    size = _size(numbers)
    carry = noise >> 16 if RANDOM else 0x7FFF + (size >> 16 & 1)
    code = tl.minimum(size + carry >> 16, 0x7F7F)
    code = tl.where(size < INFINITY, code, tl.where(size == INFINITY, 0x7F80, 0x7FC0))
    return code | numbers.to(tl.uint32, bitcast=True) >> 16 & 0x8000


@triton.jit
def _to_int8(exact, noise, RANDOM: tl.constexpr):
    """Codes of float64 numbers."""
    ROUND: tl.constexpr = 1.5 * 2**52  # leaves no bits for a fraction
    exact = tl.where(exact == exact, exact, 0.0)  # of a row that is not finite
    code = tl.floor(exact + noise.to(tl.float64) * 2.0**-32) if RANDOM else exact + ROUND - ROUND
    return tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8)


@triton.jit
def _to_e4m3(numbers, noise, RANDOM: tl.constexpr):
    """Codes of numbers within 448: three bits of mantissa, or steps of 2^-9 below 2^-6."""
    size = _size(numbers)
    carry = noise >> 12 if RANDOM else 0x7FFFF + (size >> 20 & 1)
    large = (size + carry >> 20).to(tl.int32) - (120 << 3)
    small = size < 121 << 23
    fixed = (tl.where(small, size, 0).to(tl.float32, bitcast=True) * 2.0**36).to(tl.uint32)
    carry = noise >> 5 if RANDOM else 0x3FFFFFF + (fixed >> 27 & 1)
    code = tl.where(small, (fixed + carry >> 27).to(tl.int32), large)
    code = tl.where(size < INFINITY, code, 0x7F)
    return code | (numbers.to(tl.uint32, bitcast=True) >> 24 & 0x80).to(tl.int32)
