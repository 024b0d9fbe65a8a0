"""`engram-lm retrofit`: a memory for a pretrained model, learned from your text, beside controls."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table as Grid
from tyro.conf import arg

from ..errors import ConfigError
from ..hf.config import RetrofitConfig


@dataclass(frozen=True)
class Retrofit:
    """Give a pretrained model a memory of your text: engram-lm retrofit --model DIR_OR_NAME --data TEXT --out DIR

    The model stays frozen; a cartridge is trained that mounts and unmounts. Controls learn from the same batches, and the
    report says what the memory adds to them, and what text outside the domain loses. Ctrl-C keeps finished arms.
    """

    config: Annotated[RetrofitConfig, arg(name="")]
    out: Path = Path("runs/retrofit")
    """Directory of the run: OUT/cartridge, OUT/results.json, OUT/report.html."""
    resume: bool = False
    """Go on with the retrofit in OUT; more arms and seeds may be asked for."""

    def run(self, console: Console) -> int:
        """Train, measure, write the report, print the table."""
        from ..report.retrofit import write_report

        try:
            from ..hf.retrofit import retrofit
        except ImportError as error:
            raise ConfigError(f"retrofit needs transformers ({error}): pip install 'engram-lm[hf]'") from None

        command = " ".join(["engram-lm", *sys.argv[1:]])
        say = lambda line: console.print(line, soft_wrap=True)  # noqa: E731
        results = retrofit(self.config, self.out, resume=self.resume, command=command, say=say)
        if results is None:
            return 130
        print_table(results, console)
        path = write_report(self.out)
        console.print(f"Report: [bold]{path}[/bold] (open it in a browser)", soft_wrap=True)
        return 0


def print_table(results: dict[str, Any], console: Console) -> None:
    """Losses of every arm, and differences from the base, in nats a token."""
    outside = results["base"]["outside"] is not None
    columns = ["arm", "trained", "held-out loss", "over base (95 %)", *(["outside, over base"] if outside else [])]
    grid = Grid(box=None, pad_edge=False)
    for column in columns:
        grid.add_column(column, no_wrap=True)
    sizes = {run["arm"]: sum(run["parameters"].values()) for run in results["runs"]}
    for name, texts in results["arms"].items():
        cells = [name, f"{sizes[name]:,}" if name in sizes else "", f"{texts['held_out']['loss']:.4f}"]
        cells += [over(text["less"]["base"]) if name != "base" else "" for text in texts.values()]
        grid.add_row(*cells)
    console.print(grid)
    console.print(off(results), soft_wrap=True)
    if not outside:
        console.print("Forgetting was not measured: name text outside the domain with --outside.")


def off(results: dict[str, Any]) -> str:
    """Whether what the arms added comes off again."""
    compared = [run for run in results["runs"] if run["off"] is not None]
    wrong = [f"{run['arm']} (seed {run['seed']})" for run in compared if not run["off"]["equal"]]
    if wrong:
        return f"NOT equal to the base when switched off: {', '.join(wrong)}."
    return (
        "Switched off, every arm without weights of its own gives the base's logits, bit for bit." if compared else ""
    )


def over(difference: dict[str, Any]) -> str:
    """`-0.1234 (-0.1300 -0.1100)`; one document has no interval."""
    interval = difference["interval"]
    spread = f" ({interval[0]:+.4f} {interval[1]:+.4f})" if interval else ""
    return f"{difference['difference']:+.4f}{spread}"
