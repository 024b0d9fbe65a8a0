"""`engram-lm sweep WHAT`: what more rows buy, and how sparse parameters are best split between experts and memory."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table as Grid
from tyro.conf import OmitArgPrefixes, subcommand

from ..train.sources import standard_library


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What every sweep is asked for."""

    data: str = ""
    """Text to learn: .txt, .md, .py, .jsonl[.gz|.xz|.zst], .parquet, a directory of such, or hf:DATASET[:SPLIT].
    Default: the source of Python's standard library."""
    budget: Literal["quick", "cpu", "gpu"] = "cpu"
    """cpu: about 20 minutes on two cores. gpu: a larger model, made for about 10 minutes on one GPU. quick: a few steps, to see
    that it runs; the figures mean nothing."""
    seeds: tuple[int, ...] = (0, 1)
    """Of weights and of the order of batches; each is a run of every point. Add more later: finished runs are kept."""

    def finish(self, sweep: Any, out: Path, console: Console) -> int:
        """Run the sweep into `out`, print its points and fit, write the report."""
        from ..study.sweep import sweep as run_sweep

        command = shlex.join(["engram-lm", *sys.argv[1:]])
        source = self.data or standard_library()
        results = run_sweep(sweep, source, out, seeds=self.seeds, command=command, say=console.print)
        if results is None:
            return 130
        print_results(results, console)
        from ..report.sweep import write_report

        console.print(f"\nReport: [bold]{write_report(out)}[/bold] (open it in a browser)", soft_wrap=True)
        return 0


@dataclass(frozen=True, kw_only=True)
class Memory(Curve):
    """Rows against loss at fixed compute: the same model and batches, tables over 2.6 decades of rows, and no memory at all.

    Fits loss = a + b log10(rows) with a 95 % interval of b and a check for curvature, beside the paper's curve (figure 3 right)
    under the same fit. The paper finds a straight line.

    engram-lm sweep memory --data texts/ --budget cpu --seeds 0 1 --out runs/sweep-memory
    """

    out: Path = Path("runs/sweep-memory")
    """Directory of the sweep; the report is OUT/report.html. The same command goes on with an interrupted one."""
    bigram: bool = False
    """Also sweep the simplest memory: a hashed bigram embedding, added at the input, with as many table parameters."""

    def run(self, console: Console) -> int:
        """See `study.sweep.MemorySweep`."""
        from ..study.sweep import MEMORY

        return self.finish(replace(MEMORY[self.budget], bigram=self.bigram), self.out, console)


@dataclass(frozen=True, kw_only=True)
class Allocation(Curve):
    """Experts against memory at equal total parameters and equal FLOPs: a mixture of experts gives up some for a table.

    rho is the share of the idle experts' parameters that stay with the experts; 100 % is the pure mixture. Fits a parabola in
    rho, with the 95 % interval of its minimum, beside the paper's curve (figure 3 left) under the same fit. The paper finds a U.

    engram-lm sweep allocation --data texts/ --budget cpu --seeds 0 1 --out runs/sweep-allocation
    """

    out: Path = Path("runs/sweep-allocation")
    """Directory of the sweep; the report is OUT/report.html. The same command goes on with an interrupted one."""

    def run(self, console: Console) -> int:
        """See `study.sweep.AllocationSweep`."""
        from ..study.sweep import ALLOCATION

        return self.finish(ALLOCATION[self.budget], self.out, console)


@dataclass(frozen=True)
class Sweep:
    """Draw a scaling curve of the memory here, beside the paper's, with its uncertainty."""

    what: OmitArgPrefixes[
        Annotated[Memory, subcommand("memory", prefix_name=False)]
        | Annotated[Allocation, subcommand("allocation", prefix_name=False)]
    ]

    def run(self, console: Console) -> int:
        """Of the one that was chosen."""
        return self.what.run(console)


def print_results(results: dict[str, Any], console: Console) -> None:
    """The points as a table, and what the fits say."""
    allocation, bigram = results["kind"] == "allocation", results.get("bigram")
    points = ([results["base"]] if results["base"] else []) + results["points"] + (bigram["points"] if bigram else [])
    first = points[0]["name"]
    grid = Grid("point", box=None, pad_edge=False)
    for column in (
        *(["rho"] if allocation else []),
        *("rows", "total", "active", "FLOPs a token", "loss", f"less {first}", "each seed"),
    ):
        grid.add_column(column, justify="right")
    for point in points:
        ratios, less = point["ratios"], point["less"]
        grid.add_row(
            point["name"],
            *([f"{point['rho']:.1%}"] if allocation else []),
            f"{point['rows']:,}",
            f"{ratios['total']:.4f} x" if allocation else f"{ratios['total']:.3g} x",
            f"{ratios['active']:.4f} x",
            f"{ratios['flops']:.4f} x",
            with_interval(point["loss"], point["interval"]),
            "" if point["name"] == first else with_interval(less["difference"], less["interval"], sign="+"),
            " ".join(f"{loss:.4f}" for loss in point["seeds"]),
        )
    console.print(grid)
    console.print("± is a 95 % interval over held-out documents; another seed moves a figure as well.")
    fits = [("here", results["fit"])]
    fits += [("additive bigram here", bigram["fit"])] if bigram else []
    fits += [(curve["label"], curve["fit"]) for curve in (results["paper"], *results["paper_also"])]
    console.print(f"\n{results['fit']['form']}")
    for label, fit in fits:
        console.print(f"  {label}: {fit['says']}", soft_wrap=True, highlight=False)


def with_interval(value: float, interval: list[float] | None, sign: str = "") -> str:
    """`4.1234 ± 0.0210`; a single document has no interval."""
    return f"{value:{sign}.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else "")
