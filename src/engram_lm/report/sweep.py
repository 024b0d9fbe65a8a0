"""The report of a sweep: one self-contained page from results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .compare import data_item, run_items
from .differences import number, side, signed, span
from .markup import Row, asset, definitions, fill, headline, panels, paragraphs, table, text
from .verdict import percent, quantity

Results = dict[str, Any]
TITLES = {"memory": "How much do more rows buy?", "allocation": "Experts or memory?"}
LEDES = {
    "memory": "One model on identical batches, with tables of many sizes: a token reads as many rows of each and costs the same "
    "arithmetic. Only what there is to look up grows.",
    "allocation": "Models with as many parameters in all and as much arithmetic a token. What differs is how the parameters that a "
    "token does not pass are split between experts and a memory’s table.",
}


def write_report(directory: Path) -> Path:
    """Write report.html from the results.json of a sweep's directory; returns its path."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    path = directory / "report.html"
    path.write_bytes(render(results).encode("utf-8", "replace"))
    return path


def render(results: Results) -> str:
    """The page as text."""
    kind, figures = results["kind"], [lambda: plots.sweep_curve(results)]
    caption = "Diamonds are means over seeds, dots single seeds, light bars 95 % intervals over documents."
    if results.get("paper"):
        figures.append(lambda: plots.paper_curve(results))
        caption += (
            f" Right: {results['paper']['label']}, under the same fit. Both panels span as many nats and as wide an x axis, so "
            "steepness can be compared by eye; where each begins differs."
        )
    if results.get("bigram"):
        caption += " Purple: an additive bigram embedding with as many table parameters."
    caption += " Bands: 95 % of the fitted curve."
    return fill(
        "sweep.html",
        title=text(TITLES[kind]),
        lede=text(LEDES[kind]),
        style=asset("style.css"),
        headline=headline(_headline(results)),
        verdict=paragraphs(verdict(results)),
        figures=panels(figures, caption),
        points=_points(results),
        fits=_fits(results),
        run=definitions(run_items(results, data_item(results))),
    )


def verdict(results: Results) -> list[str]:
    """Sentences chosen by what was fitted."""
    return _memory(results) if results["kind"] == "memory" else _allocation(results)


def _headline(results: Results) -> list[tuple[str, str]]:
    fit, paper = results["fit"], (results.get("paper") or {}).get("fit")
    if results["kind"] == "memory":
        items = [(number(fit["coefficients"][1], 4), "nats a token for ten times the rows")]
        return items + ([(number(paper["coefficients"][1], 4), "in the paper")] if paper else [])
    best = min(results["points"], key=lambda point: point["loss"])
    items = [(percent(best["rho"]), "of the sparse parameters with the experts: the best measured point")]
    optimum = fit["optimum"]
    if optimum["rho"] is not None and optimum["determined"]:
        items.append(
            (
                percent(optimum["rho"]),
                f"the fitted minimum, {percent(optimum['interval'][0])} to {percent(optimum['interval'][1])}",
            )
        )
    return items


# --- rows -----------------------------------------------------------------------------------------------------------


def _memory(results: Results) -> list[str]:
    fit = results["fit"]
    slope, interval = fit["coefficients"][1], fit["interval"]
    match side(interval):
        case "lower":
            first = f"Ten times the rows lower held-out loss by {-slope:.4f} nats a token"
        case "higher":
            first = f"More rows did not help: ten times as many raise held-out loss by {slope:.4f} nats a token"
        case "same":
            first = f"No effect of more rows can be told: ten times as many change held-out loss by {number(slope, 4)} nats a token"
    sizes = [point["rows"] for point in results["points"]]
    decades = np.log10(max(sizes) / min(sizes))
    first += f" (95 % interval {span(interval, 4)}, from {len(sizes)} sizes over {decades:.1f} decades)."
    return [f"{first} {_straightness(fit)}{_beside_paper(results)}", *_ends(results), *_beside_bigram(results)]


def _straightness(fit: Results) -> str:
    bend = fit.get("curvature")
    if not bend:
        return ""
    if not bend["differs_from_0"]:
        return "A bend of the line cannot be told from 0, so it may be log-linear as in the paper."
    further = "less" if bend["coefficient"] > 0 else "more"
    return f"It is not a straight line over the logarithm of rows, as the paper’s is: each decade buys {further} than the one before."


def _beside_paper(results: Results) -> str:
    if not results.get("paper"):
        return ""
    theirs, (low, high) = results["paper"]["fit"]["coefficients"][1], results["fit"]["interval"]
    said = f"{number(theirs, 4)} nats a decade, with another model, another tokenizer and far more text"
    if low <= theirs <= high:
        return f" The interval holds the paper’s slope: {said}."
    return f" In the paper more rows buy {'less' if high < theirs else 'more'}: {said}."


def _ends(results: Results) -> list[str]:
    """The smallest and the largest table against none."""
    base = results.get("base")
    if not base:
        return []
    first, last = (results["points"][place] for place in (0, -1))
    said = [f"{point['rows']:,} rows differ from no memory by {_change(point)}" for point in (first, last)]
    return [f"{said[0]}, {said[1]} nats a token."]


def _change(point: Results) -> str:
    """What a point's loss is less that of the first one."""
    return signed(point["less"], 4)


def _beside_bigram(results: Results) -> list[str]:
    bigram = results.get("bigram")
    if not bigram:
        return []
    pairs = list(zip(results["points"], bigram["points"], strict=False))
    lower = sum(all(mine < theirs for mine, theirs in zip(a["seeds"], b["seeds"], strict=True)) for a, b in pairs)
    slope, interval = bigram["fit"]["coefficients"][1], bigram["fit"]["interval"]
    return [
        f"An additive bigram embedding with as many table parameters has a slope of {number(slope, 4)} ({span(interval, 4)}). The "
        f"memory is lower with every seed at {lower} of {len(pairs)} sizes."
    ]


# --- shares ---------------------------------------------------------------------------------------------------------


def _allocation(results: Results) -> list[str]:
    points = sorted(results["points"], key=lambda point: point["rho"])
    best = min(range(len(points)), key=lambda place: points[place]["loss"])
    return [_against_pure(points, best), f"{_minimum(results['fit'])} {_neighbours(points, best)}"]


def _against_pure(points: list[Results], best: int) -> str:
    """The best point less the pure mixture, the last one."""
    if best == len(points) - 1:
        return "The memory did not help: the pure mixture of experts, without a memory, has the lowest loss."
    point, change = points[best], points[best]["less"]
    said = f"The best measured point leaves {percent(point['rho'])} with the experts and differs from the pure mixture by {signed(change, 4)} nats a token."
    seeds = change.get("seed_interval")
    over = f" Over {len(point['seeds'])} seeds the interval is {span(seeds, 4)}" if seeds else ""
    if side(change["interval"]) == "lower" and (not seeds or side(seeds) == "lower"):
        return f"{said}{over}{'. ' if over else ' '}Giving a part to a memory helps."
    return f"{said}{over}{', so' if over else ' So'} this sweep does not show that giving a part to a memory helps."


def _minimum(fit: Results) -> str:
    optimum = fit["optimum"]
    if optimum["rho"] is None:
        return "The fitted parabola opens downwards: there is no U here."
    if not optimum["determined"]:
        return f"The fitted parabola is lowest at {percent(optimum['rho'])}, but the points do not bound where its minimum lies."
    low, high = optimum["interval"]
    return f"The fitted parabola is lowest at {percent(optimum['rho'])} (95 %: {percent(low)} to {percent(high)})."


def _neighbours(points: list[Results], best: int) -> str:
    """Whether seeds agree that the best point is below those beside it."""
    beside = [points[place] for place in (best - 1, best + 1) if 0 <= place < len(points)]
    told = [
        point
        for point in beside
        if all(mine < theirs for mine, theirs in zip(points[best]["seeds"], point["seeds"], strict=True))
    ]
    count = len(points[best]["seeds"])
    if count < 2:
        return "With one seed, a point cannot be told from its neighbours."
    if len(told) == len(beside):
        return f"Each of {count} seeds puts the best point below its neighbours."
    return f"The {count} seeds do not all put the best point below its neighbours: it cannot be told from them."


# --- tables ---------------------------------------------------------------------------------------------------------


def _points(results: Results) -> str:
    allocation = results["kind"] == "allocation"
    columns = [
        "rows",
        "total",
        "active",
        "FLOPs a token",
        "loss",
        "loss of each seed",
    ]

    def row(point: Results) -> Row:
        return f"{percent(point['rho'])} experts" if allocation else point["name"], [
            f"{point['rows']:,}",
            quantity(point["total"]),
            quantity(point["active"]),
            quantity(point["flops_per_token"]),
            f"{point['loss']:.4f}",
            ", ".join(f"{one:.4f}" for one in point["seeds"]),
        ]

    base = [row(results["base"])] if results.get("base") else []
    bigram = [row(point) for point in (results.get("bigram") or {}).get("points", ())]
    groups = [group for group in (base, [row(point) for point in results["points"]], bigram) if group]
    return table(columns, [""] * len(columns), groups)


def _fits(results: Results) -> str:
    """Ours and the paper's fits, coefficient by coefficient."""
    fits = [("here", results["fit"])]
    fits += [("additive bigram here", results["bigram"]["fit"])] if results.get("bigram") else []
    curves = [results.get("paper"), *results.get("paper_also", ())]
    fits += [(curve["label"], curve["fit"]) for curve in curves if curve]
    width = len(results["fit"]["coefficients"])
    columns = [*"abc"[:width], "residual", "largest"]
    rows: list[Row] = [
        (
            label,
            [
                *(number(value, 4) for value in fit["coefficients"]),
                *(f"{fit[key]:.4f}" for key in ("residual", "largest_residual")),
            ],
        )
        for label, fit in fits
    ]
    return f'<p class="note">{text(results["fit"]["form"])}</p><div class="scroll">{table(columns, [""] * len(columns), [rows])}</div>'
