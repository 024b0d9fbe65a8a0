"""How many facts a model holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..record import FactsAct
from .style import BASE, DASHED, ENGRAM, INK, PANEL, Style, label_ends, line, log_axis, percent_axis, style_of, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]


def recall_curves(act: FactsAct) -> str:
    """Share of facts recalled against exposures, a line for each arm. Raises MissingExtraError without matplotlib."""
    styles: list[Style] = [(BASE, DASHED), (ENGRAM, "solid")]

    def draw(axes: Axes) -> None:
        arms = (act.base, act.engram)
        for arm, style in zip(arms, styles, strict=True):
            line(axes, arm.recall, style)
        axes.set_xlim(left=0)
        axes.set_xlabel("exposures of each fact")
        percent_axis(axes, "questions answered right")
        label_ends(axes, [arm.recall[-1] for arm in arms], [arm.name for arm in arms], [colour for colour, _ in styles])

    return svg("recall_curves", "Share of questions answered right against exposures of each fact", draw)


def recall_by_facts(results: Results, exposures: str, name: str = "made-up") -> str:
    """Recall against the number of facts, a line an arm with 95 % intervals, at so many exposures.

    name: of the facts, to tell figures of one page apart. Raises likewise.
    """
    arms = {arm: points for arm, points in results["curve"][exposures].items() if points}

    def draw(axes: Axes) -> None:
        for arm, points in arms.items():
            points = sorted(points, key=lambda point: point["facts"])
            colour = style_of(arm)[0]
            line(axes, [(point["facts"], point["recall"]) for point in points], style_of(arm))
            if all(point.get("interval") for point in points):
                low, high = np.transpose([point["interval"] for point in points])
                axes.fill_between([point["facts"] for point in points], low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(0.9, color=INK, linewidth=0.6, linestyle=DASHED)
        log_axis(axes, "facts")
        percent_axis(axes, f"recall after {exposures} exposures")
        for arm, points in arms.items():  # where arms end differs: those that recall too little are not grown further
            last = max(points, key=lambda point: point["facts"])
            beside: Any = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "weight": "bold"}
            axes.annotate(arm, (last["facts"], last["recall"]), color=style_of(arm)[0], annotation_clip=False, **beside)

    return svg(f"{name}-{list(results['curve']).index(exposures)}", "Recall against the number of facts", draw, PANEL)
