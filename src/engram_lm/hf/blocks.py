"""Matrices in E4M3 with one E8M0 scale, a power of two, for each block of 32 x 32: how DeepSeek-V4.1 keeps its projections.

Done in strips of 32 rows, so that no second matrix is needed on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..tables.rows import BLOCK


def from_blocks(numbers: Tensor, scales: Tensor) -> Tensor:
    """Float32 [n, k] of E4M3 [n, k] and E8M0 [n / 32, k / 32], exactly. Raises DataError for numbers that are not finite."""
    weight = torch.empty(numbers.shape)
    for strip, lo in enumerate(range(0, len(numbers), BLOCK)):
        by_column = scales[strip].float().repeat_interleave(BLOCK)[: numbers.shape[1]]
        weight[lo : lo + BLOCK] = numbers[lo : lo + BLOCK].float() * by_column
    if not weight.isfinite().all():
        raise DataError("the projection of a memory layer holds NaN or infinity: so would all that the layer computes.")
    return weight


def to_blocks(weight: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 [n, k] and E8M0 [n / 32, k / 32] of float32 [n, k], finite; rounded to the nearest, ties to even.

    known: uint8 scales that the numbers may have had. A block that its known scale represents exactly keeps it, so what
    `from_blocks` gave comes back bit for bit; any other gets the smallest power of two that keeps it within 448.
    """
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK), dtype=torch.uint8)
    for strip, lo in enumerate(range(0, len(weight), BLOCK)):
        part = weight[lo : lo + BLOCK]
        scales[strip] = _smallest_scales(part)
        if known is not None:
            back = _reread(part, known[strip])
            same = (back.view(torch.int32) == part.contiguous().view(torch.int32)).all(0)
            kept = F.pad(same, (0, -len(same) % BLOCK), value=True).view(-1, BLOCK).all(1)
            scales[strip] = torch.where(kept, known[strip], scales[strip])
        numbers[lo : lo + BLOCK] = _scaled(part, scales[strip])
    return numbers, scales.view(torch.float8_e8m0fnu)


def _reread(part: Tensor, scales: Tensor) -> Tensor:
    """A strip of 32 rows as it reads after being written with these scales."""
    return _scaled(part, scales).float() * _columns(scales, part.shape[1])


def _scaled(part: Tensor, scales: Tensor) -> Tensor:
    """E4M3 of a strip over its scales; dividing by a power of two rounds nothing."""
    return (part / _columns(scales, part.shape[1])).to(torch.float8_e4m3fn)


def _columns(scales: Tensor, width: int) -> Tensor:
    """[width] float32: the scale of each column of a strip."""
    return scales.view(torch.float8_e8m0fnu).float().repeat_interleave(BLOCK)[:width]


def _smallest_scales(part: Tensor) -> Tensor:
    """uint8 [blocks]: for each block of a strip the smallest power of two that keeps it within 448, which is 1.75 * 2^8."""
    largest = F.pad(part.abs().amax(0), (0, -part.shape[1] % BLOCK)).view(-1, BLOCK).amax(1)
    bits = largest.view(torch.int32)
    return ((bits >> 23) - 8 + (bits & 0x7FFFFF > 0x600000).int()).clamp(min=0).to(torch.uint8)
