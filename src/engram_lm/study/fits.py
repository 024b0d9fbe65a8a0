"""Least squares for sweeps, and how far each coefficient and minimum may be trusted.

A curve is fitted to the mean over seeds at each point. With as many seeds at every point that gives the same curve as all
single losses would; its scatter around the curve then holds both what seeds leave and what the form of the curve misses, and
points, not seeds, are counted as observations. Seeds of one point share that miss: counted singly they would narrow the
interval without adding knowledge of the form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..statistics import over_seeds, student_t


@dataclass(frozen=True)
class Fit:
    """y = c[0] + c[1] x + ... + c[P-1] x^(P-1) + noise.

    freedom: points less coefficients. residual: standard deviation of the noise.
    """

    coefficients: np.ndarray  # [P]
    covariance: np.ndarray  # [P, P]
    freedom: int
    residual: float
    largest_residual: float
    r_squared: float

    def interval(self, number: int) -> tuple[float, float]:
        """95 % interval of a coefficient."""
        half = student_t(self.freedom) * math.sqrt(self.covariance[number, number])
        return float(self.coefficients[number] - half), float(self.coefficients[number] + half)

    def __call__(self, x: float) -> float:
        """The curve at x."""
        return float(np.polynomial.polynomial.polyval(x, self.coefficients))


def fit_polynomial(x: np.ndarray, y: np.ndarray, degree: int) -> Fit:
    """Ordinary least squares of y [N] on x [N].

    Raises ConfigError when no point is left over to tell the noise from.
    """
    if len(np.unique(x)) < degree + 2:
        raise ConfigError(
            f"a curve of {degree + 1} coefficients meets points at {len(np.unique(x))} places exactly: its error could not be "
            "told. Measure more points."
        )
    freedom = len(x) - degree - 1
    design = np.vander(x, degree + 1, increasing=True)  # [N, P]
    inverse = np.linalg.pinv(design)
    coefficients = inverse @ y
    left = y - design @ coefficients
    variance = np.square(left).sum() / freedom
    total = np.square(y - y.mean()).sum()
    return Fit(
        coefficients=coefficients,
        covariance=variance * inverse @ inverse.T,
        freedom=freedom,
        residual=math.sqrt(variance),
        largest_residual=float(np.abs(left).max()),
        r_squared=float(1 - np.square(left).sum() / total) if total else 1.0,
    )


# --- rows against loss ----------------------------------------------------------------------------------------------


def log_linear(rows: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """Fit loss = a + b log10(rows); rows [points], losses [points, seeds] -> plain values.

    b is nats a decade, whatever rows are counted in (a is not). curvature: the quadratic term beside it, and whether its
    interval leaves out 0, in which case the law is not log-linear over this range.
    """
    decades = np.log10(rows)
    line = fit_polynomial(decades, losses.mean(1), 1)
    slope, interval = float(line.coefficients[1]), line.interval(1)
    bent = fit_polynomial(decades, losses.mean(1), 2)
    low, high = bent.interval(2)
    slopes = np.array([fit_polynomial(decades, of_seed, 1).coefficients[1] for of_seed in losses.T])
    curved, spread = not low <= 0 <= high, over_seeds(slopes)
    return {
        "form": "loss = a + b log10(rows)",
        "coefficients": line.coefficients.tolist(),
        "interval": interval,  # of b
        "residual": line.residual,
        "largest_residual": line.largest_residual,
        "r_squared": line.r_squared,
        "freedom": line.freedom,
        "curvature": {"coefficient": float(bent.coefficients[2]), "interval": (low, high), "differs_from_0": curved},
        "seeds": slopes.tolist(),  # b of each
        "seed_interval": spread[1:] if spread else None,
        "says": f"{slope:+.4f} nats a decade (95 %: {interval[0]:+.4f} to {interval[1]:+.4f}), residual {line.residual:.4f}, "
        f"R² {line.r_squared:.3f}; {_bend(float(bent.coefficients[2]), curved)}",
    }


def _bend(curvature: float, curved: bool) -> str:
    if not curved:
        return "no curvature that the data could tell from 0"
    return f"it bends {'up' if curvature > 0 else 'down'}wards: not a straight line"


# --- share of the experts against loss ------------------------------------------------------------------------------


def u_curve(rho: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """Fit loss = a + b rho + c rho^2; rho [points], losses [points, seeds] -> plain values.

    optimum: where the fitted curve is lowest, with the 95 % set of places whose slope the data cannot tell from 0 (Fieller
    1954, exact for least squares); its interval is None where that set has no end. determined: the interval lies within the
    measured range; otherwise the data cannot tell the minimum. best: the lowest measured point, which need not lie on the curve.
    """
    means = losses.mean(1)
    curve = fit_polynomial(rho, means, 2)
    interval = stationary_interval(curve)
    bottom = lowest(curve)
    inside = interval is not None and bool(rho.min() <= interval[0] and interval[1] <= rho.max())
    best = int(means.argmin())
    optimum = {
        "rho": bottom,
        "loss": None if bottom is None else curve(bottom),
        "interval": interval,
        "determined": inside,
        "best": {"rho": float(rho[best]), "loss": float(means[best])},
        "best_of_seeds": [float(rho[place]) for place in losses.argmin(0)],
    }
    return {
        "form": "loss = a + b rho + c rho^2",
        "coefficients": curve.coefficients.tolist(),
        "interval": interval,  # of the optimum
        "intervals": [curve.interval(number) for number in range(3)],  # of a, b, c
        "residual": curve.residual,
        "largest_residual": curve.largest_residual,
        "r_squared": curve.r_squared,
        "freedom": curve.freedom,
        "optimum": optimum,
        "says": f"{_minimum(bottom, interval, inside)}; the best measured point is {rho[best]:.0%}; residual {curve.residual:.4f}",
    }


def lowest(curve: Fit) -> float | None:
    """Where a quadratic is lowest; None where it opens downwards."""
    _, b, c = curve.coefficients
    return float(-b / (2 * c)) if c > 0 else None


def stationary_interval(curve: Fit) -> tuple[float, float] | None:
    """All x at which the slope b + 2 c x of a quadratic may be 0 (95 %); None where they have no end, or are a maximum's.

    The slope's variance at x is V_bb + 4 x V_bc + 4 x^2 V_cc, so they solve (b + 2 c x)^2 <= t^2 variance: between the roots
    of a quadratic in x when c differs from 0, and unbounded when it does not.
    """
    _, b, c = curve.coefficients
    scale = student_t(curve.freedom) ** 2 * curve.covariance
    square = 4 * (c * c - scale[2, 2])
    if c <= 0 or square <= 0:
        return None
    middle = -4 * (b * c - scale[1, 2]) / (2 * square)
    half = math.sqrt(max(0.0, middle**2 - (b * b - scale[1, 1]) / square))
    return float(middle - half), float(middle + half)


def _minimum(bottom: float | None, interval: tuple[float, float] | None, inside: bool) -> str:
    if bottom is None:
        return "the fitted curve has no minimum"
    if interval is None:
        return f"the data cannot tell a minimum (fitted: {bottom:.0%})"
    told = f"minimum at {bottom:.0%} (95 %: {interval[0]:.0%} to {interval[1]:.0%})"
    return told if inside else f"{told}, which reaches beyond the measured range: the data do not bound it"
