"""Distinct rows, repeated wherever the batch reads them; the gradients of a row's reads sum up on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import compiled


def expand(rows: Tensor, inverse: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """rows [U, d] float32 and inverse [...] int64 in 0 .. U-1 -> rows[inverse] [..., d] in `dtype`.

    Gradients are summed in float32, in the order of the reads, whatever their type and the number of threads.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or not compiled():
        return F.embedding(inverse, rows).to(dtype)
    return _Expand.apply(rows, inverse, dtype)


class _Expand(torch.autograd.Function):
    """F.embedding with a faster sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = rows.shape
        return F.embedding(inverse, rows.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from ..kernels.expand import sum_rows  # imports Numba

        (inverse,) = ctx.saved_tensors
        summed = torch.empty(ctx.rows)
        flat = grad.to(summed.dtype).reshape(-1, summed.shape[1]).contiguous()
        sum_rows(flat.detach().numpy(), inverse.reshape(-1).numpy(), summed.numpy())
        return summed, None, None
