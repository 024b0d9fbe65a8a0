# mypy: allow-untyped-defs
"""Reading ahead in Numba: system calls straight from compiled code, without the GIL. Linux."""

from __future__ import annotations

import os
from typing import Any

from numba import njit
from numba.core import types

# The C library's own, found by name when the kernel is linked; unlike ctypes functions they leave it cacheable.
_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.voidptr, types.uintp, types.int64))
_advise: Any = types.ExternalFunction("posix_fadvise", types.intc(types.intc, types.int64, types.int64, types.intc))
WILLNEED = os.POSIX_FADV_WILLNEED


@njit(nogil=True, cache=True)
def read_rows(lo, hi, descriptor, offsets, out, burst):
    """Rows [lo, hi) as in reads.read_rows, up to the first one that `pread` does not fill; returns where it stopped."""
    size = out.shape[1]
    for first in range(lo - burst, hi, burst):
        for i in range(first + burst, min(first + 2 * burst, hi)):
            _advise(descriptor, offsets[i], size, WILLNEED)
        for i in range(max(first, lo), min(first + burst, hi)):
            if _pread(descriptor, out[i].ctypes, size, offsets[i]) != size:
                return i
    return hi
