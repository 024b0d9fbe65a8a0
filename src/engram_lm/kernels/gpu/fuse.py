"""What Engram does with projected rows: two kernels forward and three backward.

    forward   facts of the gates from query, keys and value (gate.find_facts); delta from facts and value (conv.convolve)
    backward  the value's gradient as far as it does not pass through gates, and sums over columns for those that do, from value
              and delta_grad (conv.convolve_back); slopes from sums (gate.find_slopes); gradients of query, keys and value
              from these (gate.spread)

Nothing of the size of [B, T, M, D] is stored on the way, as in the CPU's kernels/fuse.py: the convolution's input is
gate * norm * value. Inputs are read in their own dtype; everything else is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import conv, gate

NUMBERS = 256  # of a tile: eight a thread, which are 16 bytes of half precision
WARPS = 1056  # what a large GPU runs at once of programs whose threads have 255 registers
STEPS, SHARES = 32, 256  # tokens of a program without a walk, at least; parts of the gain's gradient, at most


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
    """What plain(query, projected, gain, taps) gives, up to rounding: [B, T, M, D], on a GPU, in query's dtype.

    query [B, T, M, D] and projected [B, T, M + 1, D] (M keys and the value) are float32, bfloat16 or float16, not
    necessarily the same; query may be expanded. gain [M, D] (the query's times the key's) and taps [k, M, D] (times the
    convolution's gain) are float32, segments and keep [B, T], config an EngramConfig. Gradients are in the inputs' dtypes and
    the same bits from run to run; gradients of gradients are those of `plain`.
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    segments = None if segments is None else segments.long().contiguous()
    keep = None if keep is None else keep.contiguous().view(torch.uint8)
    inputs = [x.contiguous() for x in (projected, gain, taps)]
    return _Fuse.apply(query, *inputs, segments, keep, config, plain)[0]


class _Fuse(torch.autograd.Function):
    """`fuse` on inputs as the kernels take them; the second output are facts for backward."""

    @staticmethod
    def forward(
        query: Tensor,
        projected: Tensor,
        gain: Tensor,
        taps: Tensor,
        segments: Tensor | None,
        keep: Tensor | None,
        config: Any,
        plain: Any,
    ) -> tuple[Tensor, Tensor]:
        (batch, length), (streams, dim) = query.shape[:2], gain.shape
        facts = gain.new_empty(*query.shape[:3], gate.FACTS.value)
        delta = query.new_empty(query.shape)
        if not delta.numel():
            return delta, facts
        tile, width = Tile.of(query, taps), min(triton.next_power_of_2(dim), NUMBERS)
        gate.find_facts[(batch * length,)](
            query, projected, gain, keep, facts, length, *query.stride()[:3], config.norm_eps, config.conv_norm_eps,
            streams, dim, config.gate, len(taps) > 0, tile.streams, width,
            num_warps=min(tile.streams, 16), enable_fp_fusion=True,  # one for each stream
        )  # fmt: skip
        walk = Walk.of(query, taps, config, 8 * WARPS // tile.blocks)  # short walks: they begin with little work
        conv.convolve[(walk.shares * tile.blocks,)](
            projected, taps, segments, keep, facts, delta, *walk, streams, dim, len(taps), tile.streams, tile.width,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        return delta, facts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.config, ctx.plain = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, delta_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, projected, gain, taps, segments, keep, facts = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradients' own
            return *torch.func.vjp(ctx.plain, query, projected, gain, taps)[1](delta_grad), *[None] * 4
        (streams, dim), config = gain.shape, ctx.config
        query_grad, projected_grad = query.new_empty(query.shape), torch.empty_like(projected)
        if not query_grad.numel():
            return query_grad, projected_grad, torch.zeros_like(gain), torch.zeros_like(taps), *[None] * 4
        tile, gates, delta_grad = Tile.of(query, taps), facts[..., 0].numel(), delta_grad.contiguous()
        walk, tokens = Walk.of(query, taps, config, WARPS // tile.blocks), gates // streams

        sums, taps_shares = facts.new_empty(tile.blocks, gates, 2), taps.new_empty(walk.shares, *taps.shape)
        value_grad = facts.new_empty(tokens, dim)
        conv.convolve_back[(walk.shares * tile.blocks,)](
            projected, taps, segments, keep, facts, delta_grad, value_grad, sums, taps_shares, *walk,
            streams, dim, len(taps), tile.streams, tile.width, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        slopes, padded = facts.new_empty(gates, gate.SLOPES.value), triton.next_power_of_2(tile.blocks)
        size = max(1, 2048 // padded)
        gate.find_slopes[(triton.cdiv(gates, size),)](
            sums, facts, slopes, gates, config.conv_norm_eps, dim, config.gate, tile.blocks, padded, size,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        steps = max(STEPS, triton.cdiv(tokens, SHARES))
        shares = triton.cdiv(tokens, steps)
        gain_shares = gain.new_empty(shares, *gain.shape)
        gate.spread[(shares * tile.blocks,)](
            query, projected, gain, keep, slopes, value_grad, query_grad, projected_grad, gain_shares,
            query.shape[1], *query.stride()[:3], steps, tokens, streams, dim, tile.streams, tile.width,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        return query_grad, projected_grad, gain_shares.sum(0), taps_shares.sum(0), *[None] * 4


class Tile(NamedTuple):
    """What a program of conv.py, which is one warp, works on at a time."""

    streams: int  # a power of two, at least M
    width: int  # columns, a power of two
    blocks: int  # tiles across all columns

    @staticmethod
    def of(query: Tensor, taps: Tensor) -> Tile:
        """For taps [k, M, D]: several times k tiles are in registers. So many taps, or single precision, make them smaller."""
        kernel, streams, dim = taps.shape
        small = kernel > 4 or query.element_size() > 2
        rows, numbers = triton.next_power_of_2(streams), NUMBERS // 2 if small else NUMBERS
        width = min(triton.next_power_of_2(dim), max(1, numbers // rows))
        return Tile(rows, width, triton.cdiv(dim, width))


class Walk(NamedTuple):
    """How positions are shared out among programs, see conv.py."""

    length: int
    dilation: int  # chains of a sequence
    chain: int  # positions of a chain; those beyond the sequence are passed over
    steps: int  # positions of a share
    total: int  # positions of all chains

    @staticmethod
    def of(query: Tensor, taps: Tensor, config: Any, programs: int) -> Walk:
        """So many programs for each block of columns, or a few less."""
        batch, length = query.shape[:2]
        dilation = min(config.conv_dilation, length) if len(taps) > 1 else 1
        chain = triton.cdiv(length, dilation)
        total = batch * dilation * chain
        return Walk(length, dilation, chain, triton.cdiv(total, max(1, programs)), total)

    @property
    def shares(self) -> int:
        """How many there are."""
        return triton.cdiv(self.total, self.steps)
