"""Fast paths for the CPU, compiled by Numba at first use and cached; each has a slow truth beside it that gives the same bits.

They know arrays and numbers only. A kernel takes `lo, hi` first and works on that slice of the items, with the GIL
released, so `run` can spread it over threads. `ENGRAM_KERNELS=off` makes everything take the slow path.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from typing import Any


@functools.cache
def compiled() -> bool:
    """Whether the compiled kernels are used: decided once, and said aloud when they are not."""
    if os.environ.get("ENGRAM_KERNELS") == "off":
        return False
    if find_spec("numba") is None:
        warnings.warn(
            "Numba is not installed: hashing, gathering and updating rows take the slow path in torch, with the same results.",
            stacklevel=2,
        )
        return False
    return True


def threads() -> int:
    """Threads that a kernel is spread over: torch's number."""
    import torch

    return torch.get_num_threads()


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="engram-kernel")


def run(kernel: Callable[..., Any], count: int, *arguments: Any, grain: int = 1024) -> None:
    """Call kernel(lo, hi, *arguments) on slices of range(count), at least `grain` items each, one a thread."""
    parts = max(1, min(threads(), count // grain))
    edges = [count * part // parts for part in range(parts + 1)]
    waiting = [_pool(parts - 1).submit(kernel, lo, hi, *arguments) for lo, hi in pairwise(edges[1:])]
    kernel(edges[0], edges[1], *arguments)
    for part in waiting:
        part.result()
