"""Timing on a GPU: by its own events, several ways in turn, everything twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from .bench import Bench
from .samples import Samples

T = TypeVar("T")
Call = Callable[[int], object]
WARMUP, REPEATS = 3, 25
HEAD_START = 4_000_000  # cycles, about 2 ms, in which the host queues what is to be timed: launches are not


def compare(bench: Bench, contenders: dict[str, Call], *, by_wall: Collection[str] = ()) -> dict[str, Samples]:
    """Seconds of each contender, a call of each a round.

    A call is given the round's number, to take other inputs than last time. by_wall: those in which the host has a part; they are
    timed from an idle device until it is idle again.
    """
    for call in contenders.values():
        for turn in range(bench.size(WARMUP, 1)):
            call(turn)
    bench.synchronize()
    passes = [_one_pass(bench, contenders, by_wall) for _ in range(2)]
    return {name: Samples(tuple(tuple(one[name]) for one in passes)) for name in contenders}


def _one_pass(bench: Bench, contenders: dict[str, Call], by_wall: Collection[str]) -> dict[str, list[float]]:
    names, taken = list(contenders), {name: [] for name in contenders}
    for turn in range(bench.size(REPEATS, 1)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            timed = _by_wall if bench.dry or name in by_wall else _by_events
            taken[name].append(timed(bench, contenders[name], turn))
    bench.synchronize()
    return {name: [seconds() for seconds in each] for name, each in taken.items()}


def _by_events(bench: Bench, call: Call, turn: int) -> Callable[[], float]:
    """To be asked once the device is idle."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    call(turn)
    end.record()
    return lambda: start.elapsed_time(end) / 1e3


def _by_wall(bench: Bench, call: Call, turn: int) -> Callable[[], float]:
    bench.synchronize()
    began = time.perf_counter()
    call(turn)
    bench.synchronize()
    seconds = time.perf_counter() - began
    return lambda: seconds


def kernel_times(bench: Bench, call: Call) -> dict[str, float]:
    """Microseconds of each kernel in one call, the longest first."""
    kind = ProfilerActivity.CPU if bench.dry else ProfilerActivity.CUDA
    with profile(activities=[kind]) as found:
        call(0)
        bench.synchronize()
    taken = {
        one.key: one.self_cpu_time_total if bench.dry else one.self_device_time_total for one in found.key_averages()
    }
    return dict(sorted(taken.items(), key=lambda item: -item[1]))


def captured(bench: Bench, work: Callable[[], T]) -> Callable[[], T]:
    """work as a CUDA graph: each call replays it and gives the same tensors, written anew.

    On a CPU it is done again, and where torch may not keep memory (see sanitizing.py), without which nothing can be captured.
    """
    if bench.dry or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        return work
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(bench.device)
    aside.wait_stream(torch.cuda.current_stream(bench.device))
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is compiled, or allocated once, is not captured
            work()
    torch.cuda.current_stream(bench.device).wait_stream(aside)
    bench.synchronize()
    with torch.cuda.graph(graph):
        made: Any = work()

    def replay() -> T:
        graph.replay()
        return made

    return replay
