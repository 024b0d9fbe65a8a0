"""Fast paths for the CPU, compiled by Numba at first use and cached; each has a slow truth beside it that gives the same bits.

They know arrays and numbers only. A kernel takes `lo, hi` first and works on that slice of the items, with the GIL
released, so `run` can spread it over threads. Those for a GPU, in Triton, are in `gpu/`. `ENGRAM_KERNELS=off` makes
everything take the slow path.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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


def on_gpu(device: torch.device) -> bool:
    """Whether the Triton kernels of `gpu/` work on tensors of this device: a GPU, and torch's current one, where they run.

    With ENGRAM_KERNELS=triton also on those of a CPU, where TRITON_INTERPRET=1 has Triton interpret them: for tests.
    """
    import torch

    here = device.type == "cuda" and device.index in (None, torch.cuda.current_device())
    return (here or os.environ.get("ENGRAM_KERNELS") == "triton") and _triton()


@functools.cache
def _triton() -> bool:
    """Whether Triton is there and wanted: said aloud when it is missing, as above."""
    if os.environ.get("ENGRAM_KERNELS") == "off":
        return False
    if find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed: on the GPU everything takes the slow path in torch, with the same results.",
            stacklevel=3,
        )
        return False
    return True


def threads() -> int:
    """Threads that a kernel is spread over: torch's number."""
    import torch

    return torch.get_num_threads()


def run(kernel: Callable[..., Any], count: int, *arguments: Any, grain: int = 1024) -> None:
    """Call kernel(lo, hi, *arguments) on slices of range(count), at least `grain` items each, on torch's own threads.

    Those of the main thread, that is; work in the background stays on the thread that it was given.
    """
    parts = max(1, min(threads(), count // grain))
    if parts == 1 or threading.current_thread() is not threading.main_thread():
        kernel(0, count, *arguments)
        return
    waiting, errors = iter(range(parts)), []

    def work(_: Any = None) -> None:
        try:
            for part in waiting:  # a slice for each thread that comes, and all of them if only one does
                kernel(count * part // parts, count * (part + 1) // parts, *arguments)
        except BaseException as error:
            errors.append(error)

    _team()(work, parts)
    if errors:
        raise errors[0]


@functools.cache
def _team() -> Callable[[Callable[..., None], int], None]:
    """Has a function called by several threads at once.

    After each operation torch's OpenMP workers spin for some milliseconds, waiting for the next one. Threads of our own
    would share the cores with them (a gather of 32k rows: 26 M rows/s with two threads, 29 M with one); the
    workers themselves are awake already (45 M).
    """
    openmp = _torch_openmp()
    if openmp is not None:
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        return lambda work, parts: openmp.GOMP_parallel(function(work), None, parts, 0)
    pool = ThreadPoolExecutor(thread_name_prefix="engram-kernel")

    def call(work: Callable[..., None], parts: int) -> None:
        waiting = [pool.submit(work) for _ in range(parts - 1)]
        work()
        for other in waiting:
            other.result()

    return call


def _torch_openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP library that torch has loaded; None where it uses another one."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    ours = [line.split(maxsplit=5)[-1] for line in maps if "libgomp" in line and "torch" in line]
    return ctypes.CDLL(ours[0]) if ours else None
