# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton knows no (*tuple, more))
"""The short convolution, forward and backward.

Positions t, t + dilation, t + 2 * dilation, ... are a chain: the convolution couples no others. A program walks along a chain
with some columns of all streams, a tile [STREAMS, WIDTH], and what it needs of other positions it had k - 1 steps ago at most:
it is still in registers. The chains, laid end to end, are cut into shares of `steps` positions, a share for one program in
each block of columns; before its share a program takes the k - 1 steps that fill the registers.

Backward walks towards the past, since a position's gradient needs those of later outputs, and recomputes the convolution on the
way: that is cheaper than to store and load it.

A program is one warp, so no sum waits for other warps. Of a loop k - 1 steps are unrolled: by then every tile has been
replaced, so none is moved between registers, and Triton asks for the inputs of the next k - 1 steps beforehand. Above four
taps, which no published layout has, that would take the compiler minutes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gate import FACTS, GATE, NORM, load_value, part_of, sigmoid


@triton.jit
def load_weights(taps, m, d, M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr):
    """Tiles of the taps for lag 0, 1, ..., k - 1."""
    weights = ()
    for lag in tl.static_range(TAPS):
        weights = weights + (tl.load(taps + ((TAPS - 1 - lag) * M + m) * D + d, (m < M) & (d < D), 0.0),)
    return weights


@triton.jit
def load_document(segments, sequence, t, length):
    """The number of a position's document. sequence: the index of its first token."""
    if segments is None:
        document = tl.zeros([], tl.int64)
    else:
        document = tl.load(segments + sequence + t, (t >= 0) & (t < length), 0)
    return document


@triton.jit
def if_same(x, document, other, segments):
    """x if two documents are the same one, else zero."""
    if segments is not None:
        x = tl.where(document == other, x, 0.0)
    return x


@triton.jit
def streams_at(keep, sequence, t, length, m, M: tl.constexpr):
    """[STREAMS, 1] bool: the streams that there are at t; none if it is silenced, or outside the sequence."""
    known = (t >= 0) & (t < length)
    if keep is not None:
        known = known & (tl.load(keep + sequence + t, known, 0) != 0)
    return m < tl.where(known, M, 0)


@triton.jit
def load_normed(projected, facts, keep, sequence, t, length, m, d, M: tl.constexpr, D: tl.constexpr):
    """gate * norm * value, which the convolution sees of position t; zero where there is none."""
    there = streams_at(keep, sequence, t, length, m, M)
    fact = facts + (sequence + t) * (M * FACTS) + m * FACTS
    scale = tl.load(fact + GATE, there, 0.0) * tl.load(fact + NORM, there, 0.0)
    return scale * load_value(projected, sequence + t, there, m, d, M, D)


@triton.jit
def convolve(
    projected, taps, segments, keep, facts, delta, length, dilation, chain, steps, total,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, STREAMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """delta [B, T, M, D] = gate * value + SiLU(convolution)."""
    PERIOD: tl.constexpr = TAPS - 1 if TAPS > 1 and TAPS < 5 else 1
    _, _, first, last, m, d = part_of(steps, total, D, STREAMS, WIDTH)
    weights = load_weights(taps, m, d, M, D, TAPS)
    for number in range(first // chain, (last - 1) // chain + 1):
        sequence = (number // dilation).to(tl.int64) * length
        begin, end = tl.maximum(first - number * chain, 0), tl.minimum(last - number * chain, chain)
        past, documents = (), ()  # at t - dilation, t - 2 * dilation, ...
        for lag in tl.static_range(1, TAPS):
            t = number % dilation + (begin - lag) * dilation
            past = past + (load_normed(projected, facts, keep, sequence, t, length, m, d, M, D),)
            documents = documents + (load_document(segments, sequence, t, length),)

        for i in tl.range(begin, end, num_stages=2, loop_unroll_factor=PERIOD):
            t = number % dilation + i * dilation
            there = streams_at(keep, sequence, t, length, m, M)
            fact = facts + (sequence + t) * (M * FACTS) + m * FACTS
            out = tl.load(fact + GATE, there, 0.0) * load_value(projected, sequence + t, there, m, d, M, D)
            if TAPS:
                seen = (tl.load(fact + NORM, there, 0.0) * out,) + past
                known = (load_document(segments, sequence, t, length),) + documents
                mixed = seen[0] * weights[0]
                for lag in tl.static_range(1, TAPS):
                    mixed += if_same(seen[lag], known[lag], known[0], segments) * weights[lag]
                out += mixed * sigmoid(mixed)
                past, documents = seen[: TAPS - 1], known[: TAPS - 1]
            real = (m < tl.where(t < length, M, 0)) & (d < D)
            tl.store(delta + (sequence + t) * (M * D) + (m * D + d), out, real)


@triton.jit
def step_back(
    past, later, past_documents, later_documents, weights, projected, segments, keep, facts, delta_grad, sequence, t,
    length, dilation, m, d, M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """What there is at position t, and the state of the walk for t - dilation.

    The state, k - 1 of each: inputs of the convolution at t, t - dilation, ...; gradients of its outputs at t + dilation,
    t + 2 * dilation, ...; and the documents of both. What there is: delta's gradient, the convolution's input, and for each lag
    the gradient of its output at t + lag * dilation, zero if that is in another document.
    """
    oldest = t - (TAPS - 1 if TAPS else 0) * dilation
    seen = past + (load_normed(projected, facts, keep, sequence, oldest, length, m, d, M, D),)
    real = (m < tl.where(t < length, M, 0)) & (d < D)
    upstream = tl.load(delta_grad + (sequence + t) * (M * D) + (m * D + d), real, 0.0).to(tl.float32)
    received = ()
    if TAPS:
        seen_documents = past_documents + (load_document(segments, sequence, oldest, length),)
        documents = (load_document(segments, sequence, t, length),) + later_documents
        mixed = seen[0] * weights[0]
        for lag in tl.static_range(1, TAPS):
            mixed += if_same(seen[lag], seen_documents[lag], documents[0], segments) * weights[lag]
        opening = sigmoid(mixed)
        mixed_grads = (upstream * opening * (1.0 + mixed * (1.0 - opening)),) + later
        for lag in tl.static_range(TAPS):
            received = received + (if_same(mixed_grads[lag], documents[lag], documents[0], segments),)
        later, past_documents, later_documents = mixed_grads[: TAPS - 1], seen_documents[1:], documents[: TAPS - 1]
    return upstream, seen[0], received, seen[1:], later, past_documents, later_documents


@triton.jit
def begin_back(
    weights, projected, segments, keep, facts, delta_grad, sequence, t, length, dilation, m, d,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The state of a walk whose first step is at t."""
    past, later, past_documents, later_documents = (), (), (), ()
    for lag in tl.static_range(TAPS - 1, 0, -1):
        at = t + lag * dilation
        past = past + (load_normed(projected, facts, keep, sequence, at, length, m, d, M, D),)
        past_documents = past_documents + (load_document(segments, sequence, at, length),)
        later = later + (tl.zeros([m.shape[0], d.shape[1]], tl.float32),)
        later_documents = later_documents + (tl.zeros([], tl.int64),)
    for lag in tl.static_range(TAPS - 1, 0, -1):
        _, _, _, past, later, past_documents, later_documents = step_back(
            past, later, past_documents, later_documents, weights, projected, segments, keep, facts, delta_grad,
            sequence, t + lag * dilation, length, dilation, m, d, M, D, TAPS,
        )  # fmt: skip
    return past, later, past_documents, later_documents


@triton.jit
def weighed(received, weights, TAPS: tl.constexpr):
    """The gradient of the convolution's input."""
    total = received[0] * weights[0]
    for lag in tl.static_range(1, TAPS):
        total += received[lag] * weights[lag]
    return total


@triton.jit
def convolve_back(
    projected, taps, segments, keep, facts, delta_grad, value_grad, sums, taps_shares,
    length, dilation, chain, steps, total,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, STREAMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What the gates' backward needs, and each share's part [shares, k, M, D] of the gradient of taps.

    With normed the convolution's input: sums [blocks, B * T, M, 2] over a block's columns of delta_grad * normed and of
    normed_grad * normed; and value_grad [B * T, D] float32, the value's gradient as if gate and norm were constants.
    """
    PERIOD: tl.constexpr = TAPS - 1 if TAPS > 1 and TAPS < 5 else 1
    block, share, first, last, m, d = part_of(steps, total, D, STREAMS, WIDTH)
    weights = load_weights(taps, m, d, M, D, TAPS)
    sums += block.to(tl.int64) * (total // chain // dilation) * length * (M * 2) + m * 2
    taps_grads = ()
    for _ in tl.static_range(TAPS):
        taps_grads = taps_grads + (tl.zeros([STREAMS, WIDTH], tl.float32),)

    for number in range(first // chain, (last - 1) // chain + 1):
        sequence = (number // dilation).to(tl.int64) * length
        begin, end = tl.maximum(first - number * chain, 0), tl.minimum(last - number * chain, chain)
        newest = number % dilation + (end - 1) * dilation
        past, later, past_documents, later_documents = begin_back(
            weights, projected, segments, keep, facts, delta_grad, sequence, newest, length, dilation, m, d, M, D, TAPS
        )
        for i in tl.range(0, end - begin, num_stages=2, loop_unroll_factor=PERIOD):
            t = newest - i * dilation
            upstream, normed, received, past, later, past_documents, later_documents = step_back(
                past, later, past_documents, later_documents, weights, projected, segments, keep, facts, delta_grad,
                sequence, t, length, dilation, m, d, M, D, TAPS,
            )  # fmt: skip
            token, there = sequence + t, streams_at(keep, sequence, t, length, m, M)
            at, real = sums + token * (M * 2), m < tl.where(t < length, M, 0)
            gate = tl.load(facts + token * (M * FACTS) + (m * FACTS + GATE), there, 0.0)
            tl.store(at, tl.sum(upstream * normed, 1, keep_dims=True), real)
            direct = gate * upstream
            if TAPS:
                normed_grad = weighed(received, weights, TAPS)
                tl.store(at + 1, tl.sum(normed_grad * normed, 1, keep_dims=True), real)
                direct += gate * tl.load(facts + token * (M * FACTS) + (m * FACTS + NORM), there, 0.0) * normed_grad
                sofar, taps_grads = taps_grads, ()
                for lag in tl.static_range(TAPS):
                    taps_grads = taps_grads + (sofar[lag] + received[lag] * normed,)
            else:
                tl.store(at + 1, tl.zeros([STREAMS, 1], tl.float32), real)
            if keep is not None:  # what is received may be NaN
                direct = tl.where(there, direct, 0.0)
            direct = tl.broadcast_to(tl.sum(direct, 0, keep_dims=True), [STREAMS, WIDTH])
            place = tl.broadcast_to(value_grad + token * D + d, [STREAMS, WIDTH])
            tl.store(place, direct, real & (m == 0) & (d < D))

    for lag in tl.static_range(TAPS):
        row = (share * TAPS + TAPS - 1 - lag).to(tl.int64) * M + m
        tl.store(taps_shares + row * D + d, taps_grads[lag], (m < M) & (d < D))
