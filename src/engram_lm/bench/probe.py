"""How fast random rows can be read at all: a gather that keeps nothing."""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from ..kernels import run

AHEAD = 16  # rows between asking and reading


def read(records: np.ndarray, slots: np.ndarray) -> int:
    """Exclusive or of a word of each cache line of rows [U] of records uint8 [N, width], width a multiple of 8."""
    totals = np.zeros(len(slots), np.uint64)
    run(_read, len(slots), records.view(np.uint64).ravel(), np.uint64(records.shape[1] // 8), slots, totals)
    return int(np.bitwise_xor.reduce(totals))


@intrinsic
def _ask(typing, address):  # type: ignore[no-untyped-def]
    """Prefetch the cache line at an address."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(
            prefetch, [builder.inttoptr(arguments[0], pointer), i32(0), i32(3), i32(1)]
        )  # data, to be read, and kept
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@njit(nogil=True, cache=True)
def _read(lo, hi, words, width, slots, totals):  # type: ignore[no-untyped-def]
    """totals[lo] = that of slots[lo:hi]."""
    line, last = np.uint64(8), width - np.uint64(1)
    start = np.uint64(words.ctypes.data)
    total = np.uint64(0)
    for i in range(lo - AHEAD, hi):
        if i + AHEAD < hi:
            first = np.uint64(slots[i + AHEAD]) * width
            for word in range(np.uint64(0), last, line):
                _ask(start + (first + word) * line)  # type: ignore[call-arg]
            _ask(start + (first + last) * line)  # type: ignore[call-arg]
        if i >= lo:
            first = np.uint64(slots[i]) * width
            for word in range(np.uint64(0), last, line):
                total ^= words[first + word]
            total ^= words[first + last]
    totals[lo] = total
