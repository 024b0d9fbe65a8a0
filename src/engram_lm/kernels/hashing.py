# mypy: allow-untyped-defs
"""Hashing of n-grams, a stretch of positions at a time, so that the loops over it vectorise.

Remainders are taken by multiplying with the reciprocal in float64, eight heads at once. With u = 2^-53, the five roundings
(of x, of size, of 1 / size, of this lowered by 8u, of the product) change the quotient of x < 2^63 by a factor within
1 ± 5.01u. Lowered, it is never too large, and too small by less than 2^63 / size * 13.1u, which is below 0.82 from size
2^14 on. Its whole part is then right or one too small, and one subtraction at most gives the exact remainder. Smaller
sizes take `%`, as do heads left over from eights.
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
STRETCH = 256  # positions that are mixed together
SMALLEST = 2**14  # size whose reciprocal will do
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
    sizes: np.ndarray  # [L * K]
    reciprocals: np.ndarray  # [L * K]
    offsets: np.ndarray  # [L * K]

    @staticmethod
    def of(plan: Any) -> Constants:
        """Derive them from a HashPlan."""
        order_ending = np.full(plan.orders[-1], -1)
        order_ending[np.array(plan.orders) - 1] = np.arange(len(plan.orders))
        sizes = plan.sizes.ravel()
        return Constants(
            multipliers=np.ascontiguousarray(plan.multipliers),
            order_ending=order_ending,
            orders=len(plan.orders),
            heads=plan.heads,
            pad=plan.pad,
            eos=DEAD if plan.eos is None else plan.eos,
            vocab_size=plan.vocab_size,
            by_reciprocal=bool(sizes.min() >= SMALLEST),
            sizes=sizes,
            reciprocals=lowered(sizes),
            offsets=plan.offsets.ravel(),
        )


def lowered(sizes: np.ndarray) -> np.ndarray:
    """Reciprocals, a little too small."""
    return 1 / sizes * (1 - 2**-50)


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
    tokens, owners = np.empty(past + STRETCH, np.int64), np.empty(past + STRETCH, np.int64)
    work = np.empty((2 + len(multipliers), STRETCH), np.int64)
    mixes = np.empty((len(multipliers) * orders, STRETCH), np.int64)
    while lo < hi:
        row, first = divmod(lo, length)
        count = min(STRETCH, length - first, hi - lo)
        if any_outside(canonical[row, first : first + count], vocab_size):
            outside[0] = True
        look(canonical[row], segments[row], dead[row], history[row], first, tokens[: past + count], owners)
        mix(tokens, owners, multipliers, order_ending, pad, eos, count, work, mixes)
        reduce(mixes, heads, by_reciprocal, sizes, reciprocals, offsets, ids[lo * width : (lo + count) * width])
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
def reduce(mixes, heads, by_reciprocal, sizes, reciprocals, offsets, ids):
    """ids [count * L * orders * heads] = each mix [L * orders, count] % each size of its heads + offset."""
    columns, heads, k = np.uint64(len(mixes)), np.uint64(heads), np.uint64(0)  # unsigned: never counts from the end
    eights = heads // np.uint64(8) if by_reciprocal else np.uint64(0)
    for j in range(np.uint64(ids.size) // (columns * heads)):
        head = np.uint64(0)
        for column in range(columns):
            mixed = mixes[column, j]
            for _ in range(eights):
                reduce_8(mixed, sizes, reciprocals, offsets, head, ids, k)
                head += np.uint64(8)
                k += np.uint64(8)
            for _ in range(heads - np.uint64(8) * eights):
                ids[k] = mixed % sizes[head] + offsets[head]
                head += np.uint64(1)
                k += np.uint64(1)


@intrinsic
def reduce_8(typing, mix, sizes, reciprocals, offsets, head, ids, k):
    """ids[k : k + 8] = mix % sizes[head : head + 8] + offsets[head : head + 8], in eight lanes at once."""

    def generate(context, builder, signature, arguments):
        mix, _, _, _, head, _, k = arguments
        int32, int64s, doubles = ir.IntType(32), ir.VectorType(ir.IntType(64), 8), ir.VectorType(ir.DoubleType(), 8)

        def place(argument, index, kind):
            data = context.make_array(signature.args[argument])(context, builder, arguments[argument]).data
            return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())

        mixes = builder.insert_element(ir.Constant(int64s, ir.Undefined), mix, int32(0))
        mixes = builder.shuffle_vector(mixes, mixes, ir.Constant(ir.VectorType(int32, 8), [0] * 8))
        size = builder.load(place(1, head, int64s), align=8)
        reciprocal = builder.load(place(2, head, doubles), align=8)
        offset = builder.load(place(3, head, int64s), align=8)
        quotient = builder.fptosi(builder.fmul(builder.sitofp(mixes, doubles), reciprocal), int64s)
        rest = builder.sub(mixes, builder.mul(quotient, size))
        less = builder.sub(rest, size)
        rest = builder.select(builder.icmp_unsigned("<", rest, less), rest, less)
        builder.store(builder.add(rest, offset), place(5, k, int64s), align=8)
        return context.get_dummy_value()

    return types.void(mix, sizes, reciprocals, offsets, head, ids, k), generate
