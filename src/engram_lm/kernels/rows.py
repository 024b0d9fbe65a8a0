# mypy: allow-untyped-defs
"""Rows in Numba: the same bits as tables/rows.py, which says what they mean.

Tables are larger than any cache, so a row costs a wait for memory. The kernels ask for the rows that come next while
they work on this one; a core then has many lines under way, and moves what its memory can.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, njit, types
from numba.core import cgutils

from . import run

intrinsic: Any = extending.intrinsic  # its annotations speak of the generator, not of the calls
kernel = njit(nogil=True, cache=True, error_model="numpy")  # "numpy": a division by zero gives infinity and vectorises

AHEAD = 32  # rows between asking and using; twice as many gain nothing, and 8 lose a third
FEW = 2048  # rows that are moved sooner than another thread has its share
FP32, BF16, FP8, INT8 = range(4)
CODE = {"fp32": FP32, "bf16": BF16, "fp8_e8m0": FP8, "int8": INT8}
BLOCK = 32
INFINITY, MANTISSA = np.uint32(0x7F800000), np.uint32(0x7FFFFF)


def gather(records: np.ndarray, slots: np.ndarray, out: np.ndarray) -> None:
    """out[i] = records[slots[i]]. records: uint8 [S, stride]; slots: int64 [U], not checked; out: uint8 [U, stride].

    As everywhere here, the bytes of a row lie side by side; the rows themselves may be strided.
    """
    run(_gather, len(slots), records, slots, out, grain=FEW)


def scatter(records: np.ndarray, slots: np.ndarray, source: np.ndarray) -> None:
    """records[slots[i]] = source[i] for distinct slots."""
    run(_scatter, len(slots), records, slots, source, grain=FEW)


def read_rows(form: Any, records: np.ndarray, slots: np.ndarray, ids: np.ndarray, out: np.ndarray) -> None:
    """Rows into out [U, dim] float32. form: RowFormat; records: uint8 [S, stride]; slots, ids: int64 [U]."""
    settings = CODE[form.encoding], form.seed, np.float32(form.unit)
    run(_read_rows, len(slots), *settings, records, slots, ids, out, grain=FEW)


def update_rows(
    form: Any, records: np.ndarray, slots: np.ndarray, ids: np.ndarray, grads: np.ndarray, lr: float, clock: int
) -> None:
    """Row-wise Adagrad in place on trainable records of distinct slots. grads: float32 [U, dim]."""
    settings = CODE[form.encoding], form.seed, np.float32(form.unit), np.float32(lr), clock
    run(_update_rows, len(slots), *settings, records, slots, ids, grads, grain=256)


def encode(form: Any, rows: np.ndarray, out: np.ndarray, ids: np.ndarray | None = None, clock: int = 0) -> None:
    """Bytes of rows [U, dim] float32 into out [U, row_bytes] uint8: to nearest, or with the noise of `ids` at `clock`."""
    random = ids is not None
    ids = np.empty(0, np.int64) if ids is None else ids
    run(_encode_rows, len(rows), CODE[form.encoding], form.seed, random, ids, clock, rows, out, grain=256)


# --- memory ---------------------------------------------------------------------------------------------------------
# A record is a pointer: it can be looked at as words, halves or bytes, and costs nothing, whereas a slice of an array is
# an object with a shared count.


@intrinsic
def _at(typing, array, i):
    """Pointer to array[i], whose numbers lie side by side."""

    def generate(context, builder, signature, arguments):
        view = cgutils.create_struct_proxy(array)(context, builder, arguments[0])
        step = builder.mul(arguments[1], cgutils.unpack_tuple(builder, view.strides)[0])
        first = builder.bitcast(view.data, ir.IntType(8).as_pointer())
        return builder.bitcast(builder.gep(first, [step]), view.data.type)

    return types.CPointer(array.dtype)(array, types.int64), generate


@intrinsic
def _as(typing, pointer, number):
    """The same memory as numbers of another type."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(number.instance_type)(pointer, number), generate


@intrinsic
def _copy(typing, target, source, size):
    """memcpy of `size` bytes."""

    def generate(context, builder, signature, arguments):
        to, start, count = arguments
        cgutils.raw_memcpy(builder, to, start, count, 1)
        return context.get_dummy_value()

    return types.void(target, source, types.int64), generate


@intrinsic
def _prefetch_line(typing, address):
    """Ask for the cache line at an address."""

    def generate(context, builder, signature, arguments):
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, keep, data = i32(0), i32(3), i32(1)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _address(typing, pointer):
    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(pointer), generate


@kernel
def _prefetch(records, slot):
    first = _address(_at(records, slot))
    for line in range(first & -64, first + records.shape[1], 64):
        _prefetch_line(line)


@kernel
def _prefetch_first(lo, hi, records, slots):
    for i in range(lo, min(lo + AHEAD, hi)):
        _prefetch(records, slots[i])


@kernel
def _gather(lo, hi, records, slots, out):
    _prefetch_first(lo, hi, records, slots)
    for i in range(lo, hi):
        if i + AHEAD < hi:
            _prefetch(records, slots[i + AHEAD])
        _copy(_at(out, i), _at(records, slots[i]), records.shape[1])


@kernel
def _scatter(lo, hi, records, slots, source):
    _prefetch_first(lo, hi, records, slots)
    for i in range(lo, hi):
        if i + AHEAD < hi:
            _prefetch(records, slots[i + AHEAD])
        _copy(_at(records, slots[i]), _at(source, i), records.shape[1])


# --- randomness -----------------------------------------------------------------------------------------------------


@kernel
def _mix(x):
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def _key(seed, clock, id):
    return _mix(_mix(_mix(np.uint64(seed)) + np.uint64(clock)) + np.uint64(id))


@kernel
def _noise(key, dim, words):
    """Fill uint64 words, whose halves are the columns' noise."""
    for j in range((dim + 1) // 2):
        words[j] = _mix(key + np.uint64(j))


@kernel
def _initial(key, unit, dim, row):
    low = np.uint64(0xFFFF)
    for j in range(dim):
        x = _mix(key + np.uint64(j))
        total = (x & low) + (x >> np.uint64(16) & low) + (x >> np.uint64(32) & low) + (x >> np.uint64(48))
        row[j] = np.float32(np.int32(total) - 2 * 0xFFFF) * unit


# --- bytes to numbers -----------------------------------------------------------------------------------------------


@kernel
def _float(bits):
    return np.uint32(bits).view(np.float32)


@kernel
def _bits(number):
    return np.float32(number).view(np.uint32)


@kernel
def _decode(code, dim, record, row):
    """A record into dim float32 numbers."""
    if code == FP32:
        _copy(row, _as(record, np.float32), 4 * dim)
    elif code == BF16:
        halves = _as(record, np.uint16)
        for j in range(dim):
            row[j] = _float(np.uint32(halves[j]) << np.uint32(16))
    elif code == INT8:
        scale, numbers = _as(record, np.float32)[0], _as(record, np.int8)
        for j in range(dim):
            row[j] = np.float32(numbers[4 + j]) * scale
    else:
        for first in range(0, dim, BLOCK):
            scale = _from_e8m0(record[dim + first // BLOCK])
            for j in range(first, min(first + BLOCK, dim)):
                row[j] = _from_e4m3(record[j]) * scale


@kernel
def _from_e8m0(code):
    if code == 0:
        return _float(0x400000)
    return _float(np.uint32(code) << np.uint32(23)) if code < 255 else np.float32(np.nan)


@kernel
def _from_e4m3(code):
    """Shifted into place and 120 added to the exponent, it is a float32; below 2^-6 by taking a 2^-6 too much away."""
    sign, size = np.uint32(code & 0x80) << np.uint32(24), np.uint32(code & 0x7F)
    shifted = np.uint32(size << np.uint32(20))
    number = _float(shifted + np.uint32(120 << 23))
    small = _float(shifted + np.uint32(121 << 23)) - np.float32(2.0**-6)
    number = number if size >= 8 else small
    number = number if size < 0x7F else np.float32(np.nan)
    return _float(_bits(number) | sign)


# --- numbers to bytes -----------------------------------------------------------------------------------------------


@kernel
def _encode(code, dim, row, random, noise, record):
    """dim float32 numbers into the encoded part of a record; noise: uint32, used if `random`."""
    words = _as(record, np.uint32)
    if code == FP32:
        _copy(_as(record, np.float32), row, 4 * dim)
    elif code == BF16:
        words[(dim - 1) // 2] = 0  # clears the padding
        halves = _as(record, np.uint16)
        for j in range(dim):
            halves[j] = _to_bf16(_bits(row[j]), random, noise[j])
    elif code == INT8:
        words[(dim + 3) // 4] = 0
        scale = _float(_largest(row, 0, dim)) * np.float32(1 / 127)
        words[0] = _bits(scale)
        for j in range(dim):
            record[4 + j] = _to_int8(np.float64(row[j]) / np.float64(scale), random, noise[j])
    else:
        words[(dim + (dim + BLOCK - 1) // BLOCK - 1) // 4] = 0
        for first in range(0, dim, BLOCK):
            last = min(first + BLOCK, dim)
            largest = _largest(row, first, last)
            scale = np.int64(largest >> 23) - 8 + np.int64((largest & MANTISSA) > 0x600000)  # 448 is 1.75 * 2^8
            scale = scale if scale > 0 else np.int64(0)
            record[dim + first // BLOCK] = scale
            factor = _float((254 - scale) << 23)
            for j in range(first, last):
                record[j] = _to_e4m3(row[j] * factor, random, noise[j])


@kernel
def _largest(row, first, last):
    """Bits of the largest magnitude."""
    largest = np.uint32(0)
    for j in range(first, last):
        largest = max(largest, np.uint32(_bits(row[j]) & np.uint32(0x7FFFFFFF)))
    return largest


@kernel
def _to_bf16(bits, random, noise):
    sign, size = np.uint32(bits >> 16) & np.uint32(0x8000), np.uint32(bits & np.uint32(0x7FFFFFFF))
    carry = noise >> 16 if random else 0x7FFF + (size >> 16 & 1)
    code = min(np.uint32(np.uint32(size + carry) >> 16), np.uint32(0x7F7F))
    code = np.uint32(0x7F80) if size == INFINITY else code
    code = np.uint32(0x7FC0) if size > INFINITY else code
    return np.uint16(code | sign)


@kernel
def _to_int8(exact, random, noise):
    exact = 0.0 if exact != exact else exact
    code = np.floor(exact + np.float64(noise) * 2.0**-32) if random else np.rint(exact)
    return np.int8(min(max(code, -127.0), 127.0))


@kernel
def _to_e4m3(number, random, noise):
    bits = _bits(number)
    sign, size = np.uint32(bits >> 24) & np.uint32(0x80), np.uint32(bits & np.uint32(0x7FFFFFFF))
    carry = np.uint32(noise >> 12) if random else np.uint32(0x7FFFF + (size >> 20 & 1))
    code = np.uint32(np.uint32(size + carry) >> 20) - np.uint32(120 << 3)
    fixed = np.uint32(np.int32(_float(size) * np.float32(2.0**36)))
    carry = np.uint32(noise >> 5) if random else np.uint32(0x3FFFFFF + (fixed >> 27 & 1))
    code = code if size >= np.uint32(121 << 23) else np.uint32(fixed + carry) >> 27
    code = code if size < INFINITY else np.uint32(0x7F)
    return np.uint8(code | sign)


# --- using rows -----------------------------------------------------------------------------------------------------


@kernel
def _read(code, seed, unit, record, stride, id, dim, row):
    if unit > 0 and _never_written(_as(record, np.uint32), stride // 4):
        _initial(_key(seed, -1, id), unit, dim, row)
    else:
        _decode(code, dim, record, row)


@kernel
def _never_written(words, size):
    while size and words[size - 1] == 0:  # the accumulator first, which tells mostly
        size -= 1
    return size == 0


@kernel
def _read_rows(lo, hi, code, seed, unit, records, slots, ids, out):
    dim, stride = out.shape[1], records.shape[1]
    _prefetch_first(lo, hi, records, slots)
    for i in range(lo, hi):
        if i + AHEAD < hi:
            _prefetch(records, slots[i + AHEAD])
        _read(code, seed, unit, _at(records, slots[i]), stride, ids[i], dim, _at(out, i))


@kernel
def _encode_rows(lo, hi, code, seed, random, ids, clock, rows, out):
    dim = rows.shape[1]
    scratch = np.empty((dim + 1) // 2, np.uint64)
    for i in range(lo, hi):
        noise = _at(scratch, 0)
        if random:
            _noise(_key(seed, clock, ids[i]), dim, noise)
        _encode(code, dim, _at(rows, i), random, _as(noise, np.uint32), _at(out, i))


@kernel
def _update_rows(lo, hi, code, seed, unit, rate, clock, records, slots, ids, grads):
    dim, stride = grads.shape[1], records.shape[1]
    width = 1
    while width < dim:
        width *= 2
    scratch, noises = np.empty((2, width), np.float32), np.empty((dim + 1) // 2, np.uint64)
    _prefetch_first(lo, hi, records, slots)
    for i in range(lo, hi):
        if i + AHEAD < hi:
            _prefetch(records, slots[i + AHEAD])
        grad, record = _at(grads, i), _at(records, slots[i])
        row, squares, noise = _at(scratch, 0), _at(scratch, 1), _at(noises, 0)
        if _largest(grad, 0, dim) == 0:
            continue
        _read(code, seed, unit, record, stride, ids[i], dim, row)
        accumulator = _as(record, np.float32)
        moment = np.float32(accumulator[stride // 4 - 1] + _mean_square(grad, dim, squares, width))
        scale = rate / np.sqrt(np.float32(moment + np.float32(1e-24)))
        for j in range(dim):
            row[j] -= grad[j] * scale
        if code != FP32:
            _noise(_key(seed, clock, ids[i]), dim, noise)
        _encode(code, dim, row, True, _as(noise, np.uint32), record)
        accumulator[stride // 4 - 1] = moment


@kernel
def _mean_square(grad, dim, squares, width):
    """As a tree, upper half onto lower half; what lies behind the row is zero."""
    for j in range(dim):
        squares[j] = grad[j] * grad[j]
    for j in range(dim, width):
        squares[j] = np.float32(0)
    while width > 1:
        width //= 2
        for j in range(width):
            squares[j] += squares[width + j]
    return squares[0] * np.float32(1 / dim)
