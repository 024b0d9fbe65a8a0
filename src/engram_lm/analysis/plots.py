"""Figures as inline SVG. The only file that imports matplotlib, and only when a figure is drawn.

Axes and text take the page's `currentColor`, lines its `--base`, `--control` and `--engram`, so one figure
serves light and dark pages. The colours (Okabe and Ito) can be told apart by colour-blind readers, and
dashes repeat what they say. The same values give the same characters.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EngramError
from .record import Curve, FactsAct, LanguageAct

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
BASE, CONTROL, ENGRAM = "#0072b2", "#767676", "#d55e00"
CSS = {
    INK: "currentColor",
    BASE: f"var(--base, {BASE})",
    CONTROL: f"var(--control, {CONTROL})",
    ENGRAM: f"var(--engram, {ENGRAM})",
}
RETROFIT: dict[str, tuple[str, Any]] = {  # colour and dashes of each arm of a retrofit
    "engram": (ENGRAM, "solid"),
    "lora": (BASE, (0, (5, 2))),
    "engram+lora": ("#cc79a7", "solid"),
    "full": ("#009e73", (0, (5, 2))),
    "capacity_1": (CONTROL, (0, (1.5, 1.5))),
    "bias": (CONTROL, (0, (5, 1.5, 1.5, 1.5))),
    "frozen_random": (CONTROL, (0, (5, 2))),
}
DASHES: dict[str, Any] = {BASE: (0, (5, 2)), CONTROL: (0, (1.5, 1.5)), ENGRAM: "solid"}
RC: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # and a dollar sign a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "savefig.transparent": True,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.03,
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"], INK
    ),
}


class MissingExtraError(EngramError, ImportError):
    """A figure was asked for, but matplotlib is not installed."""


def loss_curves(act: LanguageAct) -> str:
    """Loss against training tokens: thin averaged lines for training, points for validation.

    The frame is fitted to what follows the first tenth, in which every model falls from the loss of a uniform
    guess. Raises MissingExtraError without matplotlib.
    """

    def draw(axes: Axes) -> None:
        colours = (BASE, CONTROL, ENGRAM)
        for arm, colour in zip(act.arms, colours, strict=True):
            axes.plot(*_smooth(arm.curve).T, color=colour, linewidth=0.8, alpha=0.55)
            _measured(axes, arm.val_curve, colour)
        _frame_after_first_tenth(axes)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("loss, nats a token")
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda tokens, _: _tokens(tokens))
        ends = [arm.val_curve[-1] for arm in act.arms]
        _label_ends(axes, ends, [arm.name for arm in act.arms], colours)

    return _svg("loss_curves", "Training and validation loss of each arm against training tokens", draw)


def retrofit_curves(curves: dict[str, Curve]) -> str:
    """Held-out loss against training tokens, a line an arm in `RETROFIT`'s colours. Raises MissingExtraError likewise."""

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            colour, dashes = RETROFIT[name]
            axes.plot(*np.transpose(curve), color=colour, linestyle=dashes, linewidth=1.6, marker="o", markersize=2.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("held-out loss, nats a token")
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda tokens, _: _tokens(tokens))
        names = list(curves)
        _label_ends(axes, [curves[name][-1] for name in names], names, [RETROFIT[name][0] for name in names])

    return _svg("retrofit_curves", "Held-out loss of each arm against training tokens", draw)


def recall_curves(act: FactsAct) -> str:
    """Share of facts recalled against exposures, a line for each arm. Raises MissingExtraError likewise."""

    def draw(axes: Axes) -> None:
        arms, colours = (act.base, act.engram), (BASE, ENGRAM)
        for arm, colour in zip(arms, colours, strict=True):
            _measured(axes, arm.recall, colour)
        axes.set_ylim(-0.02, 1.03)
        axes.set_xlim(left=0)
        axes.set_xlabel("exposures of each fact")
        axes.set_ylabel("questions answered right")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        _label_ends(axes, [arm.recall[-1] for arm in arms], [arm.name for arm in arms], colours)

    return _svg("recall_curves", "Share of questions answered right against exposures of each fact", draw)


def bench_bars(results: dict[str, Any], path: Path) -> None:
    """Draw a benchmark's results, as JSON values, into a .png or .svg file: a panel a case, a bar a contender, quartiles.

    Bars are speeds where the case has a unit and milliseconds where it has none; the reference has a colour of its own.
    Raises MissingExtraError without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "matplotlib is not installed, so the results cannot be drawn: pip install 'engram-lm[plot]'"
        ) from None
    cases = results["cases"]
    columns = 1 if len(cases) < 4 else 3
    rows = -(-len(cases) // columns)
    height = 0.8 + 0.22 * max(len(case["entries"]) for case in cases)
    with mpl.rc_context({**RC, "savefig.transparent": False, "axes.titlesize": 9, "axes.axisbelow": True}):
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
            axes.xaxis.set_major_formatter(lambda value, _, unit=case["unit"]: _tokens(value) if unit else f"{value:g}")
        for axes in figure.axes[len(cases) :]:
            axes.remove()
        figure.savefig(path, dpi=150)


def _measured(axes: Axes, curve: Curve, colour: str) -> None:
    """A line through measured points."""
    style = {"linestyle": DASHES[colour], "linewidth": 1.6, "marker": "o", "markersize": 3}
    axes.plot(*np.transpose(curve), color=colour, **style)


def _smooth(curve: Curve, stretches: int = 80) -> np.ndarray:
    """The means of `stretches` equal parts of a curve, [stretches, 2]; a shorter curve stays as it is."""
    parts = np.array_split(np.array(curve), min(stretches, len(curve)))
    return np.array([part.mean(axis=0) for part in parts])


def _frame_after_first_tenth(axes: Axes) -> None:
    """Fit the y axis to what lies beyond the first tenth of the x axis."""
    points = np.concatenate([line.get_xydata() for line in axes.lines])
    late = points[points[:, 0] >= 0.1 * points[:, 0].max(), 1]
    margin = 0.04 * (late.max() - late.min()) or 0.1
    axes.set_ylim(late.min() - margin, late.max() + margin)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]) -> None:
    """Write each line's label at its end, pushed up where two would overlap."""
    low, high = axes.get_ylim()
    right = max(x for x, _ in ends)
    free = low
    for (_, y), label, colour in sorted(zip(ends, labels, colours, strict=True), key=lambda line: line[0][1]):
        at = max(y, free)
        free = at + 0.07 * (high - low)
        beside: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (right, at), color=colour, weight="bold", annotation_clip=False, **beside)


def _tokens(tokens: float) -> str:
    """An axis label: 0, 500 k, 1.5 M."""
    value, unit = (tokens / 1e6, " M") if tokens >= 1e6 else (tokens / 1e3, " k")
    return f"{value:g}{unit}" if tokens else "0"


def _svg(name: str, description: str, draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as an `<svg>` element in the page's colours; its ids begin with `name`."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "matplotlib is not installed, so this figure cannot be drawn: pip install 'engram-lm[plot]'"
        ) from None
    file = io.StringIO()
    with mpl.rc_context({**RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.0, 3.1))
        draw(figure.add_subplot())
        no_metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(file, format="svg", metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, css in CSS.items():
        svg = svg.replace(colour, css)
    return svg
