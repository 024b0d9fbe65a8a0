"""Loss against training tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..record import Curve, LanguageAct
from .style import BASE, CONTROL, DASHED, DOTTED, ENGRAM, Style, label_ends, line, style_of, svg, tokens_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]


def loss_curves(act: LanguageAct) -> str:
    """Loss against training tokens: thin averaged lines for training, points for validation.

    The frame is fitted to what follows the first tenth, in which every model falls from the loss of a uniform
    guess. Raises MissingExtraError without matplotlib.
    """
    styles: list[Style] = [(BASE, DASHED), (CONTROL, DOTTED), (ENGRAM, "solid")]

    def draw(axes: Axes) -> None:
        for arm, style in zip(act.arms, styles, strict=True):
            axes.plot(*_smooth(arm.curve).T, color=style[0], linewidth=0.8, alpha=0.55)
            line(axes, arm.val_curve, style)
        _frame_after_first_tenth(axes)
        tokens_axis(axes)
        axes.set_ylabel("loss, nats a token")
        ends = [arm.val_curve[-1] for arm in act.arms]
        label_ends(axes, ends, [arm.name for arm in act.arms], [colour for colour, _ in styles])

    return svg("loss_curves", "Training and validation loss of each arm against training tokens", draw)


def retrofit_curves(curves: dict[str, Curve]) -> str:
    """Held-out loss against training tokens, a line an arm. Raises MissingExtraError likewise."""

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            line(axes, curve, style_of(name), markersize=2.5)
        axes.set_xlim(left=0)
        tokens_axis(axes)
        axes.set_ylabel("held-out loss, nats a token")
        label_ends(axes, [curve[-1] for curve in curves.values()], list(curves), [style_of(name)[0] for name in curves])

    return svg("retrofit_curves", "Held-out loss of each arm against training tokens", draw)


def arm_curves(results: Results) -> str:
    """Held-out loss of a comparison's arms against training tokens, the first seed's; of training where there is too little."""
    arms = distinct(results)
    measured = all(len(arm["val_curve"]) > 1 for arm in arms.values())

    def draw(axes: Axes) -> None:
        curves = {name: arm["val_curve"] if measured else _smooth(arm["curve"], 30) for name, arm in arms.items()}
        for name, curve in curves.items():
            line(axes, curve, style_of(name), linewidth=1.3, markersize=2.2)
        _frame_after_first_tenth(axes)
        tokens_axis(axes)
        axes.set_ylabel(f"{'held-out' if measured else 'training'} loss, nats a token")
        ends = [tuple(curve[-1]) for curve in curves.values()]
        label_ends(axes, ends, list(curves), [style_of(name)[0] for name in curves])

    return svg("arm_curves", "Loss of each arm against training tokens", draw, (5.0, 3.6))


def gain_curves(results: Results) -> str:
    """Training loss of each arm less the base's on the same batches, averaged, against training tokens; the first seed's."""
    arms = distinct(results)
    base = np.array(arms["base"]["curve"])

    def draw(axes: Axes) -> None:
        ends, names = [], [name for name in arms if name != "base"]
        for name in names:
            less = np.array(arms[name]["curve"]) - base * [0, 1]
            curve = _smooth(less, 40)
            line(axes, curve, style_of(name), marker="", linewidth=1.3)
            ends.append((float(curve[-1, 0]), float(curve[-1, 1])))
        axes.axhline(0, color=style_of("base")[0], linewidth=0.8)
        _frame_after_first_tenth(axes)
        tokens_axis(axes)
        axes.set_ylabel("training loss less base's, nats a token")
        label_ends(axes, ends, names, [style_of(name)[0] for name in names])

    return svg("gain_curves", "Training loss of each arm less that of base, against training tokens", draw, (5.0, 3.6))


def distinct(results: Results) -> dict[str, Results]:
    """Arms that are models of their own."""
    return {name: arm for name, arm in results["arms"].items() if not arm.get("same_as")}


def _smooth(curve: Any, stretches: int = 80) -> np.ndarray:
    """The means of `stretches` equal parts of a curve, [stretches, 2]; a shorter curve stays as it is."""
    parts = np.array_split(np.array(curve), min(stretches, len(curve)))
    return np.array([part.mean(axis=0) for part in parts])


def _frame_after_first_tenth(axes: Axes) -> None:
    """Fit the y axis to what lies beyond the first tenth of the x axis."""
    points = np.concatenate([line.get_xydata() for line in axes.lines])
    late = points[points[:, 0] >= 0.1 * points[:, 0].max(), 1]
    margin = 0.04 * (late.max() - late.min()) or 0.1
    axes.set_ylim(late.min() - margin, late.max() + margin)
