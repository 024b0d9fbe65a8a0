# mypy: allow-untyped-defs
"""Hashing of n-grams, a stretch of positions at a time, so that each loop runs over neighbours and vectorises.

Remainders are taken by multiplying with the reciprocal in float64. With u = 2^-53, the five roundings (of x, of size, of
1 / size, of this lowered by 8u, of the product) change the quotient of x < 2^63 by a factor within 1 ± 5.01u. Lowered, it
is never too large, and too small by less than 2^63 / size * 13.1u, which is below 0.82 from size 2^14 on. Its whole part
is then right or one too small, and one subtraction at most gives the exact remainder. Smaller sizes take `%`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, njit, types

from . import run

intrinsic: Any = extending.intrinsic  # its annotations speak of the generator, not of the calls
kernel = njit(nogil=True, cache=True, error_model="numpy")  # "numpy": no division is checked for zero

GRAIN = 4096  # positions a thread
STRETCH = 12_288  # ids that are mixed together: 96 KiB
BLOCK = 1024  # ids whose remainders are taken together, at least
DEAD = -1  # as in histories


class Constants(NamedTuple):
    """What the kernel needs of a plan with L memory layers, N lags and K = orders * heads ids a layer."""

    multipliers: np.ndarray  # [L, N]
    order_ending: np.ndarray  # [N]: index of the order that ends with each lag, or -1
    orders: int
    heads: int
    pad: int
    eos: int  # DEAD if the window never resets
    vocab_size: int
    by_reciprocal: bool
    sizes: np.ndarray  # [L * K], repeated for each position of a block; as are the next two
    reciprocals: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(plan: Any) -> Constants:
        """Derive them from a HashPlan."""
        order_ending = np.full(plan.orders[-1], -1)
        order_ending[np.array(plan.orders) - 1] = np.arange(len(plan.orders))
        repeats = max(1, BLOCK // plan.sizes.size)
        sizes = np.tile(plan.sizes.ravel(), repeats)
        return Constants(
            multipliers=np.ascontiguousarray(plan.multipliers),
            order_ending=order_ending,
            orders=len(plan.orders),
            heads=plan.heads,
            pad=plan.pad,
            eos=DEAD if plan.eos is None else plan.eos,
            vocab_size=plan.vocab_size,
            by_reciprocal=bool(sizes.min() >= 2**14),
            sizes=sizes,
            reciprocals=1 / sizes * (1 - 2**-50),
            offsets=np.tile(plan.offsets.ravel(), repeats),
        )


def hash_ngrams(
    constants: Constants, canonical: np.ndarray, segments: np.ndarray, dead: np.ndarray, history: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Ids [B, T, L, K], the history after them, and whether all of `canonical` is in the vocabulary.

    canonical and segments [B, T] and history [B, N-1, 2] are int64, dead [B, T] is bool; all are contiguous.
    """
    shape = (*canonical.shape, len(constants.multipliers), constants.orders * constants.heads)
    ids = np.empty(shape, np.int64)
    after, outside = history.copy(), np.zeros(1, np.bool_)
    arguments = (canonical, segments, dead, history, *constants, ids.reshape(-1), after, outside)
    run(hash_positions, canonical.size, *arguments, grain=GRAIN)
    return ids, after, not outside[0]


@kernel
def hash_positions(
    lo, hi, canonical, segments, dead, history,
    multipliers, order_ending, orders, heads, pad, eos, vocab_size, by_reciprocal, sizes, reciprocals, offsets,
    ids, after, outside,
):  # fmt: skip
    """Ids of the positions lo to hi of all B * T; a sequence's new history goes along with its last position."""
    length, past = canonical.shape[1], history.shape[1]
    width = len(multipliers) * orders * heads
    stretch = 1 + STRETCH // width
    tokens, owners = np.empty(past + stretch, np.int64), np.empty(past + stretch, np.int64)
    work = np.empty((2 + len(multipliers), stretch), np.int64)
    mixes = np.empty((len(multipliers) * orders, stretch), np.int64)
    while lo < hi:
        row, first = divmod(lo, length)
        count = min(stretch, length - first, hi - lo)
        if any_outside(canonical[row, first : first + count], vocab_size):
            outside[0] = True
        look(canonical[row], segments[row], dead[row], history[row], first, tokens[: past + count], owners)
        mix(tokens, owners, multipliers, order_ending, pad, eos, count, work, mixes)
        mine = ids[lo * width : (lo + count) * width]
        spread(mixes, heads, mine)
        for start in range(0, mine.size, sizes.size):
            if by_reciprocal:
                remainders(mine[start : start + sizes.size], sizes, reciprocals, offsets)
            else:
                for k in range(start, min(start + sizes.size, mine.size)):
                    mine[k] = mine[k] % sizes[k - start] + offsets[k - start]
        if first + count == length:
            after[row, :, 0] = tokens[count : count + past]
            after[row, :, 1] = owners[count : count + past]
        lo += count


@kernel
def any_outside(tokens, vocab_size):
    """Whether a token is no canonical id."""
    outside = False
    for j in range(tokens.size):
        outside |= (tokens[j] < 0) | (tokens[j] >= vocab_size)
    return outside


@kernel
def look(canonical, segments, dead, history, first, tokens, owners):
    """Fill in one sequence's tokens, and the segments that own them, from N-1 positions before `first` on."""
    past = len(history)
    old = min(max(past - first, 0), tokens.size)
    for j in range(old):
        tokens[j], owners[j] = history[first + j, 0], history[first + j, 1]
    start = first - past + old
    canonical, segments, dead = canonical[start:], segments[start:], dead[start:]
    for j in range(tokens.size - old):
        tokens[old + j] = DEAD if dead[j] else canonical[j]
        owners[old + j] = segments[j]


@kernel
def mix(tokens, owners, multipliers, order_ending, pad, eos, count, work, mixes):
    """Products of tokens and multipliers, XORed over the lags: mixes [L * orders, count]."""
    layers, lags = multipliers.shape
    orders = len(mixes) // layers
    blocked, seen = work[0, :count], work[1, :count]
    blocked[:] = 0
    now = owners[lags - 1 :]
    for lag in range(lags):
        token, owner = tokens[lags - 1 - lag :], owners[lags - 1 - lag :]
        for j in range(count):
            blocked[j] |= (token[j] == DEAD) | (owner[j] != now[j])
            seen[j] = pad if blocked[j] else token[j]
        for layer in range(layers):
            running, multiplier = work[2 + layer, :count], multipliers[layer, lag]
            if lag == 0:
                running[:] = 0
            for j in range(count):
                running[j] ^= seen[j] * multiplier
            if order_ending[lag] >= 0:
                mixes[layer * orders + order_ending[lag], :count] = running
        if lag > 0:
            for j in range(count):
                blocked[j] |= token[j] == eos


@kernel
def spread(mixes, heads, ids):
    """Give each mix [L * orders, count] to all heads: ids [count * L * orders * heads]."""
    columns, heads, k = np.uint64(len(mixes)), np.uint64(heads), np.uint64(0)  # unsigned: never counts from the end
    for j in range(np.uint64(ids.size) // (columns * heads)):
        for column in range(columns):
            value = mixes[column, j]
            for _ in range(heads // np.uint64(8)):
                fill_8(ids, k, value)
                k += np.uint64(8)
            for _ in range(heads % np.uint64(8)):
                ids[k] = value
                k += np.uint64(1)


@intrinsic
def fill_8(typing, array, first, value):
    """array[first : first + 8] = value, int64, in one store: a loop over so few would take eight."""

    def generate(context, builder, signature, arguments):
        eight, index = ir.VectorType(ir.IntType(64), 8), ir.IntType(32)
        lanes = builder.insert_element(ir.Constant(eight, ir.Undefined), arguments[2], index(0))
        lanes = builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(index, 8), [0] * 8))
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), eight.as_pointer())
        builder.store(lanes, place, align=8)
        return context.get_dummy_value()

    return types.void(array, first, value), generate


@kernel
def remainders(ids, sizes, reciprocals, offsets):
    """ids % sizes + offsets, in place, for ids from 0 to 2^63 - 1 and sizes from 2^14 on."""
    for k in range(ids.size):
        rest = np.uint64(ids[k] - np.int64(np.float64(ids[k]) * reciprocals[k]) * sizes[k])
        ids[k] = np.int64(min(rest, rest - np.uint64(sizes[k]))) + offsets[k]  # below zero is far above
