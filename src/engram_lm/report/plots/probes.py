"""What probes found inside a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    BASE,
    CONTROL,
    DASHED,
    ENGRAM,
    INK,
    PANEL,
    label_ends,
    line,
    log_axis,
    percent_axis,
    style_of,
    svg,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]


def gate_histograms(gates: Results) -> str:
    """How often gates are how wide, a line a memory layer and stream. Raises MissingExtraError without matplotlib."""
    shades = [(layer["layer"], stream["histogram"]) for layer in gates["layers"] for stream in layer["streams"]]

    def draw(axes: Axes) -> None:
        for number, (_, shares) in enumerate(shades):
            edges = np.linspace(0, 1, len(shares) + 1)
            fade = 1 - 0.75 * number / len(shades)
            axes.stairs(shares, edges, color=ENGRAM, alpha=fade, linewidth=1.4, label=names[number])
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("gate")
        axes.set_ylabel("share of tokens")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        axes.legend(frameon=False, fontsize=8)

    several = any(len(layer["streams"]) > 1 for layer in gates["layers"])
    names = [
        f"block {layer['layer']}" + (f", stream {number}" if several else "")
        for layer in gates["layers"]
        for number in range(len(layer["streams"]))
    ]
    return svg("gate_histograms", "Distribution of gates in each memory layer", draw, PANEL)


def row_reads(usage: Results) -> str:
    """Rows of the table by how often the text reads them, and the share of reads they serve. Raises likewise."""
    histogram = usage["histogram"]

    def draw(axes: Axes) -> None:
        places = np.arange(len(histogram["reads"]))
        axes.bar(places - 0.2, np.array(histogram["rows"]) / usage["rows"], 0.38, color=CONTROL, label="of rows")
        axes.bar(places + 0.2, histogram["share_of_reads"], 0.38, color=ENGRAM, label="of reads")
        axes.set_xticks(places, histogram["reads"], fontsize=6.5)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("reads of a row")
        axes.set_ylabel("share")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        axes.legend(frameon=False, fontsize=8)

    return svg("row_reads", "Rows by how often they are read", draw, PANEL)


def cache_curves(usage: Results) -> str:
    """Share of reads that are found in so many rows: the most frequent ones, and two caches'. Raises likewise."""
    hot, cache = usage["hot"], usage["cache"]

    def draw(axes: Axes) -> None:
        lines = {
            "most read": (hot["rows"], hot["share"], (INK, "solid")),
            "S3-FIFO": (cache["slots"], cache["s3fifo"], (ENGRAM, "solid")),
            "static": (cache["slots"], cache["static"], (BASE, DASHED)),
        }
        for rows, share, style in lines.values():
            line(axes, list(zip(rows, share, strict=True)), style, linewidth=1.3)
        log_axis(axes, "rows")
        percent_axis(axes, "reads served")
        for label, (rows, share, (colour, _)) in lines.items():
            axes.annotate(
                label, (rows[-1], share[-1]), xytext=(5, 0), textcoords="offset points", va="center", color=colour
            )

    return svg("cache_curves", "Share of reads served against the number of rows kept", draw, PANEL)


def lens_curves(lens: Results) -> str:
    """KL of each layer's prediction from the final one, a line an arm. Raises likewise."""

    def draw(axes: Axes) -> None:
        for name, found in lens.items():
            colour = style_of(name)[0]
            line(axes, list(zip(found["layers"], found["kl"], strict=True)), style_of(name))
            if all(found["kl_interval"]):
                low, high = np.transpose(found["kl_interval"])
                axes.fill_between(found["layers"], low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer (0: the embedding)")
        axes.set_ylabel("KL from the final prediction, nats")
        whole_numbers(axes.xaxis)
        # the last layers' KL is 0 in every arm: names stand at the first layer
        starts = [(0.0, found["kl"][0]) for found in lens.values()]
        axes.set_xlim(left=-0.02 * max(found["layers"][-1] for found in lens.values()))
        label_ends(axes, starts, list(lens), [style_of(name)[0] for name in lens])

    return svg("lens_curves", "KL of each layer's prediction from the final one", draw)


def alignment(cka: Results) -> str:
    """CKA of each layer of one model (down) with each of the other (across), and where each belongs. Raises likewise."""
    similarity = np.array(cka["cka"], dtype=np.float64)  # None becomes NaN
    mine, theirs = similarity.shape

    def draw(axes: Axes) -> None:
        for row in range(mine):
            for column in range(theirs):
                value = similarity[row, column]
                if math.isnan(value):
                    continue
                axes.fill_between(
                    [column - 0.5, column + 0.5],
                    row - 0.5,
                    row + 0.5,
                    color=BASE,
                    alpha=max(0.0, min(1.0, value)) ** 2 * 0.9,
                    linewidth=0,
                )
                if mine * theirs <= 200:
                    axes.annotate(f"{value:.2f}".lstrip("0"), (column, row - 0.3), ha="center", va="center", fontsize=7)
        placed = [(place, row) for row, place in enumerate(cka["alignment"]) if place is not None]
        line(axes, placed, (ENGRAM, "solid"), marker="D", linewidth=1.2, markersize=3.5)
        axes.plot([0, min(mine, theirs) - 1], [0, min(mine, theirs) - 1], color=INK, linewidth=0.6, linestyle=DASHED)
        axes.set_xlim(-0.5, theirs - 0.5)
        axes.set_ylim(-0.5, mine - 0.5)
        axes.grid(visible=False)
        axes.set_xlabel("layer of base (0: the embedding)")
        axes.set_ylabel("layer of engram")
        for axis in (axes.xaxis, axes.yaxis):
            whole_numbers(axis)

    return svg(
        "alignment", "Similarity of the layers of both models", draw, (4.4, 4.4 * max(0.6, min(1.4, mine / theirs)))
    )
