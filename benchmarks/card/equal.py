"""What "the same" means: bits, or a small norm of the difference; a NaN is equal to a NaN alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits agree, but for those of NaNs."""
    one, other = one.detach().cpu(), other.detach().cpu()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    number = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    missing = one.isnan()
    agree = one.contiguous().view(number) == other.contiguous().view(number)
    return torch.equal(missing, other.isnan()) and bool((agree | missing).all())


def distance(out: Tensor, truth: Tensor) -> float:
    """|out - truth| / |truth|, in float64; NaN wherever either has one."""
    truth = truth.double()
    return float((out.to(truth.device, torch.float64) - truth).norm() / truth.norm().clamp_min(1e-300))


@contextlib.contextmanager
def deterministic(*, poisoned: bool = False) -> Iterator[None]:
    """torch's determinism switch; poisoned: new memory is filled with NaN and the largest integers, so what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = poisoned
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
