"""Loss against the size of the table or the share of the experts, with a fitted curve and how far it may be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BASE, DASHED, ENGRAM, INK, PANEL, PURPLE, log_axis, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]


def sweep_curve(results: Results) -> str:
    """Our points (each seed a dot, the interval of the mean over documents) and the fit with its 95 % band.

    Raises MissingExtraError without matplotlib.
    """

    def draw(axes: Axes) -> None:
        for found, colour in ((results, ENGRAM), (results.get("bigram"), PURPLE)):
            if not found:
                continue
            x = np.array(places(results, found["points"]), np.float64)
            for place, point in zip(x, found["points"], strict=True):
                if point["interval"]:
                    axes.plot(
                        [place] * 2, point["interval"], color=colour, linewidth=4, alpha=0.25, solid_capstyle="butt"
                    )
                axes.plot([place] * len(point["seeds"]), point["seeds"], "o", color=colour, markersize=2.2, alpha=0.7)
                axes.plot(place, point["loss"], "D", color=colour, markersize=4)
            _fit(axes, results, found["fit"], x, colour)
        if results.get("base"):
            _level(axes, results["base"]["loss"])
        _frame(axes, results, *_ours(results))

    return svg("sweep_curve", "Measured loss and fitted curve", draw, PANEL)


def paper_curve(results: Results) -> str:
    """The paper's points and the same fit to them, over as many nats and as wide an x axis as ours. Raises likewise."""
    paper = results["paper"]

    def draw(axes: Axes) -> None:
        x = np.array(paper["x"], np.float64)
        axes.plot(x, paper["y"], "s", color=BASE, markersize=4)
        _fit(axes, results, paper["fit"], x, BASE)
        if paper.get("base"):
            _level(axes, paper["base"])
        _frame(axes, results, *_papers(results))

    return svg("paper_curve", "The paper's curve", draw, PANEL)


def places(results: Results, points: Sequence[Results]) -> list[float]:
    """Where points lie along x."""
    return [point["rows" if results["kind"] == "memory" else "rho"] for point in points]


def _ours(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """All that our panel must hold, along x and y."""
    points = [*results["points"], *((results.get("bigram") or {}).get("points", ()))]
    base = [results["base"]["loss"]] if results.get("base") else []
    losses = [value for point in points for value in (*point["seeds"], *(point["interval"] or ()))]
    return np.array(places(results, points), np.float64), np.array(losses + base)


def _papers(results: Results) -> tuple[np.ndarray, np.ndarray]:
    paper = results["paper"]
    base = [paper["base"]] if paper.get("base") else []
    return np.array(paper["x"], np.float64), np.array([*paper["y"], *base])


def _frame(axes: Axes, results: Results, x: np.ndarray, y: np.ndarray) -> None:
    """Axes around x and y, as wide (in decades of rows) and as high as the wider and higher panel needs: slopes look alike."""
    decades = results["kind"] == "memory"
    panels = (_ours(results), _papers(results))
    width, height = (1.12 * max(float(np.ptp(_scaled(p[n], decades and n == 0))) for p in panels) for n in (0, 1))
    if decades:
        log_axis(axes, "rows of the table")
    else:
        axes.set_xlabel("share of the sparse parameters that experts keep")
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        axes.locator_params(axis="x", nbins=6)
    middle = _middle(_scaled(x, decades))
    edges = np.array([middle - width / 2, middle + width / 2])
    axes.set_xlim(*(10**edges if decades else edges))
    axes.set_ylim(_middle(y) - height / 2, _middle(y) + height / 2)
    axes.set_ylabel("held-out loss, nats a token")
    axes.locator_params(axis="y", nbins=6)


def _scaled(values: np.ndarray, decades: bool) -> np.ndarray:
    return np.log10(values) if decades else values


def _middle(values: np.ndarray) -> float:
    return float(values.min() + values.max()) / 2


def _level(axes: Axes, loss: float) -> None:
    """The model without a memory."""
    axes.axhline(loss, color=INK, linewidth=0.9, linestyle=DASHED)
    axes.annotate(
        "no memory",
        (1, loss),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


def _fit(axes: Axes, results: Results, fit: Results, x: np.ndarray, colour: str) -> None:
    decades = results["kind"] == "memory"
    at = _scaled(x, decades)
    fine = np.linspace(at.min(), at.max(), 60)
    curve = np.polynomial.polynomial.polyval(fine, fit["coefficients"])
    shown = 10**fine if decades else fine
    axes.plot(shown, curve, color=colour, linewidth=1.2)
    half = band(at, fine, fit)
    if half is not None:
        axes.fill_between(shown, curve - half, curve + half, color=colour, alpha=0.15, linewidth=0)


def band(x: np.ndarray, at: np.ndarray, fit: Results) -> np.ndarray | None:
    """Half width of the 95 % band of a polynomial fitted by least squares at x, from the interval of its last coefficient.

    With C = (X'X)^-1 that interval is t s sqrt(C_pp), and the band t s sqrt(v' C v) at powers v. None without the interval.
    """
    degree = len(fit["coefficients"]) - 1
    interval = fit["intervals"][degree] if "intervals" in fit else fit["interval"] if degree == 1 else None
    if interval is None:
        return None
    design, powers = (np.vander(values, degree + 1, increasing=True) for values in (x, at))
    inverse = np.linalg.pinv(design)
    covariance = inverse @ inverse.T
    scale = (interval[1] - interval[0]) / 2 / np.sqrt(covariance[degree, degree])
    return scale * np.sqrt(np.einsum("np,pq,nq->n", powers, covariance, powers))
