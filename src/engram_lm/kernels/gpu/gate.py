# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gates: forward five numbers about each, its facts; backward the slopes that whole tiles are multiplied with."""

from __future__ import annotations

import triton
import triton.language as tl

GATE, SCORE, QUERY, KEY, NORM = (tl.constexpr(i) for i in range(5))  # 1 / rms of query, of key, of gate * value
FACTS = tl.constexpr(5)
SHRINK, PULL, QUERY_SHRINK, KEY_SHRINK = (tl.constexpr(i) for i in range(4))
SLOPES = tl.constexpr(4)
LEAST = tl.constexpr(1e-6)  # the least |score| that is squashed
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), with the square of the approximate 1 / sqrt: five instructions, where a division alone takes five."""
    root = tl.math.rsqrt(1.0 + tl.math.exp2(x * -LOG2E))
    return root * root


@triton.jit
def squashed(score, SQUASH: tl.constexpr):
    """What goes into the sigmoid, see EngramConfig.gate; NaN stays NaN."""
    if SQUASH == "plain":
        return score
    size = tl.abs(score)
    root = tl.sqrt(tl.where(size < LEAST, LEAST, size))
    signed = tl.where(score.to(tl.int32, bitcast=True) < 0, -root, root)
    return tl.where(score == 0.0, 0.0, signed) if SQUASH == "signed_sqrt" else signed


@triton.jit
def squashed_slope(score, SQUASH: tl.constexpr):
    """The derivative of `squashed`."""
    if SQUASH == "plain":
        return tl.full(score.shape, 1.0, tl.float32)
    size = tl.abs(score)
    return tl.where(size < LEAST, 0.0, 0.5 / tl.sqrt(tl.where(size < LEAST, LEAST, size)))


@triton.jit
def part_of(steps, total, D: tl.constexpr, STREAMS: tl.constexpr, WIDTH: tl.constexpr):
    """The program's block of columns and its share, from position `first` to before `last`; its streams and its columns."""
    BLOCKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    block, share = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    m, d = tl.arange(0, STREAMS)[:, None], block * WIDTH + tl.arange(0, WIDTH)[None, :]
    return block, share, share * steps, tl.minimum(share * steps + steps, total), m, d


@triton.jit
def streams_of(keep, token, m, M: tl.constexpr):
    """[STREAMS, 1] bool: the streams that there are; none of a silenced token."""
    there = m < M
    if keep is not None:
        there = m < tl.where(tl.load(keep + token) != 0, M, 0)
    return there


@triton.jit
def load_value(projected, token, there, m, d, M: tl.constexpr, D: tl.constexpr):
    """[STREAMS, WIDTH]: once for each stream, as a tile's other inputs are laid out."""
    at = projected + token * ((M + 1) * D) + (M * D + d)
    return tl.load(tl.broadcast_to(at, [m.shape[0], d.shape[1]]), there & (d < D), 0.0).to(tl.float32)


@triton.jit
def find_facts(
    query, projected, gain, keep, facts, length, query_b, query_t, query_m, eps, conv_eps,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, NORMED: tl.constexpr, STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """facts [B * T, M, 5] of one token a program. A silenced token is not read: it counts as zeros.

    query has strides query_b, query_t, query_m, 1. NORMED: there is a convolution; without one NORM is one.
    """
    token = tl.program_id(0).to(tl.int64)
    m, d = tl.arange(0, STREAMS)[:, None], tl.arange(0, WIDTH)[None, :]
    wanted = streams_of(keep, token, m, M)
    query += token // length * query_b + token % length * query_t + m * query_m + d
    key = projected + (token * (M + 1) + m) * D + d
    gain += m * D + d

    product = tl.zeros([STREAMS, WIDTH], tl.float32)
    query_square, key_square, value_square = product, product, product
    for start in range(0, D, WIDTH):
        here = wanted & (start + d < D)
        q = tl.load(query + start, here, 0.0).to(tl.float32)
        k = tl.load(key + start, here, 0.0).to(tl.float32)
        product += q * k * tl.load(gain + start, here, 0.0)
        query_square += q * q
        key_square += k * k
        if NORMED:
            v = load_value(projected, token, wanted, m, start + d, M, D)
            value_square += v * v

    query_scale = tl.math.rsqrt(tl.sum(query_square, 1, keep_dims=True) / D + eps)
    key_scale = tl.math.rsqrt(tl.sum(key_square, 1, keep_dims=True) / D + eps)
    score = tl.sum(product, 1, keep_dims=True) * (query_scale * key_scale) * (1 / D**0.5)
    gate = sigmoid(squashed(score, SQUASH))
    norm = tl.full(gate.shape, 1.0, tl.float32)
    if NORMED:
        norm = tl.math.rsqrt(gate * gate * (tl.sum(value_square, 1, keep_dims=True) / D) + conv_eps)
    facts += (token * M + m) * FACTS
    tl.store(facts + GATE, gate, m < M)
    tl.store(facts + SCORE, score, m < M)
    tl.store(facts + QUERY, query_scale, m < M)
    tl.store(facts + KEY, key_scale, m < M)
    tl.store(facts + NORM, norm, m < M)


@triton.jit
def find_slopes(
    sums, facts, slopes, gates, conv_eps,
    D: tl.constexpr, SQUASH: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """slopes [gates, 4] from facts [gates, 5] and sums [BLOCKS, gates, 2], see conv.convolve_back; SIZE gates a program.

    With delta = gate * value + SiLU(mixed), and mixed the convolution of normed = norm * gate * value:
        value's gradient = sum over m of (gate * delta_grad + gate * norm * normed_grad - SHRINK * value)
        query's = PULL * gain * key - QUERY_SHRINK * query; key's alike; gain's = sum over tokens of PULL * query * key
    """
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    real, block = at < gates, tl.arange(0, PADDED)[:, None]
    part = sums + (block.to(tl.int64) * gates + at[None, :]) * 2
    direct = tl.sum(tl.load(part, (block < BLOCKS) & real[None, :], 0.0), 0)
    normed = tl.sum(tl.load(part + 1, (block < BLOCKS) & real[None, :], 0.0), 0)
    gate, norm = tl.load(facts + at * FACTS + GATE, real, 0.0), tl.load(facts + at * FACTS + NORM, real, 1.0)
    score = tl.load(facts + at * FACTS + SCORE, real, 0.0)
    query, key = tl.load(facts + at * FACTS + QUERY, real, 0.0), tl.load(facts + at * FACTS + KEY, real, 0.0)

    # The sums have gate * norm in them; so this is the gate's gradient times the gate, and nothing is divided by a gate.
    opened = direct / norm + conv_eps * norm * norm * normed
    score_grad = opened * (1.0 - gate) * squashed_slope(score, SQUASH)
    slopes += at * SLOPES
    tl.store(slopes + SHRINK, (gate * norm) * (gate * norm) * normed / D, real)
    tl.store(slopes + PULL, score_grad * (query * key) * (1 / D**0.5), real)
    tl.store(slopes + QUERY_SHRINK, score_grad * score * (query * query) / D, real)
    tl.store(slopes + KEY_SHRINK, score_grad * score * (key * key) / D, real)


@triton.jit
def spread(
    query, projected, gain, keep, slopes, value_grad, query_grad, projected_grad, gain_shares,
    length, query_b, query_t, query_m, steps, tokens,
    M: tl.constexpr, D: tl.constexpr, STREAMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of query [B, T, M, D] and projected [B, T, M + 1, D], and each share's part [shares, M, D] of the gain's.

    A program has a block of columns of `steps` tokens. value_grad is conv.convolve_back's, the formulas are at find_slopes.
    """
    _, share, first, last, m, d = part_of(steps, tokens, D, STREAMS, WIDTH)
    real = (m < M) & (d < D)
    gains, gain_grad = tl.load(gain + m * D + d, real, 0.0), tl.zeros([STREAMS, WIDTH], tl.float32)
    for number in tl.range(first, last, num_stages=2):
        token = tl.cast(number, tl.int64)
        there = streams_of(keep, token, m, M)
        slope, key_at = slopes + token * (M * SLOPES) + m * SLOPES, token * ((M + 1) * D) + (m * D + d)
        query_at = query + (token // length * query_b + token % length * query_t) + (m * query_m + d)
        q = tl.load(query_at, there & (d < D), 0.0).to(tl.float32)
        k = tl.load(projected + key_at, there & (d < D), 0.0).to(tl.float32)
        pull = tl.load(slope + PULL, there, 0.0)
        from_query = tl.load(slope + QUERY_SHRINK, there, 0.0) * q
        from_key = tl.load(slope + KEY_SHRINK, there, 0.0) * k
        tl.store(query_grad + token * (M * D) + (m * D + d), pull * gains * k - from_query, real)
        tl.store(projected_grad + key_at, pull * gains * q - from_key, real)
        gain_grad += pull * (q * k)

        shrink = tl.sum(tl.load(slope + SHRINK, there, 0.0), 0, keep_dims=True)
        place = tl.broadcast_to(token * D + d, [STREAMS, WIDTH])
        direct = tl.load(value_grad + place, real & (m == 0), 0.0)
        from_value = direct - shrink * load_value(projected, token, there, m, d, M, D)
        value_at = tl.broadcast_to(projected_grad + token * ((M + 1) * D) + (M * D + d), [STREAMS, WIDTH])
        tl.store(value_at, from_value, real & (m == 0))
    tl.store(gain_shares + (share.to(tl.int64) * M + m) * D + d, gain_grad, real)
