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
    ordinary = type(inverse) is Tensor and rows.device.type == "cpu" and rows.dtype == torch.float32
    if not ordinary or torch.compiler.is_compiling() or not compiled():
        return F.embedding(inverse, rows).to(dtype)
    return _Expand.apply(rows, inverse.contiguous(), dtype)


class _Expand(torch.autograd.Function):
    """F.embedding with a faster sum."""

    @staticmethod
    def forward(rows: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(inverse, rows.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,), (count, dim) = ctx.saved_tensors, ctx.shape
        grads, inverse = grad.float().reshape(-1, dim), inverse.view(-1)
        if torch.is_grad_enabled():  # somebody wants the gradients' own
            return grads.new_zeros(count, dim).index_add(0, inverse, grads), None, None
        return add_up(grads, inverse, count), None, None


def add_up(grads: Tensor, inverse: Tensor, count: int) -> Tensor:
    """[count, d]: the sums of those grads [N, d] float32 whose inverse [N] names a row, in their order on a CPU."""
    if grads.device.type != "cpu" or not compiled():
        return grads.new_zeros(count, grads.shape[1]).index_add_(0, inverse, grads)
    from ..kernels.expand import sum_rows  # imports Numba

    summed = torch.empty(count, grads.shape[1])
    sum_rows(grads.contiguous().detach().numpy(), inverse.numpy(), summed.numpy())
    return summed
