# mypy: allow-untyped-defs
"""Distinct ids by radix sort: two passes over the ids' upper bits, and insertion for what these leave unsorted.

An id and its position travel in one 64-bit word, (id - first) << index_bits | position. Words order as ids do, and sorted
words say where each id came from. Every thread takes a range of ids, which it sorts without looking at the others.
"""

from __future__ import annotations

import threading

import numpy as np
from numba import njit

from . import run, threads

kernel = njit(nogil=True, cache=True)

GRAIN = 65_536  # ids a thread
DIGIT = 12  # bits that a pass sorts by, at most: 4096 cache lines are open
_kept = threading.local()


def deduplicate(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids [U], ascending, and where each of `ids` [...] is among them; all int64."""
    flat = np.ascontiguousarray(ids, np.int64).reshape(-1)
    index_bits = flat.size.bit_length()
    least, most = extent(flat) if flat.size else (0, 0)
    if least < 0 or (most - least).bit_length() + index_bits > 62:
        unique, inverse = np.unique(flat, return_inverse=True)
        return unique, inverse.reshape(ids.shape)

    parts = max(1, min(threads(), flat.size // GRAIN))
    edges = np.array([least, most + 1], np.uint64)  # range p holds the ids from edges[p] to before edges[p + 1]
    if parts > 1:
        sample = np.sort(flat[:: GRAIN // 256])
        edges = np.insert(edges, 1, sample[np.arange(1, parts) * sample.size // parts].astype(np.uint64))
    starts = first_words(flat, edges)
    words, spare = _scratch(flat.size + parts)
    firsts = np.zeros(parts + 1, np.int64)  # first distinct id of each range; the last entry is U
    run(sort_ranges, parts, flat, edges, starts, index_bits, words, spare, firsts[1:], grain=1)
    np.add.accumulate(firsts, out=firsts)
    unique, inverse = np.empty(firsts[-1], np.int64), np.empty(flat.size, np.int64)
    run(number_ranges, parts, words, edges, starts, index_bits, firsts, unique, inverse, grain=1)
    return unique, inverse.reshape(ids.shape)


def _scratch(count: int) -> np.ndarray:
    """[2, count] words of this thread, kept for its next call: fresh memory costs more than the sort."""
    if not hasattr(_kept, "words") or _kept.words.size < 2 * count:
        _kept.words = np.empty(2 * count, np.uint64)
    return _kept.words[: 2 * count].reshape(2, count)


@kernel
def extent(ids):
    """Smallest and largest id."""
    least = most = ids[0]
    for i in range(ids.size):
        least, most = min(least, ids[i]), max(most, ids[i])
    return least, most


@kernel
def first_words(ids, edges):
    """Where the words of each range start: it has as many as ids, and one to spare. The edges enclose all ids."""
    starts = np.zeros(edges.size, np.int64)
    starts[-1] = ids.size + edges.size - 1
    for part in range(1, edges.size - 1):
        below = 0
        for i in range(ids.size):
            below += np.uint64(ids[i]) < edges[part]
        starts[part] = below + part
    return starts


@kernel
def sort_ranges(lo, hi, ids, edges, starts, index_bits, words, spare, distinct):
    """Fill the words of ranges lo to hi, in order, and count their distinct ids."""
    for part in range(lo, hi):
        first, end = starts[part], starts[part + 1]
        bits = keep(ids, edges[part], edges[part + 1], index_bits, words[first:end])
        mine, other = words[first : end - 1], spare[first : end - 1]
        width = min(DIGIT, (min(bits, bit_length(mine.size) + 6) + 1) // 2)
        order(mine, other, index_bits + max(0, bits - 2 * width), width)
        if not mend(mine):
            for low in range(0, bits, 2 * DIGIT):
                order(mine, other, index_bits + low, min(DIGIT, (bits - low + 1) // 2))
        distinct[part] = count_distinct(mine, index_bits)


@kernel
def number_ranges(lo, hi, words, edges, starts, index_bits, firsts, unique, inverse):
    """Write out the distinct ids of ranges lo to hi, and at each word's position which one it is."""
    shift = np.uint64(index_bits)
    mask = (np.uint64(1) << shift) - np.uint64(1)
    for part in range(lo, hi):
        rank = np.uint64(firsts[part]) - np.uint64(1)
        last = ~np.uint64(0)
        for word in words[starts[part] : starts[part + 1] - 1]:
            key = word >> shift
            rank += np.uint64(key != last)
            last = key
            unique[rank] = key + edges[part]
            inverse[word & mask] = rank


@kernel
def bit_length(number):
    """Bits that a number takes."""
    bits = 0
    while np.uint64(number) >> np.uint64(bits):
        bits += 1
    return bits


@kernel
def keep(ids, first, end, index_bits, words):
    """Pack the ids from `first` to before `end`; returns the bits that their distances from `first` take."""
    shift, kept = np.uint64(index_bits), 0
    if words.size > ids.size:  # all of them: the same loop, which now vectorises
        for i in range(ids.size):
            words[i] = ((np.uint64(ids[i]) - first) << shift) | np.uint64(i)
    else:
        for i in range(ids.size):
            key = np.uint64(ids[i]) - first
            words[kept] = (key << shift) | np.uint64(i)  # overwritten by the next one unless it counts
            kept += key < end - first
    return bit_length(end - first)


@kernel
def order(words, spare, low, width):
    """Sort words by 2 * width bits from bit `low` on: to `spare` by the lower half of them and back by the upper half."""
    lower, upper, mask = np.uint64(low), np.uint64(low + width), np.uint64((1 << width) - 1)
    ends = np.zeros((2, 1 << width), np.uint32)
    for word in words:  # equal words are not neighbours yet, whose counts would wait for each other
        ends[0, (word >> lower) & mask] += np.uint32(1)
        ends[1, (word >> upper) & mask] += np.uint32(1)
    for half in range(2):
        total = np.uint32(0)
        for digit in range(1 << width):
            total, ends[half, digit] = total + ends[half, digit], total
    place(words, lower, mask, ends[0], spare)
    place(spare, upper, mask, ends[1], words)


@kernel
def place(words, shift, mask, ends, target):
    """Put every word where the earlier words of its digit end."""
    for word in words:
        digit = (word >> shift) & mask
        target[ends[digit]] = word
        ends[digit] += np.uint32(1)


@kernel
def mend(words):
    """Sort by insertion what is nearly sorted; gives up, returning False, after as many moves as there are words."""
    moves = words.size
    for first in range(1, words.size, 64):
        block = words[first - 1 : first + 64]
        wrong = 0
        for i in range(1, block.size):
            wrong += block[i] < block[i - 1]
        if wrong == 0:
            continue
        for i in range(first, first + block.size - 1):
            word, j = words[i], i
            while j > 0 and words[j - 1] > word:
                words[j] = words[j - 1]
                j -= 1
            words[j] = word
            moves -= i - j
            if moves < 0:
                return False
    return True


@kernel
def count_distinct(words, index_bits):
    """Different ids in sorted words."""
    shift, count = np.uint64(index_bits), min(1, words.size)
    for i in range(1, words.size):
        count += (words[i] >> shift) != (words[i - 1] >> shift)
    return count
