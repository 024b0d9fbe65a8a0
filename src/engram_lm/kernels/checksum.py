"""The checksum's inner loop; the truth is `weighted_sums` in tables/file.py."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import run


def weighted_sums(words: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """words @ factors modulo 2^64: [n] uint64 of uint32 [n, w] and uint64 [w]."""
    sums = np.empty(len(words), np.uint64)
    run(_weighted_sums, len(words), words, factors, sums, grain=max(1, (1 << 18) // max(1, words.shape[1])))
    return sums


@njit(nogil=True, cache=True)
def _weighted_sums(lo: int, hi: int, words: np.ndarray, factors: np.ndarray, sums: np.ndarray) -> None:
    for block in range(lo, hi):
        total = np.uint64(0)
        for j in range(words.shape[1]):
            total += np.uint64(words[block, j]) * factors[j]
        sums[block] = total
