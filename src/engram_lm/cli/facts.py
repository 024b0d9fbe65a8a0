"""`engram-lm facts`: how many facts does a model hold, with and without a memory?"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from ..evaluate.biographies import Form
from ..study.facts import BUDGETS, Budget, FactsArm


@dataclass(frozen=True)
class Facts:
    """How many facts does a model hold, with and without a memory? engram-lm facts --exposures 10 30 100 --out runs/facts

    Made-up people at growing numbers, each fact told equally often, to a model with a memory and to one that does as much
    arithmetic without. --hard tells them in forms that make it hard for a memory of n-grams; --real takes facts of the real
    world. The same command goes on with an interrupted study, and --hard and --real may be added later.
    """

    budget: Budget = "cpu"
    """cpu: half an hour or more on two cores. gpu: a larger model and more facts. quick: to see that it runs; the figures mean
    nothing."""
    counts: tuple[int, ...] | None = None
    """Facts to grow through. Default: the budget's."""
    exposures: tuple[int, ...] | None = None
    """Times that each fact is told; a curve each. Default: the budget's."""
    arms: tuple[FactsArm, ...] | None = None
    """Models of the curves. Default: iso_flop and engram."""
    form: Form = "single"
    """Sentences of the curve."""
    attributes: int = 1
    """Facts of each person in the curve."""
    seeds: int | None = None
    """Of people, weights and the order of sentences. Default: the budget's."""
    curve: bool = True
    """Grow made-up facts; --no-curve for the hard cases or real facts alone."""
    hard: bool = False
    """Also tell as many facts in every form of sentence: pronouns, names of many tokens, held-out phrasings, questions."""
    real: str = ""
    """Also grow real facts: geonames, a .jsonl of subject, relation, object (or prompt, answer), or a directory of relations."""
    out: Path = Path("runs/facts")
    """Directory of the study; the report is OUT/report.html."""

    def run(self, console: Console) -> int:
        """Train, ask, write the report, print the tables."""
        from ..report.facts import write_report
        from ..study.facts import facts_study

        chosen: dict[str, Any] = {
            "counts": self.counts,
            "exposures": self.exposures,
            "arms": self.arms,
            "seeds": self.seeds,
        }
        config = replace(
            BUDGETS[self.budget],
            form=self.form,
            attributes=self.attributes,
            curve=self.curve,
            hard=self.hard,
            real=self.real,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        command = shlex.join(["engram-lm", *sys.argv[1:]])
        say = lambda line: console.print(line, soft_wrap=True, highlight=False)  # noqa: E731
        results = facts_study(config, self.out, command=command, say=say)
        if results is None:
            return 130
        print_results(results, console)
        console.print(f"\nReport: [bold]{write_report(self.out)}[/bold] (open it in a browser)", soft_wrap=True)
        return 0


def print_results(results: dict[str, Any], console: Console) -> None:
    """Recall over the number of facts for each number of exposures, then the hard cases."""
    if "curve" in results:
        print_curves("made-up", results, console)
    if "real" in results:
        real = results["real"]
        print_curves(real["source"], real, console)
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in real["skipped"].items())
        console.print(f"{real['facts']:,} facts; left out: {left_out or 'none'}.", soft_wrap=True)
    if "hard" in results:
        print_hard(results["hard"], console)


def print_curves(name: str, results: dict[str, Any], console: Console) -> None:
    """A table for each number of exposures: a row a number of facts."""
    for exposures, arms in results["curve"].items():
        grid = Grid(title=f"{name} facts, told {exposures} times", title_justify="left", box=None, pad_edge=False)
        grid.add_column("facts", justify="right")
        for arm in arms:
            grid.add_column(f"{arm}: recall", justify="right")
            grid.add_column("bits a parameter", justify="right")
            grid.add_column("an active one", justify="right")
        by_facts: dict[int, dict[str, dict[str, Any]]] = {}
        for arm, points in arms.items():
            for point in points:
                by_facts.setdefault(point["facts"], {})[arm] = point
        for facts, points in sorted(by_facts.items()):
            grid.add_row(f"{facts:,}", *(cell for arm in arms for cell in cells(points.get(arm))))
        console.print(grid)
        console.print(summary(exposures, results), soft_wrap=True, highlight=False)
        console.print()


def cells(point: dict[str, Any] | None) -> list[str]:
    """Recall and bits of one arm at one number of facts; not run once it recalls less than half."""
    if point is None:
        return ["not run", "", ""]
    return [f"{point['recall']:.1%}", f"{point['bits_per_parameter']:.3f}", f"{point['bits_per_active']:.3f}"]


def summary(exposures: str, results: dict[str, Any]) -> str:
    """Who holds how many, and how many times as many."""
    parts = []
    for arm, held in results["holds_90"][exposures].items():
        if not held["facts"]:
            parts.append(f"{arm} fewer than were tried")
        else:
            parts.append(f"{arm} {'at least ' if held['open'] else ''}{held['interpolated'] or held['facts']:,.0f}")
    ratio = results["ratio"].get(exposures)
    if ratio:
        parts.append(f"{'at least ' if results['ratio_at_least'][exposures] else ''}{ratio:.3g} times as many")
    return f"at 90 % recall: {'; '.join(parts)}"


def print_hard(hard: dict[str, Any], console: Console) -> None:
    """Recall by form and kind of question."""
    arms = list(next(iter(hard.values())))
    grid = Grid("form", "asked", title="hard cases: recall", title_justify="left", box=None, pad_edge=False)
    for arm in arms:
        grid.add_column(arm, justify="right")
    for form, by_arm in hard.items():
        for kind in by_arm[arms[0]]:
            grid.add_row(form, kind, *(f"{by_arm[arm][kind]:.1%}" for arm in arms))
    console.print(grid)
