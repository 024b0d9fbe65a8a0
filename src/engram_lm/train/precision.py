"""Which precision the matrix products run in. Parameters, norms, gates and losses stay in float32."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from ..errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself: AVX-512 BF16 or AMX on a CPU, Ampere or later on CUDA."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return False


def resolve(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """`auto` is bfloat16 where it is fast."""
    if precision == "auto":
        return "bfloat16" if bf16_is_fast(device) else "float32"
    return precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the forward pass runs."""
    if resolve(precision, device) == "float32":
        return nullcontext()
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"bfloat16 autocast is not supported on {device.type!r}; use --precision float32.")
    return torch.autocast(device.type, torch.bfloat16)
