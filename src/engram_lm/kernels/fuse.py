# mypy: allow-untyped-defs
"""What Engram does with projected rows, in one pass over the tokens forward and one backward.

memory.py says the same in plain operations, each of them a pass over [B, T, M, D]; here what a token needs stays in the
cache. The normalised input of the convolution is gate * norm * value, so neither it nor its past is stored, and backward
keeps five numbers a gate. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from . import run

SQUASHES = ("plain", "signed_sqrt", "copysign_sqrt")
GATE, SCORE, QUERY, KEY, NORM = range(5)  # facts: the gate, its score, 1 / rms of query, of key, of gate * value
SPAN = 128  # positions that are worked on, and whose weight gradients are summed, in one go, whatever the threads
PART = 2**17  # numbers in the streams that are worth a thread of their own


def fuse(
    plain: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    projected: Tensor,
    gain: Tensor,
    taps: Tensor,
    *,
    segments: Tensor | None,
    keep: Tensor | None,
    config: Any,
) -> Tensor:
    """What plain(query, projected, gain, taps) gives, up to rounding: [B, T, M, D] float32 on the CPU, like the inputs.

    query [B, T, M, D], projected [B, T, M + 1, D] (M keys and the value), gain [M, D] (the query's times the key's), taps
    [k, M, D] (times the convolution's gain), segments and keep [B, T], config an EngramConfig. Gradients are the same bits
    for any number of threads; gradients of gradients are those of `plain`.
    """
    if segments is None:
        segments = torch.zeros(query.shape[:2], dtype=torch.int64)
    if keep is not None:  # where a value is zero, nothing has an effect
        projected = projected.masked_fill(~keep[:, :, None, None], 0.0)
    inputs = [x.contiguous() for x in (query, projected, gain, taps, segments.long())]
    settings = (
        config.conv_dilation,
        SQUASHES.index(config.gate),
        np.float32(config.norm_eps),
        np.float32(config.conv_norm_eps),
    )
    return _Fuse.apply(*inputs, settings, plain)[0]


class _Fuse(torch.autograd.Function):
    """`fuse` on contiguous inputs; the second output are facts for backward."""

    @staticmethod
    def forward(
        query: Tensor, projected: Tensor, gain: Tensor, taps: Tensor, segments: Tensor, settings: Any, plain: Any
    ) -> tuple[Tensor, Tensor]:
        delta, facts = torch.empty_like(query), query.new_empty(*query.shape[:3], 5)
        arrays = [x.detach().numpy() for x in (query, projected, gain, taps, segments, facts, delta)]
        run(forward, _spans(query), *settings, *arrays, grain=1 + PART // (SPAN * gain.numel()))
        return delta, facts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.settings, ctx.plain = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, delta_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, projected, gain, taps, _, _ = given = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradients' own
            return *torch.func.vjp(ctx.plain, query, projected, gain, taps)[1](delta_grad), None, None, None
        spans = _spans(query)
        shares = [x.new_empty(spans, *x.shape) for x in (gain, taps)]
        wanted = [torch.empty_like(query), torch.empty_like(projected), *shares]
        arrays = [x.detach().numpy() for x in (*given, delta_grad.contiguous(), *wanted)]
        run(backward, spans, *ctx.settings, *arrays, grain=1 + PART // (SPAN * gain.numel()))
        weights = (torch.from_numpy(share.sum(0)) for share in arrays[-2:])  # numpy's order, unlike torch's, is fixed
        return *wanted[:2], *weights, None, None, None


def _spans(query: Tensor) -> int:
    return len(query) * -(-query.shape[1] // SPAN)


# --- the functions of one number -------------------------------------------------------------------------------------

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)  # a bare 0.5 would make it double precision
LEAST = np.float32(1e-6)  # the least |score| that is squashed
LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
LOW, HIGH = np.float32(-87), np.float32(88)  # where e^x leaves the range of normal numbers
ROUND = np.float32(1.5 * 2**23)  # leaves no bits for a fraction: the last ones of x + ROUND are round(x)
SERIES = tuple(np.float32(c) for c in (1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5))

# Sums may be reordered, so that they are vectorised, and products fused; NaN and infinity stay what they are.
quick = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # reordered, ROUND would cancel out
def exp(x):
    """e^x within 1.1 ulp (Cephes' expf), constant beyond -87 and 88; NaN stays NaN. Unlike libm's it is vectorised."""
    x = LOW if x < LOW else x
    x = HIGH if x > HIGH else x
    rounded = x * LOG2E + ROUND
    n = rounded - ROUND
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = SERIES[0]
    for c in SERIES[1:]:
        p = p * r + c
    power = np.uint32((np.uint32(np.float32(rounded).view(np.uint32)) + 127) << 23).view(np.float32)  # 2^n
    return (p * r * r + r + ONE) * power


@quick
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return ONE / (ONE + exp(-x))


@quick
def squashed(score, squash):
    """What goes into the sigmoid, see EngramConfig.gate, and its derivative."""
    size = abs(score)
    if squash == 0:
        return score, ONE
    root = np.copysign(np.sqrt(LEAST if size < LEAST else size), score)
    slope = ZERO if size < LEAST else HALF / np.sqrt(size)
    return ZERO if squash == 1 and score == 0 else root, slope


# --- tokens: arrays are indexed to the last axis, since Numba counts references to slices, which costs more than the sums


@quick
def mean_square(x, b, t, m):
    """Of x[b, t, m]."""
    total = ZERO
    for d in range(x.shape[3]):
        total += x[b, t, m, d] * x[b, t, m, d]
    return total / np.float32(x.shape[3])


@njit(inline="always")
def find_facts(b, t, squash, eps, conv_eps, query, projected, gain, facts):
    """facts [b, t, M, 5]."""
    streams, dim = gain.shape
    value_square = mean_square(projected, b, t, streams)
    for m in range(streams):
        product = ZERO
        for d in range(dim):
            product += query[b, t, m, d] * projected[b, t, m, d] * gain[m, d]
        query_scale = ONE / np.sqrt(mean_square(query, b, t, m) + eps)
        key_scale = ONE / np.sqrt(mean_square(projected, b, t, m) + eps)
        score = product * (query_scale * key_scale) / np.sqrt(np.float32(dim))
        gate = sigmoid(squashed(score, squash)[0])
        norm = ONE / np.sqrt(gate * gate * value_square + conv_eps)
        for fact, x in enumerate((gate, score, query_scale, key_scale, norm)):
            facts[b, t, m, fact] = x


@njit(inline="always")
def convolve(b, t, m, dilation, projected, taps, segments, facts, out):
    """out [D] = the convolution at t of stream m."""
    kernel, streams, dim = taps.shape
    for d in range(dim):
        out[d] = ZERO
    for tap in range(kernel):
        past = t - (kernel - 1 - tap) * dilation
        if past >= 0 and segments[b, past] == segments[b, t]:
            scale = facts[b, past, m, GATE] * facts[b, past, m, NORM]
            for d in range(dim):
                out[d] += scale * projected[b, past, streams, d] * taps[tap, m, d]


@intrinsic
def ask(typing, address):
    """Prefetch the cache line at an address."""

    def generate(context, builder, signature, arguments):
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(prefetch, [builder.inttoptr(arguments[0], pointer), i32(0), i32(3), i32(1)])  # to keep; data
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(inline="always")
def expect(x, b, t):
    """Ask for x[b, t], to be read or written two positions later: stores that wait for memory cost a quarter."""
    size = x.shape[2] * x.shape[3] * x.itemsize
    start = x.ctypes.data + (b * x.shape[1] + min(t + 2, x.shape[1] - 1)) * size
    for line in range(0, size, 64):
        ask(start + line)  # type: ignore[call-arg]


# --- spans: item i is positions i % n * SPAN onwards of sequence i // n, where n = ceil(T / SPAN)


@quick
def forward(lo, hi, dilation, squash, eps, conv_eps, query, projected, gain, taps, segments, facts, delta):
    """delta [B, T, M, D], and facts [B, T, M, 5] about the gates."""
    (kernel, streams, dim), length = taps.shape, query.shape[1]
    reach, spans = max(kernel - 1, 0) * dilation, -(-length // SPAN)
    mixed = np.empty(dim, np.float32)
    for span in range(lo, hi):
        b, first = span // spans, span % spans * SPAN
        last = min(first + SPAN, length)
        for t in range(max(first - reach, 0), last):  # what the convolution sees of the span before is found here too
            find_facts(b, t, squash, eps, conv_eps, query, projected, gain, facts)
        for t in range(first, last):
            for m in range(streams):
                convolve(b, t, m, dilation, projected, taps, segments, facts, mixed)
                gate = facts[b, t, m, GATE]
                for d in range(dim):
                    delta[b, t, m, d] = gate * projected[b, t, streams, d] + mixed[d] * sigmoid(mixed[d])


@quick
def backward(
    lo, hi, dilation, squash, eps, conv_eps, query, projected, gain, taps, segments, facts,
    delta_grad, query_grad, projected_grad, gain_grad, taps_grad,
):  # fmt: skip
    """Gradients of query and projected, and the spans' shares [span, ...] of those of gain and taps.

    A position's gradient needs that of the convolution's output up to `reach` positions later: it is found that far
    ahead and kept in a ring, so those behind a span are found here too.
    """
    (kernel, streams, dim), length = taps.shape, query.shape[1]
    reach, spans, width = max(kernel - 1, 0) * dilation, -(-length // SPAN), np.float32(dim)
    ring = np.empty((reach + 1, streams, dim), np.float32)
    mixed, normed_grad = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for span in range(lo, hi):
        b, first = span // spans, span % spans * SPAN
        last = min(first + SPAN, length)
        gain_grad[span] = ZERO
        taps_grad[span] = ZERO
        for ahead in range(first, last + reach):
            expect(projected, b, ahead)
            expect(delta_grad, b, ahead)
            for m in range(streams if ahead < length else 0):
                convolve(b, ahead, m, dilation, projected, taps, segments, facts, mixed)
                slot = ahead % (reach + 1)
                for d in range(dim):
                    opening = sigmoid(mixed[d])
                    ring[slot, m, d] = delta_grad[b, ahead, m, d] * opening * (ONE + mixed[d] * (ONE - opening))
            t = ahead - reach
            if t < first:
                continue

            expect(query, b, t)
            expect(query_grad, b, t)
            expect(projected_grad, b, t)
            for d in range(dim):
                projected_grad[b, t, streams, d] = ZERO
            for m in range(streams):
                # normed = norm * gate * value; mixed = convolution of normed
                gate, norm = facts[b, t, m, GATE], facts[b, t, m, NORM]
                scale = gate * norm
                for d in range(dim):
                    normed_grad[d] = ZERO
                for tap in range(kernel):
                    later = t + (kernel - 1 - tap) * dilation
                    if later < length and segments[b, later] == segments[b, t]:
                        slot = later % (reach + 1)
                        for d in range(dim):
                            normed_grad[d] += taps[tap, m, d] * ring[slot, m, d]
                            taps_grad[span, tap, m, d] += scale * projected[b, t, streams, d] * ring[slot, m, d]

                # delta = gate * value + SiLU(mixed); norm = 1 / sqrt(mean((gate * value)^2) + conv_eps)
                direct, normed = ZERO, ZERO
                for d in range(dim):
                    direct += delta_grad[b, t, m, d] * projected[b, t, streams, d]
                    normed += normed_grad[d] * projected[b, t, streams, d]
                shrink = scale * scale * scale * normed / width
                for d in range(dim):
                    change = gate * delta_grad[b, t, m, d] + scale * normed_grad[d]
                    projected_grad[b, t, streams, d] += change - shrink * projected[b, t, streams, d]
                gate_grad = direct + (conv_eps * norm * norm) * norm * normed

                # gate = sigmoid(squashed(score)); score = product * query_scale * key_scale / sqrt(D)
                score, query_scale, key_scale = facts[b, t, m, SCORE], facts[b, t, m, QUERY], facts[b, t, m, KEY]
                score_grad = gate_grad * gate * (ONE - gate) * squashed(score, squash)[1]
                product_grad = score_grad * (query_scale * key_scale) / np.sqrt(width)
                query_shrink = score_grad * score * (query_scale * query_scale) / width
                key_shrink = score_grad * score * (key_scale * key_scale) / width
                for d in range(dim):
                    pull = product_grad * gain[m, d] * projected[b, t, m, d]
                    query_grad[b, t, m, d] = pull - query_shrink * query[b, t, m, d]
                for d in range(dim):
                    pull = product_grad * gain[m, d] * query[b, t, m, d]
                    projected_grad[b, t, m, d] = pull - key_shrink * projected[b, t, m, d]
                for d in range(dim):
                    gain_grad[span, m, d] += product_grad * query[b, t, m, d] * projected[b, t, m, d]
