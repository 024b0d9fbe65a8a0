"""Where the fetch lies: a profile of decoding and training steps with the table in host memory, as a trace and as a picture.

The kernel that moves rows over the bus is known by its name; how much of its time other kernels of the device work beside it is what
is hidden. (Streams would not tell: a replayed graph runs on whichever the driver takes.)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from engram_lm.tables.pinned import PinnedTable

from . import training
from .bench import Bench
from .decoding import Decoder

ON_BUS = "_move_rows"
MOVES = ("kernel", "gpu_memcpy", "gpu_memset", "cpu_op")  # categories of events; the last one in a dry run alone
ROWS = 4_000_000
SHOWN = {"decode": 1500.0, "train": 150_000.0}  # microseconds of the picture


class Event(NamedTuple):
    """Something that the device did; times in microseconds."""

    name: str
    start: float
    end: float


def run(bench: Bench) -> None:
    """Two steps of each kind."""
    pictures = {}
    for what, steps in {"decode": decoding_steps, "train": training_steps}.items():
        events = profiled(bench, what, steps)
        moves, others = parted(events)
        if moves:
            share = 100 * covered(moves, others) / sum(move.end - move.start for move in moves)
            bench.value(f"{what}: time on the bus that other kernels cover", share, None, "one profile", "%")
            bench.value(
                f"{what}: time on the bus in two steps",
                sum(move.end - move.start for move in moves) / 1e3,
                None,
                "one profile",
                "ms",
            )
        pictures[what] = events
    if find_spec("matplotlib"):
        draw(pictures, bench.out / f"{prefix(bench)}.svg")


def decoding_steps(bench: Bench, measured: Callable[[Callable[[], Any]], None]) -> None:
    decoder = Decoder.build(bench)
    step = decoder.step(decoder.model, decoder.lookup(PinnedTable, bench.size(ROWS, 400)))
    step(0)
    measured(lambda: [step(turn) for turn in (1, 2)])


def training_steps(bench: Bench, measured: Callable[[Callable[[], Any]], None]) -> None:
    with training.runs(bench, ("host",)) as begun:
        run = begun["host"]
        for _ in range(bench.size(5, 1)):
            run.step()
        bench.synchronize()
        measured(lambda: [run.step() for _ in range(2)])


def profiled(bench: Bench, what: str, steps: Callable[..., None]) -> list[Event]:
    """What the device did during the measured steps; kept beside the results as a trace for chrome://tracing."""
    kind = ProfilerActivity.CPU if bench.dry else ProfilerActivity.CUDA
    found: list[dict[str, Any]] = []

    def measured(work: Callable[[], Any]) -> None:
        with TemporaryDirectory() as directory:
            with profile(activities=[kind]) as profiler:
                work()
                bench.synchronize()
            path = Path(directory, "trace.json")
            profiler.export_chrome_trace(str(path))
            found.extend(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])

    steps(bench, measured)
    kept = [event for event in found if event.get("ph") == "M" or event.get("cat") in MOVES]
    with gzip.open(bench.out / f"{prefix(bench)}-{what}.json.gz", "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": kept}, file)
    return [Event(event["name"], event["ts"], event["ts"] + event["dur"]) for event in kept if event.get("ph") == "X"]


def prefix(bench: Bench) -> str:
    return "gpu-dry-run-trace" if bench.tiny else "gpu-trace"


def parted(events: Sequence[Event]) -> tuple[list[Event], list[Event]]:
    """What crossed the bus, and everything else."""
    return [event for event in events if ON_BUS in event.name], [event for event in events if ON_BUS not in event.name]


def covered(moves: Sequence[Event], others: Sequence[Event]) -> float:
    """Microseconds of the moves in which any of the others was at work too."""
    busy = spans(others)
    return sum(max(0.0, min(move.end, end) - max(move.start, start)) for move in moves for start, end in busy)


def spans(events: Sequence[Event], gap: float = 0.0) -> list[tuple[float, float]]:
    """When any of them was at work; pauses of at most `gap` microseconds do not count."""
    merged: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda event: event.start):
        start, end = merged.pop() if merged and event.start <= merged[-1][1] + gap else (event.start, event.end)
        merged.append((start, max(end, event.end)))
    return merged


def draw(pictures: dict[str, Sequence[Event]], path: Path) -> None:
    """A panel for each profile: what crosses the bus above what is computed meanwhile."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        len(pictures), 1, figsize=(10, 1.9 * len(pictures)), squeeze=False, layout="constrained"
    )
    for axes, (what, events) in zip(panels[:, 0], pictures.items(), strict=True):
        shown = in_view(events, SHOWN[what])
        origin, end = (
            min((event.start for event in shown), default=0.0),
            max((event.end for event in shown), default=1.0),
        )
        moves, others = parted(shown)
        for lane, (some, colour) in enumerate(((others, "#4c72b0"), (moves, "#c44e52"))):
            bars = [
                ((start - origin) / 1e3, (stop - start) / 1e3) for start, stop in spans(some, gap=(end - origin) / 4000)
            ]
            axes.broken_barh(bars, (lane - 0.4, 0.8), color=colour, linewidth=0)
        axes.set_yticks([0, 1], ["other kernels", "rows on\nthe bus"])
        axes.set_xlabel(f"{what}, table in host memory: milliseconds")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def in_view(events: Sequence[Event], window: float) -> list[Event]:
    """Those that begin within a fifth of the window before the first move, or the rest of it after."""
    moves, _ = parted(events)
    first = (
        min((move.start for move in moves), default=min((event.start for event in events), default=0.0)) - window / 5
    )
    return [event for event in events if first <= event.start <= first + window]
