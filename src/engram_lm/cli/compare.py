"""`engram-lm compare`: is it memory? Arms that differ in one thing, beside one another."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table as Grid
from tyro.conf import arg

from ..study.compare import CompareConfig


@dataclass(frozen=True)
class Compare:
    """Is it memory? engram-lm compare PRESET_OR_CONFIG.json --data TEXT --arms base engram capacity_1 --seeds 3

    Every arm trains on the same batches and differs from the model with a memory in one thing; the report says what each
    comparison holds equal, where the gain lies, and what the controls leave of it. Interrupted, the same command goes on.

    arms: base, bigram, engram, capacity_1, frozen_random, shuffled, ffn, iso_flop, moe.
    """

    config: Annotated[CompareConfig, arg(name="")]
    data: str = ""
    """Text to learn, as in train. Default: the source of Python's standard library."""
    tokenizer: str = ""
    """tokenizer.json, a directory that holds one, or a hub name. Default: train a byte-level BPE on the text."""
    out: Path = Path("runs/compare")
    """Directory of the study; the report is OUT/report.html."""

    def run(self, console: Console) -> int:
        """Train, measure, write the report, print the table."""
        from ..report.compare import write_report
        from ..study.compare import compare
        from ..train.sources import standard_library

        command = " ".join(["engram-lm", *sys.argv[1:]])
        say = lambda line: console.print(line, soft_wrap=True)  # noqa: E731
        results = compare(
            self.config, self.data or standard_library(), self.out, tokenizer=self.tokenizer, command=command, say=say
        )
        if results is None:
            return 130
        print_table(results, console)
        path = write_report(self.out)
        console.print(f"Report: [bold]{path}[/bold] (open it in a browser)", soft_wrap=True)
        return 0


def print_table(results: dict[str, Any], console: Console) -> None:
    """Losses of every arm, differences from base, and what each is equal in."""
    grid = Grid(box=None, pad_edge=False)
    for column in ("arm", "loss", "less base", "95 %, documents", "95 %, seeds", "as multiples of engram"):
        grid.add_column(column, no_wrap=column != "as multiples of engram")
    for name, arm in results["arms"].items():
        less = arm["less"].get("base") if name != "base" else None
        cells = ["", "", ""]
        if less:
            cells = [f"{less['difference']:+.4f}", interval(less["interval"]), interval(less["seed_interval"])]
        twin = f" (the same model as {arm['same_as']})" if arm["same_as"] else ""
        grid.add_row(name + twin, f"{arm['loss']:.4f}", *cells, arm["equal"])
    console.print(grid)


def interval(bounds: list[float] | None) -> str:
    """`-0.1300 to -0.1100`."""
    return f"{bounds[0]:+.4f} to {bounds[1]:+.4f}" if bounds else ""
