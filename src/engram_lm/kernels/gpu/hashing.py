# mypy: allow-untyped-defs, allow-incomplete-defs
"""Hashing of n-grams: a program takes some positions of one memory layer.

Remainders are taken by multiplying with the reciprocal in integers (Barrett 1986). With r = floor(2^64 / size), or 2^64 - 1 for
size 1, and mix < 2^63, the product mix * r / 2^64 falls short of mix / size by less than 1/2. Its whole part is then right or
one too small, and one subtraction at most gives the exact remainder, for any size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

DEAD = tl.constexpr(-1)  # in a history: a position that no later n-gram may see
OUTSIDE = tl.constexpr(-2)  # in a history: an id outside the vocabulary; what sees it reads row -1
IDS = 512  # of an order that a program works on at a time


class Constants(NamedTuple):
    """What the kernel needs of a plan with L memory layers, N lags and K = orders * heads ids a layer."""

    multipliers: Tensor  # [L, N] int64
    sizes: Tensor  # [L, K] int64
    reciprocals: Tensor  # [L, K] uint64
    offsets: Tensor  # [L, K] int64
    orders: tuple[int, ...]
    heads: int
    vocab_size: int
    pad: int
    eos: int  # DEAD if the window never resets


@functools.cache  # for good: a captured graph reads them
def constants(plan: Any, device: torch.device) -> Constants:
    """Those of a HashPlan on a device; copied to it at the first call, which must not be captured in a graph."""
    return Constants(
        multipliers=torch.tensor(plan.multipliers, device=device),
        sizes=torch.tensor(plan.sizes, device=device),
        reciprocals=torch.tensor(reciprocals(plan.sizes), device=device),
        offsets=torch.tensor(plan.offsets, device=device),
        orders=plan.orders,
        heads=plan.heads,
        vocab_size=plan.vocab_size,
        pad=plan.pad,
        eos=DEAD.value if plan.eos is None else plan.eos,
    )


def reciprocals(sizes: np.ndarray) -> np.ndarray:
    """floor(2^64 / size) as uint64, or the next smaller number for size 1."""
    return np.array([min(2**64 // size, 2**64 - 1) for size in sizes.ravel().tolist()], np.uint64).reshape(sizes.shape)


def hash_ngrams(
    constants: Constants, canonical: Tensor, segments: Tensor | None, dead: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids [B, T, L, K] and the history [B, N-1, 2] after them, both int64, in one launch.

    canonical and segments [B, T] are integers, dead [B, T] is bool, history [B, N-1, 2] is int64, all on the device of the
    constants; None means what it means in `engram_lm.hashing.hash_ngrams`. T is not 0. N-grams that see an id outside the
    vocabulary have row id -1.
    """
    (batch, length), (layers, lags) = canonical.shape, constants.multipliers.shape
    ids = torch.empty((batch, length, *constants.sizes.shape), dtype=torch.int64, device=canonical.device)
    after = torch.empty((batch, lags - 1, 2), dtype=torch.int64, device=canonical.device)
    texts = (None if x is None else x.contiguous() for x in (canonical, segments, dead, history if lags > 1 else None))
    tables = constants.multipliers, constants.sizes, constants.reciprocals, constants.offsets
    numbers = batch * length, length, constants.vocab_size, constants.pad, constants.eos
    width = triton.next_power_of_2(constants.heads)
    block = max(1, IDS // width)
    hash_positions[triton.cdiv(batch * length, block), layers](
        *texts, *tables, *numbers, ids, after,
        LAGS=lags, ENDS=sum(1 << order - 1 for order in constants.orders), ORDERS=len(constants.orders),
        HEADS=constants.heads, WIDTH=width, BLOCK=block,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return ids, after


@triton.jit(do_not_specialize=["positions", "length", "vocab_size", "pad", "eos"])
def hash_positions(
    canonical, segments, dead, history,
    multipliers, sizes, reciprocals, offsets,
    positions, length, vocab_size, pad, eos,
    ids, after,
    LAGS: tl.constexpr, ENDS: tl.constexpr, ORDERS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids of BLOCK of all B * T positions in one layer; a sequence's new history goes along with its last position.

    ENDS has a bit for each lag with which an order ends; WIDTH is the power of two that HEADS fit into.
    """
    layer, layers = tl.program_id(1), tl.num_programs(1)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = position < positions
    row, time = position // length, position % length
    last = exists & (time == length - 1)

    head = tl.arange(0, WIDTH)
    column = layer * ORDERS * HEADS + head  # of [L, K]
    first = position.to(tl.int64) * (layers * ORDERS * HEADS)
    mask = exists[:, None] & (head < HEADS)[None, :]

    now = owners(segments, history, row, time, length, exists, LAGS - 1)
    blocked = tl.zeros((BLOCK,), tl.int1)  # once the view is blocked it stays so for larger lags
    outside = tl.zeros((BLOCK,), tl.int1)
    mix = tl.zeros((BLOCK,), tl.int64)
    for lag in tl.static_range(LAGS):
        token = tokens(canonical, dead, history, row, time - lag, length, vocab_size, exists, LAGS - 1)
        owner = owners(segments, history, row, time - lag, length, exists, LAGS - 1)
        if lag < LAGS - 1 and layer == 0:
            slot = after + 2 * (row * (LAGS - 1) + LAGS - 2 - lag)
            tl.store(slot, token, mask=last)
            tl.store(slot + 1, owner, mask=last)
        blocked |= (token == DEAD) | (owner != now)
        outside |= (token == OUTSIDE) & ~blocked
        seen = tl.where(blocked, pad, token)
        mix ^= seen * tl.load(multipliers + layer * LAGS + lag)
        if (ENDS >> lag) & 1:
            found = remainders(mix, sizes + column, reciprocals + column, head < HEADS)
            found += tl.load(offsets + column, mask=head < HEADS)[None, :]
            found = tl.where(outside[:, None], -1, found)
            tl.store(ids + first[:, None] + column[None, :], found, mask=mask)
            column += HEADS
        if lag > 0:
            blocked |= token == eos


@triton.jit
def tokens(canonical, dead, history, row, time, length, vocab_size, exists, PAST: tl.constexpr):
    """What stands at `time` of the sequences `row`; a negative time is in the history."""
    new = exists & (time >= 0)
    at = row * length + time
    token = tl.load(canonical + at, mask=new, other=0).to(tl.int64)
    token = tl.where((token >= 0) & (token < vocab_size), token, OUTSIDE)
    if dead is not None:
        token = tl.where(tl.load(dead + at, mask=new, other=False), DEAD, token)
    if history is None:
        old = tl.zeros_like(token) + DEAD
    else:
        old = tl.load(history + 2 * (row * PAST + PAST + time), mask=exists & (time < 0), other=DEAD)
    return tl.where(time >= 0, token, old)


@triton.jit
def owners(segments, history, row, time, length, exists, PAST: tl.constexpr):
    """Which document it belongs to. Without `segments` the history's last one goes on."""
    if history is None:
        owner = tl.zeros_like(row).to(tl.int64)
    else:
        slot = tl.minimum(time, -1 if segments is None else time)
        owner = tl.load(history + 2 * (row * PAST + PAST + slot) + 1, mask=exists & (slot < 0), other=0)
    if segments is not None:
        new = tl.load(segments + row * length + time, mask=exists & (time >= 0), other=0).to(tl.int64)
        owner = tl.where(time >= 0, new, owner)
    return owner


@triton.jit
def remainders(mix, sizes, reciprocals, mask):
    """mix [P] modulo sizes [K]: [P, K]."""
    size, reciprocal = tl.load(sizes, mask=mask, other=1), tl.load(reciprocals, mask=mask, other=0)
    quotient = tl.umulhi(mix.to(tl.uint64)[:, None], reciprocal[None, :]).to(tl.int64)
    rest = mix[:, None] - quotient * size[None, :]
    return tl.where(rest < size[None, :], rest, rest - size[None, :])
