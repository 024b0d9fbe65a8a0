"""RMSNorm (Zhang and Sennrich 2019) as the whole backbone uses it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` whose gain takes the input's type, so that the fused kernel also runs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], in the type of `x`."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
