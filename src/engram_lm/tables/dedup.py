"""Each row of a batch once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import compiled, on_gpu


def deduplicate(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [U], ascending, and where each of `ids` [...] is among them: `unique[inverse]` equals `ids`.

    All are int64. Raises IndexError for a negative id, except on a GPU, where such an id is a row that reads as NaN.
    """
    if on_gpu(ids.device):
        return torch.unique(ids, return_inverse=True)
    if ids.device.type == "cpu" and compiled():
        from ..kernels import dedup as kernel

        unique, inverse = map(torch.from_numpy, kernel.deduplicate(ids.numpy()))
    else:
        unique, inverse = torch.unique(ids, return_inverse=True)
    if unique.numel() and unique[0] < 0:
        raise IndexError(f"id {int(unique[0])} is negative: rows are counted from 0, so it would read a wrong one.")
    return unique, inverse
