"""What the card can do, by plain copies and a matrix product: what everything else is held against."""

from __future__ import annotations

import torch

from .bench import Bench
from .timing import compare


def run(bench: Bench) -> None:
    """Large copies within the device and over the bus, and a matrix product in bf16, all of random numbers."""
    size, edge = bench.size(4 << 30, 1 << 16), bench.size(8192, 64)
    source, target = bench.bytes(size), torch.empty(size, dtype=torch.uint8, device=bench.device)
    part = size // 4
    host = bench.pinned(source[:part])
    left, right = (bench.normal(edge, edge, dtype=torch.bfloat16) for _ in range(2))
    times = compare(
        bench,
        {
            "copy": lambda turn: target.copy_(source),
            "to_device": lambda turn: target[:part].copy_(host, non_blocking=True),
            "to_host": lambda turn: host.copy_(source[:part], non_blocking=True),
            "matmul": lambda turn: left @ right,
        },
    )
    speeds = {
        "copy": ("copy on the device, bytes read and written", times["copy"].rate(2 * size)),
        "to_device": ("pinned host memory to device", times["to_device"].rate(part)),
        "to_host": ("device to pinned host memory", times["to_host"].rate(part)),
    }
    for name, (what, speed) in speeds.items():
        bench.figure(what, speed.map(lambda rate: rate / 1e9), "GB/s")
        bench.ceilings[name] = speed.median
    bench.ceilings["matmul"] = times["matmul"].rate(2 * edge**3).median
    bench.figure("matrix product in bf16", times["matmul"].rate(2 * edge**3).map(lambda rate: rate / 1e12), "TFLOP/s")


def ceiling(bench: Bench, name: str) -> float:
    """One of them, in bytes or operations a second; measured now if that section did not run."""
    if name not in bench.ceilings:
        run(bench)
    return bench.ceilings[name]
