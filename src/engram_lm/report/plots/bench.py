"""Bars of a benchmark, into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .style import BASE, ENGRAM, RC, figure_class, thousands


def bench_bars(results: dict[str, Any], path: Path) -> None:
    """Draw a benchmark's results, as JSON values, into a .png or .svg file: a panel a case, a bar a contender, quartiles.

    Bars are speeds where the case has a unit and milliseconds where it has none; the reference has a colour of its own.
    Raises MissingExtraError without matplotlib.
    """
    mpl, Figure = figure_class("the results")
    cases = results["cases"]
    columns = 1 if len(cases) < 4 else 3
    rows = -(-len(cases) // columns)
    height = 0.8 + 0.22 * max(len(case["entries"]) for case in cases)
    with mpl.rc_context({**RC, "savefig.transparent": False, "axes.titlesize": 9}):
        figure = Figure(figsize=(6.5 * columns, height * rows), layout="constrained")
        figure.suptitle(f"engram-lm bench {results['bench']}: {results['machine']['cpu']}", fontsize=9)
        for axes, case in zip(figure.subplots(rows, columns, squeeze=False).flat, cases, strict=False):
            entries = case["entries"]
            figures = np.array([[entry["median_seconds"], *entry["quartiles_seconds"]] for entry in entries])
            values = case["work"] / figures if case["unit"] else 1e3 * figures / case["work"]
            spread = np.abs(np.sort(values[:, 1:]) - values[:, :1]).T
            colours = [ENGRAM, *[BASE] * (len(entries) - 1)]
            axes.barh([entry["name"] for entry in entries], values[:, 0], xerr=spread, color=colours, height=0.7)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_title(case["title"], loc="left")
            axes.set_xlabel(f"{case['unit']} a second" if case["unit"] else "milliseconds")
            axes.xaxis.set_major_formatter(
                lambda value, _, unit=case["unit"]: thousands(value) if unit else f"{value:g}"
            )
        for axes in figure.axes[len(cases) :]:
            axes.remove()
        figure.savefig(path, dpi=150)
