"""Differences between arms: points with intervals beside a line at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .curves import distinct
from .style import ENGRAM, INK, style_of, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]
SHOWN = ("engram", "bigram", "capacity_1", "frozen_random")  # of the slices: more arms would hide one another


def forest(results: Results) -> str:
    """Loss of each arm less base: the mean, its interval over documents (thick) and over seeds (thin), each seed as a dot.

    Raises MissingExtraError without matplotlib.
    """
    less = {name: arm["less"]["base"] for name, arm in distinct(results).items() if name != "base"}

    def draw(axes: Axes) -> None:
        for row, (name, difference) in enumerate(less.items()):
            colour = style_of(name)[0]
            _interval(axes, difference.get("seed_interval"), row, colour, linewidth=1.0)
            _interval(axes, difference["interval"], row, colour, linewidth=5, alpha=0.4)
            axes.plot(difference["difference"], row, "D", color=colour, markersize=4)
            seeds = difference["seeds"]
            if len(seeds) > 1:
                axes.plot(seeds, [row + 0.28] * len(seeds), "o", color=colour, markersize=2.2)
        _rows(axes, list(less), "held-out loss less base’s, nats a token (left is better)")
        for label, name in zip(axes.get_yticklabels(), less, strict=True):
            label.set_color(style_of(name)[0])
            label.set_fontweight("bold")

    return svg(
        "forest", "Held-out loss of each arm less that of base, with intervals", draw, (5.0, 0.8 + 0.34 * len(less))
    )


def slice_gains(results: Results, kind: str) -> str:
    """Loss less base of the main arms in each slice of one kind, with intervals over documents. Raises likewise."""
    sliced = results["slices"][kind]
    shown = [name for name in SHOWN if name in distinct(results) and name in sliced["arms"]]
    spread = 0.62 / max(1, len(shown))

    def draw(axes: Axes) -> None:
        for number, name in enumerate(shown):
            colour = style_of(name)[0]
            for row, less in enumerate(sliced["arms"][name]["less_base"]):
                if less is None:
                    continue
                at = row + (number - (len(shown) - 1) / 2) * spread
                _interval(axes, less["interval"], at, colour, linewidth=2.5, alpha=0.4)
                axes.plot(less["difference"], at, MARKERS[number], color=colour, markersize=4)
        _rows(axes, sliced["labels"], "loss less base’s, nats a token")
        _legend(axes, shown)
        axes.set_title(kind, loc="left", fontsize=9, weight="bold", pad=10 + 12 * -(-len(shown) // 2))

    name = f"slices-{list(results['slices']).index(kind)}"
    height = 1.1 + (0.16 + 0.11 * len(shown)) * len(sliced["labels"])
    return svg(name, f"Loss less base by {kind}", draw, (3.4, height))


MARKERS = ("D", "s", "o", "^")


def knockouts(probe: Results) -> str:
    """How much the loss rises without each part of the memory, with intervals over documents. Raises likewise."""
    parts = {name: found for name, found in probe["variants"].items() if found["interval"] or name != "all on"}

    def draw(axes: Axes) -> None:
        for row, found in enumerate(parts.values()):
            axes.barh(row, found["difference"], height=0.55, color=ENGRAM, alpha=0.35)
            _interval(axes, found["interval"], row, ENGRAM, linewidth=2)
            axes.plot(found["difference"], row, "D", color=ENGRAM, markersize=3.5)
        _rows(axes, list(parts), "rise of the held-out loss, nats a token")

    return svg("knockouts", "Rise of the loss without each part of the memory", draw, (5.0, 0.8 + 0.28 * len(parts)))


def _interval(axes: Axes, interval: Sequence[float] | None, row: float, colour: str, **how: Any) -> None:
    if interval:
        axes.plot(interval, [row, row], color=colour, solid_capstyle="butt", **how)


def _rows(axes: Axes, labels: Sequence[str], xlabel: str) -> None:
    """A row a label from the top down, and a line at zero."""
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(xlabel)


def _legend(axes: Axes, names: Sequence[str]) -> None:
    """Marks and names of arms, above the frame."""
    for number, name in enumerate(names):
        axes.plot([], [], MARKERS[number], color=style_of(name)[0], markersize=4, label=name)
    columns = min(2, len(names))
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, fontsize=8, handletextpad=0.2
    )
