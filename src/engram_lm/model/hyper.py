"""Residual connections: the plain one, and manifold-constrained hyper-connections (mHC, arXiv 2512.24880).

Both split a sublayer's residual step in two: `x, write = connection(h)` reads the sublayer's input x
[B, T, D] from the streams h [B, T, M, D], and `write(y)` returns the streams after its output y [B, T, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Write = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """One stream: h + y."""

    def forward(self, h: Tensor) -> tuple[Tensor, Write]:
        """h [B, T, 1, D] -> x [B, T, D] and `write`."""
        return h.squeeze(2), lambda y: h + y.unsqueeze(2)


class HyperConnection(nn.Module):
    """M > 1 streams: a weighted sum is read, the output goes to each with its own weight, and they are mixed.

        x  = read h                 read  = sigmoid(.)       [M]
        h' = mix h + write y        write = 2 sigmoid(.)     [M]
                                    mix   = Sinkhorn(.)      [M, M]  doubly stochastic: it keeps the mean

    where (.) = alpha * project(RMSNorm(all streams in one row)) + static, one alpha for each of the three. At
    the start read = 1/M, write = 1 and mix is near the identity, so equal streams behave as one plain
    residual. `project` must start at random, not at zero: it alone makes the streams differ, and equal
    streams would get equal gradients for ever.
    """

    def __init__(self, dim: int, streams: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.streams, self.norm_eps = streams, norm_eps
        self.parts = [streams, streams, streams * streams]  # read, write, mix
        self.project = nn.Linear(streams * dim, sum(self.parts), bias=False)
        self.alpha = nn.Parameter(torch.empty(3))
        self.static = nn.Parameter(torch.empty(sum(self.parts)))

    @torch.no_grad()
    def reset_static(self) -> None:
        """Set alpha and the static parts so that equal streams behave as one plain residual."""
        read, write, mix = self.static.split(self.parts)
        read.fill_(-math.log(self.streams - 1))  # sigmoid -> 1/M
        write.zero_()  # 2 sigmoid -> 1
        mix.fill_(-6.0).view(self.streams, self.streams).fill_diagonal_(0.0)  # 0.25 % of a stream to another
        self.alpha.fill_(0.01)

    def weights(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, M, D] -> read [B, T, M], write [B, T, M], mix [B, T, M, M]; fp32 or wider."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        x = h.flatten(-2).to(dtype)
        dynamic = F.linear(F.rms_norm(x, x.shape[-1:], eps=self.norm_eps), self.project.weight.to(dtype))
        read, write, mix = (
            alpha * part + static
            for alpha, part, static in zip(
                self.alpha.to(dtype),
                dynamic.split(self.parts, -1),
                self.static.to(dtype).split(self.parts),
                strict=True,
            )
        )
        return read.sigmoid(), 2 * write.sigmoid(), sinkhorn(mix.unflatten(-1, (self.streams, self.streams)))

    def forward(self, h: Tensor) -> tuple[Tensor, Write]:
        """h [B, T, M, D] -> x [B, T, D] and `write`. Autocast is off: the streams keep their precision."""
        with torch.autocast(h.device.type, enabled=False):
            read, write, mix = self.weights(h)
            x = torch.einsum("btm,btmd->btd", read, h.to(read.dtype)).to(h.dtype)

        def write_back(y: Tensor) -> Tensor:
            with torch.autocast(h.device.type, enabled=False):
                mixed = torch.einsum("btmn,btnd->btmd", mix, h.to(mix.dtype))
                return (mixed + write[..., None] * y.to(mix.dtype).unsqueeze(2)).to(h.dtype)

        return x, write_back


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """exp(logits) [..., M, M], its columns and rows scaled in turn so that both sum to 1.

    In logarithms: no sum can vanish, and each scaling is one softmax.
    """
    for _ in range(iterations):
        logits = logits.log_softmax(-2).log_softmax(-1)
    return logits.exp()


def build_connection(dim: int, streams: int, norm_eps: float) -> Residual | HyperConnection:
    """The residual connection for that many streams."""
    return Residual() if streams == 1 else HyperConnection(dim, streams, norm_eps)
