"""Kernels of `index.IdMap`: open addressing with linear probing.

cells: int64 [capacity, 2], (id, value) side by side in one cache line; an empty cell holds (-1, -1). The capacity is a power
of two, and an id's home is the top bits of id * GAMMA (Fibonacci hashing), so `shift` = 64 - log2(capacity).
"""

from __future__ import annotations

import numpy as np
from numba import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
EMPTY = -1
GROUP = 64  # ids whose first cells are fetched together


@njit(inline="always")
def home(i, shift):  # type: ignore[no-untyped-def]
    """The cell where the search for id i begins."""
    return np.int64((np.uint64(i) * GAMMA) >> np.uint64(shift))


@njit(inline="always")
def look_ahead(first, last, cells, shift, ids, near):  # type: ignore[no-untyped-def]
    """near[j] = the id in the first cell of ids[first + j]. Nothing is decided here, so all these loads are in flight together."""
    for i in range(first, last):
        near[i - first] = cells[home(ids[i], shift), 0]


@njit(nogil=True, cache=True)
def find(lo, hi, cells, shift, ids, values):  # type: ignore[no-untyped-def]
    """values[lo:hi] = the values of ids[lo:hi], -1 where absent."""
    mask = len(cells) - 1
    near = np.empty(GROUP, np.int64)
    for first in range(lo, hi, GROUP):
        last = min(first + GROUP, hi)
        look_ahead(first, last, cells, shift, ids, near)
        for i in range(first, last):
            at, seen = home(ids[i], shift), near[i - first]
            while seen != ids[i] and seen != EMPTY:
                at = (at + 1) & mask
                seen = cells[at, 0]
            values[i] = cells[at, 1]


@njit(nogil=True, cache=True)
def insert(lo, hi, cells, shift, ids, values, room):  # type: ignore[no-untyped-def]
    """Put ids[lo:hi] until `room` new ones are in and another would follow: returns (where it stopped, new ones)."""
    mask = len(cells) - 1
    near = np.empty(GROUP, np.int64)
    added = 0
    for first in range(lo, hi, GROUP):
        last = min(first + GROUP, hi)
        look_ahead(first, last, cells, shift, ids, near)
        for i in range(first, last):
            at = home(ids[i], shift)
            if near[i - first] != ids[i]:  # an id that was seen in its cell is still there
                while cells[at, 0] != ids[i] and cells[at, 0] != EMPTY:
                    at = (at + 1) & mask
                if cells[at, 0] == EMPTY:
                    if added == room:
                        return i, added
                    cells[at, 0] = ids[i]
                    added += 1
            cells[at, 1] = values[i]
    return hi, added


@njit(nogil=True, cache=True)
def delete(lo, hi, cells, shift, ids):  # type: ignore[no-untyped-def]
    """Remove ids[lo:hi]: later cells of a run move back into the hole, so no tombstones remain. Returns how many went."""
    mask = len(cells) - 1
    near = np.empty(GROUP, np.int64)
    gone = 0
    for first in range(lo, hi, GROUP):
        last = min(first + GROUP, hi)
        look_ahead(first, last, cells, shift, ids, near)
        for i in range(first, last):
            if near[i - first] == EMPTY:  # a cell that was seen empty is still so
                continue
            at = home(ids[i], shift)
            while cells[at, 0] != ids[i] and cells[at, 0] != EMPTY:
                at = (at + 1) & mask
            if cells[at, 0] == EMPTY:
                continue
            gone += 1
            hole = at
            while True:
                at = (at + 1) & mask
                if cells[at, 0] == EMPTY:
                    break
                from_home = (at - home(cells[at, 0], shift)) & mask
                if from_home >= (at - hole) & mask:  # its home is not behind the hole: it may move there
                    cells[hole, 0] = cells[at, 0]
                    cells[hole, 1] = cells[at, 1]
                    hole = at
            cells[hole, 0] = EMPTY
            cells[hole, 1] = EMPTY
    return gone
