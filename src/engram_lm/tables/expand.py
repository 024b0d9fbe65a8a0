"""Distinct rows, repeated wherever the batch reads them; the gradients of a row's reads sum up on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import compiled, on_gpu


def expand(rows: Tensor, inverse: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """rows [U, d] float32 and inverse [...] int64 in 0 .. U-1 -> rows[inverse] [..., d] in `dtype`.

    Gradients are summed in float32, whatever their type, and to the same bits from run to run; see add_up.
    """
    ordinary = type(inverse) is Tensor and rows.dtype == torch.float32
    if not ordinary or torch.compiler.is_compiling() or not _fast(rows.device):
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
        grads, inverse = grad.reshape(-1, dim), inverse.view(-1)
        if torch.is_grad_enabled():  # somebody wants the gradients' own
            return torch.zeros(ctx.shape, device=grad.device).index_add(0, inverse, grads.float()), None, None
        return add_up(grads, inverse, count), None, None


def add_up(grads: Tensor, inverse: Tensor, count: int) -> Tensor:
    """[count, d] float32: the sums of those grads [N, d] whose inverse [N] names a row.

    On a CPU they are added in their order, on a GPU in another fixed one where a row has many; see kernels/gpu/sums.py.
    """
    if not _fast(grads.device):
        grads = grads.float()
        return grads.new_zeros(count, grads.shape[1]).index_add_(0, inverse, grads)
    summed = torch.empty(count, grads.shape[1], device=grads.device)
    if on_gpu(grads.device):
        from ..kernels.gpu import sums

        sums.sum_rows(grads.detach().contiguous(), inverse.contiguous(), summed)
    else:
        from ..kernels.expand import sum_rows  # imports Numba

        sum_rows(grads.detach().float().contiguous().numpy(), inverse.numpy(), summed.numpy())
    return summed


def _fast(device: torch.device) -> bool:
    return on_gpu(device) or (device.type == "cpu" and compiled())
