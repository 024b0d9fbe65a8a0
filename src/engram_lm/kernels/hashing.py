"""Hashing of n-grams, a stretch of positions at a time, so that each loop runs over neighbours and vectorises.

Remainders are taken by multiplying with the reciprocal in float64. With u = 2^-53, rounding x, 1 / size and products
changes the quotient of x < 2^63 by a factor within 1 ± 5u; the reciprocal is lowered by 8u, so that the quotient comes out
too small, by less than 2^63 / size * 13u, and that is below 0.8 from size 2^14 on. Its whole part is then right or one too
small, and one subtraction gives the exact remainder. A plan with smaller sizes takes `%`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from . import run

GRAIN = 4096  # positions a thread
STRETCH = 128  # positions that are mixed together
BLOCK = 1024  # remainders that are taken together
DEAD = -1  # as in histories


class Constants(NamedTuple):
    """What the kernel needs of a plan with L memory layers, N lags and `orders` orders."""

    multipliers: np.ndarray  # [L, N]
    order_ending: np.ndarray  # [N]: index of the order that ends with each lag, or -1
    pad: int
    eos: int  # DEAD if the window never resets
    vocab_size: int
    by_reciprocal: bool
    sizes: np.ndarray  # [positions of a block, L * orders, heads], as are the next two: repeated for each position
    reciprocals: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(plan: Any) -> Constants:
        """Derive them from a HashPlan."""
        order_ending = np.full(plan.orders[-1], -1)
        order_ending[np.array(plan.orders) - 1] = np.arange(len(plan.orders))
        repeats = (max(1, BLOCK // plan.sizes.size), 1, 1)
        sizes = np.tile(plan.sizes.reshape(-1, plan.heads), repeats)
        return Constants(
            multipliers=np.ascontiguousarray(plan.multipliers),
            order_ending=order_ending,
            pad=plan.pad,
            eos=DEAD if plan.eos is None else plan.eos,
            vocab_size=plan.vocab_size,
            by_reciprocal=bool(2**14 <= sizes.min() and sizes.max() <= 2**53),
            sizes=sizes,
            reciprocals=1 / sizes * (1 - 2**-50),
            offsets=np.tile(plan.offsets.reshape(-1, plan.heads), repeats),
        )


def hash_ngrams(
    constants: Constants, canonical: np.ndarray, segments: np.ndarray, dead: np.ndarray, history: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Ids [B * T, L * orders, heads], the history after them, and whether all of `canonical` is in the vocabulary.

    canonical and segments [B, T] and history [B, N-1, 2] are int64, dead [B, T] is bool; all are contiguous.
    """
    ids = np.empty((canonical.size, *constants.sizes.shape[1:]), np.int64)
    after, outside = history.copy(), np.zeros(1, np.bool_)
    arguments = (canonical, segments, dead, history, *constants, ids, after, outside)
    run(hash_positions, canonical.size, *arguments, grain=GRAIN)
    return ids, after, not outside[0]


@njit(nogil=True, cache=True)
def hash_positions(
    lo, hi, canonical, segments, dead, history,
    multipliers, order_ending, pad, eos, vocab_size, by_reciprocal, sizes, reciprocals, offsets,
    ids, after, outside,
):  # fmt: skip
    """Ids of the positions lo to hi of all B * T; a sequence's new history goes along with its last position."""
    length, past = canonical.shape[1], history.shape[1]
    tokens, owners = np.empty(past + STRETCH, np.int64), np.empty(past + STRETCH, np.int64)
    work = np.empty((2 + len(multipliers), STRETCH), np.int64)
    mixes = np.empty((sizes.shape[1], STRETCH), np.int64)
    while lo < hi:
        row, first = divmod(lo, length)
        count = min(STRETCH, length - first, hi - lo)
        outside[0] |= any_outside(canonical[row, first : first + count], vocab_size)
        look(canonical[row], segments[row], dead[row], history[row], first, tokens[: past + count], owners)
        mix(tokens, owners, multipliers, order_ending, pad, eos, count, work, mixes)
        spread(mixes, ids[lo : lo + count])
        for start in range(lo, lo + count, len(sizes)):
            block = ids[start : min(start + len(sizes), lo + count)]
            if by_reciprocal:
                remainders(block.reshape(-1), sizes.reshape(-1), reciprocals.reshape(-1), offsets.reshape(-1))
            else:
                block[:] = block % sizes[: len(block)] + offsets[: len(block)]
        if first + count == length:
            after[row, :, 0] = tokens[count : count + past]
            after[row, :, 1] = owners[count : count + past]
        lo += count


@njit(nogil=True, cache=True)
def any_outside(tokens, vocab_size):
    """Whether a token is no canonical id."""
    outside = False
    for j in range(tokens.size):
        outside |= (tokens[j] < 0) | (tokens[j] >= vocab_size)
    return outside


@njit(nogil=True, cache=True)
def look(canonical, segments, dead, history, first, tokens, owners):
    """Fill in one sequence's tokens, and the segments that own them, from N-1 positions before `first` on."""
    past = len(history)
    old = min(max(past - first, 0), tokens.size)
    for j in range(old):
        tokens[j], owners[j] = history[first + j, 0], history[first + j, 1]
    for j in range(old, tokens.size):
        at = first - past + j
        tokens[j] = DEAD if dead[at] else canonical[at]
        owners[j] = segments[at]


@njit(nogil=True, cache=True)
def mix(tokens, owners, multipliers, order_ending, pad, eos, count, work, mixes):
    """Products of tokens and multipliers, XORed over the lags: mixes [L * orders, count]."""
    layers, lags = multipliers.shape
    orders = len(mixes) // layers
    blocked, seen, running = work[0], work[1], work[2:]
    blocked[:] = 0
    running[:] = 0
    now = owners[lags - 1 :]
    for lag in range(lags):
        token, owner = tokens[lags - 1 - lag :], owners[lags - 1 - lag :]
        for j in range(count):
            blocked[j] |= (token[j] == DEAD) | (owner[j] != now[j])
            seen[j] = pad if blocked[j] else token[j]
        for layer in range(layers):
            for j in range(count):
                running[layer, j] ^= seen[j] * multipliers[layer, lag]
            if order_ending[lag] >= 0:
                mixes[layer * orders + order_ending[lag]] = running[layer]
        if lag > 0:
            for j in range(count):
                blocked[j] |= token[j] == eos


@njit(nogil=True, cache=True)
def spread(mixes, ids):
    """Give each mix [L * orders, count] to all heads of ids [count, L * orders, heads]."""
    for j in range(len(ids)):
        for column in range(len(mixes)):
            ids[j, column] = mixes[column, j]


@njit(nogil=True, cache=True)
def remainders(ids, sizes, reciprocals, offsets):
    """ids % sizes + offsets, in place, for ids from 0 to 2^63 - 1 and sizes from 2^14 to 2^53."""
    for k in range(ids.size):
        rest = np.uint64(ids[k] - np.int64(np.float64(ids[k]) * reciprocals[k]) * sizes[k])
        ids[k] = np.int64(min(rest, rest - np.uint64(sizes[k]))) + offsets[k]  # below zero is far above
