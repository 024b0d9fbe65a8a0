"""Each row of a batch once."""

from __future__ import annotations

import torch
from torch import Tensor


def deduplicate(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [U], ascending, and where each of `ids` [...] is among them: `unique[inverse]` equals `ids`."""
    return torch.unique(ids, return_inverse=True)
