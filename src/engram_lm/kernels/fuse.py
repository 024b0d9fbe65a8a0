# mypy: allow-untyped-defs
"""What Engram does with projected rows, in one pass over the tokens forward and one backward.

memory.py says the same in plain operations, each of them a pass over [B, T, M, D]; here what a token needs stays in the
cache. The normalised input of the convolution is gate * norm * value, so neither it nor its past is stored, and backward
keeps five numbers a gate. Tokens are numbered through the batch, n = b * T + t; everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import run

SQUASHES = ("plain", "signed_sqrt", "copysign_sqrt")
GATE, SCORE, QUERY, KEY, NORM = range(5)  # facts: the gate, its score, 1 / rms of query, of key, of gate * value
SPAN = 128  # positions whose weight gradients are summed in one go: fixed, so that no sum depends on the threads
PART = 2**18  # numbers in the streams that are worth a thread of their own


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
    tokens = query.shape[:2].numel()
    documents = np.zeros(tokens, np.int64) if segments is None else segments.long().flatten().numpy()
    if keep is not None:  # where a value is zero, nothing has an effect
        projected = projected.masked_fill(~keep[:, :, None, None], 0.0)
    inputs = [x.contiguous() for x in (query, projected, gain, taps)]
    return _Fuse.apply(*inputs, documents, config, plain)[0]


class _Fuse(torch.autograd.Function):
    """`fuse` on contiguous inputs; the second output are facts for backward."""

    @staticmethod
    def forward(
        query: Tensor, projected: Tensor, gain: Tensor, taps: Tensor, documents: np.ndarray, config: Any, plain: Any
    ) -> tuple[Tensor, Tensor]:
        batch, length, streams, dim = query.shape
        tokens, grain = batch * length, 1 + PART // (streams * dim)
        delta, facts = torch.empty_like(query), query.new_empty(tokens, streams, 5)
        q, p, g, w, f = _tokens(query), _tokens(projected), _array(gain), _array(taps), _array(facts)
        run(open_gates, tokens, q, p, g, *_settings(config), f, grain=grain)
        run(read_out, tokens, p, w, f, config.conv_dilation, length, documents, _tokens(delta), grain=grain)
        return delta, facts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.documents, ctx.config, ctx.plain = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, delta_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, projected, gain, taps, facts = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradients' own
            return *torch.func.vjp(ctx.plain, query, projected, gain, taps)[1](delta_grad), None, None, None
        batch, length = query.shape[:2]
        spans = batch * -(-length // SPAN)
        query_grad, projected_grad = torch.empty_like(query), torch.empty_like(projected)
        gain_grad, taps_grad = (np.empty((spans, *x.shape), np.float32) for x in (gain, taps))
        given: list[Any] = [
            _tokens(delta_grad.contiguous()),
            _tokens(query),
            _tokens(projected),
            _array(gain),
            _array(taps),
        ]
        given += [_array(facts), ctx.config.conv_dilation, length, ctx.documents, *_settings(ctx.config)]
        wanted = [_tokens(query_grad), _tokens(projected_grad), gain_grad, taps_grad]
        run(gradients, spans, *given, *wanted, grain=1 + PART // (SPAN * gain.numel()))
        weights = (
            torch.from_numpy(shares.sum(0)) for shares in (gain_grad, taps_grad)
        )  # in numpy's order, a fixed one
        return query_grad, projected_grad, *weights, None, None, None


def _array(x: Tensor) -> np.ndarray:
    """The same memory."""
    return x.detach().numpy()


def _tokens(x: Tensor) -> np.ndarray:
    """[B, T, ...] as [B * T, ...]."""
    return _array(x.flatten(0, 1))


def _settings(config: Any) -> tuple[int, np.float32, np.float32]:
    """How the score is squashed, and the two eps."""
    return SQUASHES.index(config.gate), np.float32(config.norm_eps), np.float32(config.conv_norm_eps)


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
def mean_square(x, n, m):
    """Of x[n, m]."""
    total = ZERO
    for d in range(x.shape[2]):
        total += x[n, m, d] * x[n, m, d]
    return total / np.float32(x.shape[2])


@quick
def open_gates(lo, hi, query, projected, gain, squash, eps, conv_eps, facts):
    """facts [n, M, 5] of tokens lo to hi."""
    streams, dim = gain.shape
    for n in range(lo, hi):
        value_square = mean_square(projected, n, streams)
        for m in range(streams):
            product = ZERO
            for d in range(dim):
                product += query[n, m, d] * projected[n, m, d] * gain[m, d]
            query_scale = ONE / np.sqrt(mean_square(query, n, m) + eps)
            key_scale = ONE / np.sqrt(mean_square(projected, n, m) + eps)
            score = product * (query_scale * key_scale) / np.sqrt(np.float32(dim))
            gate = sigmoid(squashed(score, squash)[0])
            norm = ONE / np.sqrt(gate * gate * value_square + conv_eps)
            for fact, x in enumerate((gate, score, query_scale, key_scale, norm)):
                facts[n, m, fact] = x


@quick
def seen(n, past, start, documents):
    """Whether the convolution at n sees `past`: in the same sequence, which begins at `start`, and document."""
    return past >= start and documents[past] == documents[n]


@quick
def convolve(n, m, projected, taps, facts, dilation, start, documents, out):
    """out [D] = the convolution at token n of stream m."""
    kernel, streams, dim = taps.shape
    for d in range(dim):
        out[d] = ZERO
    for tap in range(kernel):
        past = n - (kernel - 1 - tap) * dilation
        if seen(n, past, start, documents):
            scale = facts[past, m, GATE] * facts[past, m, NORM]
            for d in range(dim):
                out[d] += scale * projected[past, streams, d] * taps[tap, m, d]


@quick
def read_out(lo, hi, projected, taps, facts, dilation, length, documents, delta):
    """delta [n, M, D] of tokens lo to hi, when all gates are known."""
    _, streams, dim = taps.shape
    mixed = np.empty(dim, np.float32)
    for n in range(lo, hi):
        for m in range(streams):
            convolve(n, m, projected, taps, facts, dilation, n // length * length, documents, mixed)
            gate = facts[n, m, GATE]
            for d in range(dim):
                delta[n, m, d] = gate * projected[n, streams, d] + mixed[d] * sigmoid(mixed[d])


@quick
def gradients(
    lo, hi, delta_grad, query, projected, gain, taps, facts, dilation, length, documents, squash, eps, conv_eps,
    query_grad, projected_grad, gain_grad, taps_grad,
):  # fmt: skip
    """Gradients of the tokens of spans lo to hi; of the weights, [span, ...], the spans' shares.

    A token's gradient needs those of the convolution's output at later tokens. So each span is walked from its end, with
    the last few in a ring; those that lie behind the span are computed here again.
    """
    kernel, streams, dim = taps.shape
    width, ring_size = np.float32(dim), max(kernel - 1, 0) * dilation + 1
    spans = -(-length // SPAN)  # of a sequence
    ring = np.empty((ring_size, streams, dim), np.float32)
    mixed, normed_grad = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for span in range(lo, hi):
        gain_grad[span] = ZERO
        taps_grad[span] = ZERO
        start = span // spans * length
        end, first = start + length, start + span % spans * SPAN
        last = min(first + SPAN, end)
        for n in range(min(last + ring_size - 1, end) - 1, first - 1, -1):
            here = n % ring_size
            for m in range(streams):
                convolve(n, m, projected, taps, facts, dilation, start, documents, mixed)
                for d in range(dim):
                    opening = sigmoid(mixed[d])
                    ring[here, m, d] = delta_grad[n, m, d] * opening * (ONE + mixed[d] * (ONE - opening))
            if n >= last:
                continue

            for d in range(dim):
                projected_grad[n, streams, d] = ZERO
            for m in range(streams):
                # normed = norm * gate * value; mixed = convolution of normed
                for d in range(dim):
                    normed_grad[d] = ZERO
                for tap in range(kernel):
                    lag = (kernel - 1 - tap) * dilation
                    if seen(n, n - lag, start, documents):
                        scale = facts[n - lag, m, GATE] * facts[n - lag, m, NORM]
                        for d in range(dim):
                            taps_grad[span, tap, m, d] += scale * projected[n - lag, streams, d] * ring[here, m, d]
                    if n + lag < end and seen(n + lag, n, start, documents):
                        there = (n + lag) % ring_size
                        for d in range(dim):
                            normed_grad[d] += taps[tap, m, d] * ring[there, m, d]

                # delta = gate * value + SiLU(mixed); norm = 1 / sqrt(mean((gate * value)^2) + conv_eps)
                gate, norm = facts[n, m, GATE], facts[n, m, NORM]
                direct, normed = ZERO, ZERO
                for d in range(dim):
                    direct += delta_grad[n, m, d] * projected[n, streams, d]
                    normed += normed_grad[d] * projected[n, streams, d]
                scale = gate * norm
                shrink = scale * scale * scale * normed / width
                for d in range(dim):
                    projected_grad[n, streams, d] += (
                        gate * delta_grad[n, m, d] + scale * normed_grad[d] - shrink * projected[n, streams, d]
                    )
                gate_grad = direct + (conv_eps * norm * norm) * norm * normed

                # gate = sigmoid(squashed(score)); score = product * query_scale * key_scale / sqrt(D)
                score, query_scale, key_scale = facts[n, m, SCORE], facts[n, m, QUERY], facts[n, m, KEY]
                score_grad = gate_grad * gate * (ONE - gate) * squashed(score, squash)[1]
                product_grad = score_grad * (query_scale * key_scale) / np.sqrt(width)
                query_shrink = score_grad * score * (query_scale * query_scale) / width
                key_shrink = score_grad * score * (key_scale * key_scale) / width
                for d in range(dim):
                    query_grad[n, m, d] = product_grad * projected[n, m, d] * gain[m, d] - query_shrink * query[n, m, d]
                for d in range(dim):
                    projected_grad[n, m, d] = (
                        product_grad * query[n, m, d] * gain[m, d] - key_shrink * projected[n, m, d]
                    )
                for d in range(dim):
                    gain_grad[span, m, d] += product_grad * query[n, m, d] * projected[n, m, d]
