"""One look for all figures, and the SVG of what a function draws.

Axes and text take the page's `currentColor`, lines its `--base`, `--control` and `--engram`, so one figure
serves light and dark pages. The colours (Okabe and Ito) can be told apart by colour-blind readers, and
dashes repeat what they say. The same values give the same characters.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngramError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
BASE, CONTROL, ENGRAM = "#0072b2", "#767676", "#d55e00"
PURPLE, GREEN = "#cc79a7", "#009e73"
CSS = {
    INK: "currentColor",
    BASE: f"var(--base, {BASE})",
    CONTROL: f"var(--control, {CONTROL})",
    ENGRAM: f"var(--engram, {ENGRAM})",
}
DASHED, DOTTED, DASHDOT = (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5))
Style = tuple[str, Any]  # colour and dashes of a line
ARMS: dict[str, Style] = {  # of comparisons: models without a memory are blue, controls of the memory grey
    "base": (BASE, DASHED),
    "bigram": (PURPLE, DASHED),
    "engram": (ENGRAM, "solid"),
    "capacity_1": (CONTROL, DOTTED),
    "frozen_random": (CONTROL, DASHED),
    "shuffled": (CONTROL, DASHDOT),
    "ffn": (BASE, DOTTED),
    "iso_flop": (BASE, DASHDOT),
    "moe": (GREEN, DASHED),
    # of facts studies
    "no_convolution": (PURPLE, DASHED),
    "second_layer": (GREEN, "solid"),
    # of retrofits
    "lora": (BASE, DASHED),
    "engram+lora": (PURPLE, "solid"),
    "full": (GREEN, DASHED),
    "bias": (CONTROL, DASHDOT),
}
OTHER: Style = (INK, "solid")
RC: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # and a dollar sign a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "savefig.transparent": True,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.03,
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"], INK
    ),
}
WIDE, PANEL = (5.0, 3.1), (3.4, 2.6)  # inches: a figure of its own, one of several side by side
STANDALONE = "<style>:root{color:#1c1e21;background:#fff}text{font-family:system-ui,sans-serif!important}</style>"


class MissingExtraError(EngramError, ImportError):
    """A figure was asked for, but matplotlib is not installed."""


def figure_class(what: str = "this figure") -> tuple[Any, type[Figure]]:
    """matplotlib and its figure. Raises MissingExtraError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            f"matplotlib is not installed, so {what} cannot be drawn: pip install 'engram-lm[plot]'"
        ) from None
    return mpl, Figure


def svg(name: str, description: str, draw: Callable[[Axes], None], size: tuple[float, float] = WIDE) -> str:
    """What `draw` draws, as an `<svg>` element in the page's colours; its ids begin with `name`.

    Raises MissingExtraError without matplotlib.
    """
    mpl, Figure = figure_class()
    file = io.StringIO()
    with mpl.rc_context({**RC, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts of its own
        figure = Figure(figsize=size)
        draw(figure.add_subplot())
        no_metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(file, format="svg", metadata=no_metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, css in CSS.items():
        text = text.replace(colour, css)
    return text


def save(figure: str, path: Path) -> None:
    """Write a figure of this package into a .svg file that can be opened alone: dark on white."""
    path.write_text(figure.replace(">", f">{STANDALONE}", 1), encoding="utf-8")


def style_of(arm: str) -> Style:
    """An arm's colour and dashes."""
    return ARMS.get(arm, OTHER)


def line(
    axes: Axes, points: Sequence[Sequence[float]] | np.ndarray, style: Style, marker: str = "o", **changes: Any
) -> None:
    """A line through measured points [(x, y)]."""
    colour, dashes = style
    settings = {"color": colour, "linestyle": dashes, "linewidth": 1.6, "marker": marker, "markersize": 3} | changes
    axes.plot(*np.transpose(points), **settings)


def tokens_axis(axes: Axes) -> None:
    """Training tokens along x."""
    axes.set_xlabel("training tokens")
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda tokens, _: thousands(tokens))


def percent_axis(axes: Axes, label: str) -> None:
    """A share of 0 to 100 % along y."""
    axes.set_ylim(-0.02, 1.03)
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


def whole_numbers(axis: Any) -> None:
    """Ticks of layers, which have no halves."""
    axis.get_major_locator().set_params(integer=True)


def log_axis(axes: Axes, label: str) -> None:
    """A count along x, in decades."""
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(lambda count, _: thousands(count))
    axes.xaxis.set_minor_formatter(lambda *_: "")


def label_ends(axes: Axes, ends: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]) -> None:
    """Write each line's label at its end, moved up or down where two would overlap."""
    low, high = axes.get_ylim()
    gap = 0.07 * WIDE[1] / axes.get_figure(root=True).get_figheight() * (high - low)  # type: ignore[union-attr]
    right = max(x for x, _ in ends)
    lines = sorted(zip(ends, labels, colours, strict=True), key=lambda line: line[0][1])
    beside: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
    for at, (_, label, colour) in zip(_apart([y for (_, y), _, _ in lines], gap, low, high), lines, strict=True):
        axes.annotate(label, (right, at), color=colour, weight="bold", annotation_clip=False, **beside)


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights pushed up until each is a gap above the one below, then down again from the top."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap if placed else low))
    ceiling = max(high, low + gap * (len(placed) - 1)) + gap
    for number in reversed(range(len(placed))):
        ceiling = placed[number] = min(placed[number], ceiling - gap)
    return placed


def thousands(count: float) -> str:
    """An axis label: 0, 500 k, 1.5 M, 2 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"
