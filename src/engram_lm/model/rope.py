"""Rotary position embedding (Su et al. 2021): a query and a key that are rotated meet at their distance."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """x [B, T, H, d] at positions [T] or [B, T] -> [B, T, H, d] in the type of `x`; the angles are fp32.

    Channel i turns together with channel i + d/2, by `position * theta^(-2i/d)` radians.
    """
    dim = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = (positions[..., None].float() * frequencies).unsqueeze(-2)  # [(B,) T, 1, d/2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
