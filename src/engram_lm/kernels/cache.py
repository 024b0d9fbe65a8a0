"""Which rows a cache keeps: S3-FIFO (Yang et al., SOSP 2023) without its queue of ghosts, for many rows at a call.

New rows enter a queue on probation. Those that were asked for again by the time they reach its end move to the main queue;
the others leave, as most n-grams of a text do: they come once. A row at the end of the main queue goes round again for
each time it was asked for since, at most MOST. No row of a call makes room for another row of the same call.

The functions are plain Python, compiled where Numba is: the cache keeps the same rows with it and without. A decision
depends on the one before, so they run on one thread. Import this file late: it imports Numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import compiled

jit: Callable[[Any], Any] = lambda function: function  # noqa: E731
if compiled():
    from numba import njit

    jit = njit(nogil=True, cache=True)

PROBATION, MAIN = 0, 1  # queues
FIRST, LENGTH = 0, 1  # of a queue: where in its ring it begins, how many slots it has
MOST = 3  # times that a row is remembered to have been asked for; the low bits of its slot's mark
HELD, NEW, ASIDE = 4, 8, 16  # the other bits: held by this call; admitted by it; in no queue until it is done


class Slots(NamedTuple):
    """What `admit` knows about the slots of a cache."""

    owner: np.ndarray  # [slots] int64: the id in each slot; -1 for none, and for those that are not the policy's
    marks: np.ndarray  # [slots] uint8
    rings: np.ndarray  # [2, slots] int32: both queues
    ends: np.ndarray  # [2, 2] int64
    probation: int  # length above which the queue on probation gives up its rows first

    @staticmethod
    def empty(count: int, hot: int) -> Slots:
        """`count` slots, of which the first `hot` are not the policy's. The others are free: that is, first on probation."""
        rings = np.tile(np.arange(count, dtype=np.int32), (2, 1))
        ends = np.array([[hot, count - hot], [0, 0]], np.int64)
        return Slots(np.full(count, -1, np.int64), np.zeros(count, np.uint8), rings, ends, (count - hot) // 4)

    @property
    def nbytes(self) -> int:
        """Bytes of RAM."""
        return self.owner.nbytes + self.marks.nbytes + self.rings.nbytes


@jit
def admit(ids, slots, left, owner, marks, rings, ends, probation):  # type: ignore[no-untyped-def]
    """A call asks for distinct ids [U], found in slots [U] (-1: nowhere). Fills in where the missing ones are to be.

    Where no slot can be had, -1 remains. left[i] becomes the id that ids[i] takes the place of, or -1.
    """
    for i in range(len(ids)):
        left[i] = -1
        if slots[i] >= 0:
            marks[slots[i]] = min((marks[slots[i]] & MOST) + 1, MOST) | HELD
    new = 0
    for i in range(len(ids)):
        if slots[i] < 0:
            slot = make_room(new, marks, rings, ends, probation)
            if slot < 0:
                break
            left[i], owner[slot], slots[i], marks[slot] = owner[slot], ids[i], slot, HELD | NEW
            new += 1
    for i in range(len(ids)):
        if slots[i] >= 0:
            mark = marks[slots[i]]
            if mark & NEW:
                push(PROBATION, slots[i], rings, ends)
            elif mark & ASIDE:
                push(MAIN, slots[i], rings, ends)
            marks[slots[i]] = mark & MOST


@jit
def make_room(new, marks, rings, ends, probation):  # type: ignore[no-untyped-def]
    """A slot whose row may leave, or -1; `new` rows were admitted by this call and will be on probation."""
    while True:
        waiting, settled = ends[PROBATION, LENGTH], ends[MAIN, LENGTH]
        if waiting > 0 and (waiting + new > probation or settled == 0):
            slot = pop(PROBATION, rings, ends)
            if marks[slot] == 0:
                return slot
            marks[slot] &= HELD
            push(MAIN, slot, rings, ends)
        elif settled > 0:
            slot = pop(MAIN, rings, ends)
            if marks[slot] == 0:
                return slot
            if marks[slot] & HELD:
                marks[slot] |= ASIDE
            else:
                marks[slot] -= 1
                push(MAIN, slot, rings, ends)
        else:
            return -1


@jit
def push(queue, slot, rings, ends):  # type: ignore[no-untyped-def]
    """Put a slot at the end of a queue."""
    at = ends[queue, FIRST] + ends[queue, LENGTH]
    rings[queue, at if at < rings.shape[1] else at - rings.shape[1]] = slot
    ends[queue, LENGTH] += 1


@jit
def pop(queue, rings, ends):  # type: ignore[no-untyped-def]
    """Take the first slot of a queue."""
    at = ends[queue, FIRST]
    ends[queue, FIRST] = at + 1 if at + 1 < rings.shape[1] else 0
    ends[queue, LENGTH] -= 1
    return rings[queue, at]


@jit
def replay(ids, edges, where, hits, owner, marks, rings, ends, probation):  # type: ignore[no-untyped-def]
    """The calls ids[edges[c]:edges[c + 1]] one after another: hits[i] = whether ids[i] was in a slot when it was asked for.

    where [largest id + 1]: the slot of each id, -1 for none.
    """
    for call in range(len(edges) - 1):
        asked = ids[edges[call] : edges[call + 1]]
        slots = where[asked]
        hits[edges[call] : edges[call + 1]] = slots >= 0
        left = np.empty(len(asked), np.int64)
        admit(asked, slots, left, owner, marks, rings, ends, probation)
        for i in range(len(asked)):
            if left[i] >= 0:
                where[left[i]] = -1
            if slots[i] >= 0:
                where[asked[i]] = slots[i]
