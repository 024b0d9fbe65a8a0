# mypy: allow-untyped-defs
"""The sum of gradients that fell on the same row: torch has it as F.embedding's backward, several times slower."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import ndarray

from . import run

PART = 2**20  # numbers of the gradient that are worth a thread of their own: 0.1 ms


def sum_rows(grads: ndarray, inverse: ndarray, out: ndarray) -> None:
    """out [U, d] = for each row, the sum of those grads [N, d] whose inverse [N] names it; all float32.

    The gradients of a row are added in their order, whatever the number of threads.
    """
    run(_sum_rows, len(out), grads, inverse, out, grain=1 + len(out) * PART // max(1, grads.size))


@njit(nogil=True, cache=True)
def _sum_rows(lo, hi, grads, inverse, out):
    """Rows lo to hi. Each thread reads all of `inverse`: little beside the gradients, and nothing needs sorting."""
    out[lo:hi] = np.float32(0)
    for n in range(len(inverse)):
        row = inverse[n]
        if lo <= row < hi:
            for d in range(grads.shape[1]):
                out[row, d] += grads[n, d]
