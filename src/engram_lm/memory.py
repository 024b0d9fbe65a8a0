"""Engram: fuses the rows that a token's n-grams name into the hidden state (paper 2.3; equations 3 to 6).

    keys_1 .. keys_M, value = W [row_1; ...; row_K]                       one matrix: M keys and one value a token
    score_m = RMSNorm(hidden_m) . RMSNorm(keys_m) / sqrt(D)               how well the memory suits the stream
    gated_m = sigmoid(signed_sqrt(score_m)) * value
    delta_m = gated_m + SiLU(DepthwiseConv(RMSNorm(gated_m)))             dilated and causal; absent in V4.1

It knows no table and no tokenizer: rows in, a change of the residual streams out. The three published layouts are three
configurations of this one module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError
from .kernels import compiled, on_gpu


@dataclass(frozen=True)
class EngramConfig:
    """The choices in which the published layouts differ.

    row_dim: width of one row. gate: `signed_sqrt` squashes the score as sign(s) sqrt(max(|s|, 1e-6)), the demo's and
    Qwen's; `copysign_sqrt` lets a score of zero keep its sign bit, V4.1's; `plain` is the paper's text; `open` has no gate
    and no keys: the value is added as it is. conv_kernel: taps of the short convolution, 0 for none; conv_dilation: their
    distance (the largest n-gram's order in all layouts).
    zero_centered: gains are stored as their distance from one.
    """

    row_dim: int = 64
    gate: Literal["signed_sqrt", "copysign_sqrt", "plain", "open"] = "signed_sqrt"
    bias: bool = False
    conv_kernel: int = 4
    conv_dilation: int = 3
    norm_eps: float = 1e-6
    conv_norm_eps: float = 1e-6
    zero_centered: bool = False

    def __post_init__(self) -> None:
        if self.row_dim < 1 or self.conv_kernel < 0 or self.conv_dilation < 1:
            raise ConfigError(
                f"engram: row_dim {self.row_dim} and conv_dilation {self.conv_dilation} must be at least 1 "
                f"and conv_kernel {self.conv_kernel} at least 0."
            )

    @property
    def tail(self) -> int:
        """Positions of the past that the short convolution sees."""
        return (self.conv_kernel - 1) * self.conv_dilation if self.conv_kernel else 0

    @staticmethod
    def paper() -> EngramConfig:
        """The demo of the paper: biased projections, eps of torch's RMSNorm."""
        return EngramConfig(bias=True, norm_eps=torch.finfo(torch.float32).eps, conv_norm_eps=1e-5)

    @staticmethod
    def deepseek_v41() -> EngramConfig:
        """DeepSeek-V4.1-Flash: no convolution, no bias."""
        return EngramConfig(row_dim=256, gate="copysign_sqrt", conv_kernel=0, norm_eps=1e-20)

    @staticmethod
    def qwen_ple() -> EngramConfig:
        """Qwen3.8-Flash-Next's per-layer embedding."""
        return EngramConfig(row_dim=160, zero_centered=True)


class ConvState(NamedTuple):
    """What the short convolution remembers of S positions: a value, batch first, to be indexed for beams.

    Dropping the last positions rolls it back; `EngramConfig.tail` of them are enough to go on.
    """

    inputs: Tensor  # [B, S, M, D] normalised inputs
    segments: Tensor  # [B, S] int64, the documents they belong to


class Inputs(NamedTuple):
    """What is fused, once the rows are projected; gain and taps in single precision at least."""

    query: Tensor  # [B, T, M, D] the hidden state
    projected: Tensor  # [B, T, M + 1, D]: M keys (none for an open gate) and the value
    gain: Tensor  # [M, D] of query and key together
    taps: Tensor  # [k, M, D] of the convolution, with its norm's gain in them; the last one: the present

    def precise(self) -> Inputs:
        """All of it in single precision at least."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return Inputs(*(x.to(dtype) for x in self))


class Engram(nn.Module):
    """One memory layer of M streams of width D that reads K rows a token."""

    def __init__(self, config: EngramConfig, *, dim: int, streams: int = 1, rows_per_token: int) -> None:
        super().__init__()
        self.config, self.dim, self.streams = config, dim, streams
        self.keys = 0 if config.gate == "open" else streams
        self.project = nn.Linear(rows_per_token * config.row_dim, (self.keys + 1) * dim, bias=config.bias)
        if self.keys:
            self.query_gain = nn.Parameter(torch.empty(streams, dim))
            self.key_gain = nn.Parameter(torch.empty(streams, dim))
        if config.conv_kernel:
            self.conv_gain = nn.Parameter(torch.empty(streams, dim))
            self.conv_weight = nn.Parameter(torch.empty(config.conv_kernel, streams, dim))  # last tap: the present
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Live projections and a silent convolution: with rows of zero the layer changes nothing, yet rows can learn."""
        self.project.weight.normal_(std=self.project.in_features**-0.5, generator=generator)
        if self.project.bias is not None:
            self.project.bias.zero_()
        for name, gain in self.named_parameters():
            if name.endswith("_gain"):
                gain.fill_(0.0 if self.config.zero_centered else 1.0)
        if self.config.conv_kernel:
            self.conv_weight.zero_()

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor,
        state: ConvState | None = None,
        *,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        with_state: bool = False,
    ) -> tuple[Tensor, ConvState | None]:
        """hidden [B, T, M, D], rows [B, T, K, d] -> what to add to hidden [B, T, M, D], and the state after it.

        segments: [B, T] document numbers that the convolution does not cross (None continues the state's last one).
        keep: [B, T] bool, False silences the memory at a position. The state is returned when asked for or given.
        """
        inputs = self._inputs(hidden, rows)
        kernels = _kernels_for(hidden) if self.keys else None
        stateless = state is None and not with_state
        if kernels == "gpu":
            from .kernels.gpu.fuse import fuse as on_device  # imports Triton

            if stateless or not self.config.conv_kernel:
                delta = self._fuse_by(on_device, inputs, segments, keep)
            else:  # without taps the kernels give what goes into the convolution
                before = inputs._replace(query=inputs.query.float(), taps=inputs.taps[:0])
                gated = self._fuse_by(on_device, before, None, keep)
                delta, state = self._convolved(gated, inputs.taps, state, segments, with_state)
        elif kernels == "cpu" and stateless:
            from .kernels.fuse import fuse  # imports Numba

            delta = self._fuse_by(fuse, inputs.precise(), segments, keep)
        else:
            delta, state = self._fuse(inputs.precise(), state, segments, keep, with_state)
        return delta.to(hidden.dtype), state

    def gates(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The gate's openings in (0, 1): [B, T, M]."""
        query, projected, gain, _ = self._inputs(hidden, rows).precise()
        return self._gate(query, projected[:, :, :-1], gain)

    def _inputs(self, hidden: Tensor, rows: Tensor) -> Inputs:
        """What is fused."""
        dtype, shape = torch.promote_types(hidden.dtype, torch.float32), (self.streams, self.dim)
        projected = self.project(rows.flatten(-2)).unflatten(-1, (self.keys + 1, self.dim))
        gain = self._gain(self.query_gain) * self._gain(self.key_gain) if self.keys else projected.new_ones(shape)
        taps = self.conv_weight * self._gain(self.conv_gain) if self.config.conv_kernel else gain.new_zeros(0, *shape)
        return Inputs(hidden, projected, gain.to(dtype), taps.to(dtype))

    def _gain(self, gain: Tensor) -> Tensor:
        """A norm's gain as a factor."""
        return gain + 1.0 if self.config.zero_centered else gain

    def _fuse(
        self,
        inputs: Inputs,
        state: ConvState | None,
        segments: Tensor | None,
        keep: Tensor | None,
        with_state: bool,
    ) -> tuple[Tensor, ConvState | None]:
        """The change [B, T, M, D] in plain operations; kernels/fuse.py has the same in one pass."""
        query, projected, gain, taps = inputs
        gated = self._gate(query, projected[:, :, :-1], gain)[..., None] * projected[:, :, -1:]
        if keep is not None:
            gated = gated.masked_fill(~keep[:, :, None, None], 0.0)
        return self._convolved(gated, taps, state, segments, with_state)

    def _fuse_by(
        self, fuse: Callable[..., Tensor], inputs: Inputs, segments: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """The change without a state by the `fuse` of a kernel file, which takes plain operations for higher derivatives."""

        def plain(*given: Tensor) -> Tensor:
            return self._fuse(Inputs(*given).precise(), None, segments, keep, False)[0].to(inputs.query.dtype)

        return fuse(plain, *inputs, segments=segments, keep=keep, config=self.config)

    def _convolved(
        self, gated: Tensor, taps: Tensor, state: ConvState | None, segments: Tensor | None, with_state: bool
    ) -> tuple[Tensor, ConvState | None]:
        """gate * value [B, T, M, D] and, if there are taps, their convolution."""
        if not len(taps):
            return gated, None
        mixed, state = self._short_conv(gated, taps, state, segments, with_state)
        return gated + mixed, state

    def _gate(self, query: Tensor, keys: Tensor, gain: Tensor) -> Tensor:
        """[B, T, M]; equation 4, and the demo's squashing of the score.

        The two RMSNorms only scale, so they are applied to the product (as V4.1 does): half the passes over [B, T, M, D].
        """
        if self.config.gate == "open":
            return query.new_ones(*query.shape[:3])
        eps = self.config.norm_eps
        product = (query * keys * gain).sum(-1)
        scale = (query.square().mean(-1) + eps).rsqrt() * (keys.square().mean(-1) + eps).rsqrt()
        score = product * scale / math.sqrt(self.dim)
        if self.config.gate == "signed_sqrt":
            score = score.abs().clamp_min(1e-6).sqrt() * score.sign()
        elif self.config.gate == "copysign_sqrt":
            score = torch.copysign(score.abs().clamp_min(1e-6).sqrt(), score)
        return score.sigmoid()

    def _short_conv(
        self, x: Tensor, taps: Tensor, state: ConvState | None, segments: Tensor | None, with_state: bool
    ) -> tuple[Tensor, ConvState | None]:
        """SiLU of the depthwise causal convolution; [B, T, M, D] -> [B, T, M, D]."""
        batch, length = x.shape[:2]
        normed = F.rms_norm(x, (self.dim,), eps=self.config.conv_norm_eps)
        if state is None:
            inputs, documents = normed, None if segments is None else segments.long()
        else:
            if segments is None:  # the last document goes on
                segments = state.segments[:, -1:].expand(-1, length)
            inputs = torch.cat([state.inputs, normed], dim=1)
            documents = torch.cat([state.segments, segments.long()], dim=1)

        tail = self.config.tail
        first_seen = inputs.shape[1] - length - tail
        missing = max(0, -first_seen)  # before the first position there are zeros
        past = F.pad(inputs[:, max(0, first_seen) :], (0, 0, 0, 0, missing, 0))  # [B, tail + T, M, D]
        known = None if documents is None else F.pad(documents[:, max(0, first_seen) :], (missing, 0))
        total = past[:, tail:] * taps[-1]
        for tap in range(self.config.conv_kernel - 1):
            first = tap * self.config.conv_dilation
            shifted = past[:, first : first + length]
            if known is not None:
                shifted = shifted * (known[:, first : first + length] == known[:, tail:])[:, :, None, None]
            total = torch.addcmul(total, shifted, taps[tap])

        if state is None and not with_state:
            return F.silu(total), None
        if documents is None:
            documents = torch.zeros(batch, length, dtype=torch.int64, device=x.device)
        return F.silu(total), ConvState(inputs.detach(), documents)


def _kernels_for(hidden: Tensor) -> Literal["gpu", "cpu"] | None:
    """Which kernels take these hidden states. None for double precision, and where torch is compiling or faking."""
    if type(hidden) is not Tensor or hidden.dtype == torch.float64 or torch.compiler.is_compiling():
        return None
    if on_gpu(hidden.device):
        return "gpu"
    return "cpu" if hidden.device.type == "cpu" and compiled() else None


def reference_engram(
    module: Engram,
    hidden: Tensor,
    rows: Tensor,
    *,
    segments: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The slow truth: the same [B, T, M, D] by loops over positions and streams, one formula a line."""
    config, (batch, length, streams, dim) = module.config, hidden.shape
    weight = module.project.weight.view(module.keys + 1, dim, -1)
    bias = module.project.bias.view(module.keys + 1, dim) if config.bias else torch.zeros_like(weight[..., 0])
    one = 1.0 if config.zero_centered else 0.0

    def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean() + eps).sqrt() * (gain + one)

    def gated(b: int, t: int, m: int) -> Tensor:
        if keep is not None and not keep[b, t]:
            return torch.zeros_like(hidden[b, t, m])
        memory = rows[b, t].flatten()
        value = weight[-1] @ memory + bias[-1]
        if config.gate == "open":
            return value
        key = weight[m] @ memory + bias[m]
        query = norm(hidden[b, t, m], module.query_gain[m], config.norm_eps)
        score = query @ norm(key, module.key_gain[m], config.norm_eps) / dim**0.5
        if config.gate != "plain":
            sign = score.sign() if config.gate == "signed_sqrt" else torch.ones_like(score).copysign(score)
            score = sign * score.abs().clamp_min(1e-6).sqrt()
        return torch.sigmoid(score) * value

    def visible(b: int, t: int, source: int) -> bool:
        return source >= 0 and (segments is None or bool(segments[b, source] == segments[b, t]))

    def output(b: int, t: int, m: int) -> Tensor:
        out = gated(b, t, m)
        if not config.conv_kernel:
            return out
        total = torch.zeros_like(out)
        for lag in range(config.conv_kernel):
            source = t - lag * config.conv_dilation
            if visible(b, t, source):
                normed = norm(gated(b, source, m), module.conv_gain[m], config.conv_norm_eps)
                total = total + module.conv_weight[config.conv_kernel - 1 - lag, m] * normed
        return out + total * torch.sigmoid(total)

    positions = [[[output(b, t, m) for m in range(streams)] for t in range(length)] for b in range(batch)]
    return torch.stack([torch.stack([torch.stack(m) for m in t]) for t in positions])
