"""Fits of sweeps: the truth is found, intervals cover it as often as they say, and the paper's own curves come out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.statistics import student_t
from engram_lm.study import paper
from engram_lm.study.fits import fit_polynomial, log_linear, stationary_interval, u_curve

ROWS = np.geomspace(1e4, 4e6, 7)
RHO = np.array([1.0, 0.95, 0.85, 0.75, 0.65, 0.55, 0.4])


def noisy(truth: np.ndarray, noise: float, seeds: int = 1, seed: int = 0) -> np.ndarray:
    """[points, seeds]"""
    return truth[:, None] + noise * np.random.default_rng(seed).normal(size=(len(truth), seeds))


def parabola(bottom: float, depth: float = 0.2) -> np.ndarray:
    return 1.7 + depth * (RHO - bottom) ** 2


@pytest.mark.parametrize("degree", [1, 2])
def test_least_squares_agree_with_numpys(degree: int) -> None:
    y = noisy(parabola(0.7), 0.01)[:, 0]
    coefficients, covariance = np.polyfit(RHO, y, degree, cov=True)  # falling powers
    fit = fit_polynomial(RHO, y, degree)
    np.testing.assert_allclose(fit.coefficients[::-1], coefficients, rtol=1e-8)
    np.testing.assert_allclose(fit.covariance[::-1, ::-1], covariance, rtol=1e-6)


@given(a=st.floats(1, 9), b=st.floats(-0.5, 0.5), unit=st.floats(0.1, 1e4))
def test_slope_is_found_whatever_rows_are_counted_in(a: float, b: float, unit: float) -> None:
    fit = log_linear(ROWS * unit, (a + b * np.log10(ROWS))[:, None])
    assert fit["coefficients"][1] == pytest.approx(b, abs=1e-9)
    assert fit["largest_residual"] < 1e-9


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    slopes, minima = 0, 0
    for draw in range(400):
        low, high = log_linear(ROWS, noisy(5 - 0.03 * np.log10(ROWS), 0.004, seeds=2, seed=draw))["interval"]
        slopes += low <= -0.03 <= high
        optimum = u_curve(RHO, noisy(parabola(0.72), 0.001, seed=draw))["optimum"]
        minima += optimum["interval"][0] <= 0.72 <= optimum["interval"][1]
    assert 0.92 <= slopes / 400 <= 0.98
    assert 0.92 <= minima / 400 <= 0.98


@pytest.mark.parametrize("bend", [-0.02, 0.0, 0.02])
def test_a_curve_is_told_from_a_straight_line(bend: float) -> None:
    decades = np.log10(ROWS)
    fit = log_linear(ROWS, noisy(5 - 0.3 * decades + bend * decades**2, 0.001, seeds=2))
    assert fit["curvature"]["differs_from_0"] == (bend != 0)
    assert ("not a straight line" in fit["says"]) == (bend != 0)
    assert bend == 0 or np.sign(fit["curvature"]["coefficient"]) == np.sign(bend)


def test_seeds_have_slopes_of_their_own() -> None:
    decades = np.log10(ROWS)[:, None]
    fit = log_linear(ROWS, 5 + decades * np.array([-0.03, -0.02]))
    assert fit["seeds"] == pytest.approx([-0.03, -0.02])
    assert fit["seed_interval"] == pytest.approx((-0.025 - 0.005 * student_t(1), -0.025 + 0.005 * student_t(1)))
    assert log_linear(ROWS, 5 - 0.03 * decades)["seed_interval"] is None


@pytest.mark.parametrize("noise", [0.0005, 0.003])
def test_the_minimums_interval_is_where_the_slope_may_be_zero(noise: float) -> None:
    curve = fit_polynomial(RHO, noisy(parabola(0.7), noise)[:, 0], 2)
    x = np.linspace(-1, 2, 30_001)
    gradient = np.stack([np.zeros_like(x), np.ones_like(x), 2 * x])  # of the slope, by coefficient
    slope = gradient.T @ curve.coefficients
    error = np.sqrt(np.einsum("px,pq,qx->x", gradient, curve.covariance, gradient))
    flat = x[np.abs(slope) <= student_t(curve.freedom) * error]
    assert stationary_interval(curve) == pytest.approx((flat.min(), flat.max()), abs=2e-4)


def test_a_minimum_is_found_only_where_the_data_tell_one() -> None:
    clear = u_curve(RHO, noisy(parabola(0.7), 0.0005, seeds=2))
    assert clear["optimum"]["rho"] == pytest.approx(0.7, abs=0.05)
    assert clear["optimum"]["determined"]

    flat = u_curve(RHO, noisy(np.full(7, 1.7), 0.01))
    assert flat["interval"] is None
    assert not flat["optimum"]["determined"]

    falling = u_curve(RHO, noisy(parabola(0.1), 0.0002))  # the bottom lies to the left of what was measured
    assert not falling["optimum"]["determined"]
    assert falling["optimum"]["best"]["rho"] == 0.4
    assert "beyond the measured range" in falling["says"]

    hill = u_curve(RHO, noisy(parabola(0.7, depth=-0.2), 0.0005))
    assert hill["optimum"]["rho"] is None
    assert hill["says"].startswith("the fitted curve has no minimum")


def test_the_best_point_is_measured_not_fitted() -> None:
    losses = np.stack([parabola(0.7), parabola(0.7)], axis=1)
    losses[1, :] = 1.69, 1.6
    optimum = u_curve(RHO, losses)["optimum"]
    assert optimum["best"] == {"rho": 0.95, "loss": pytest.approx(1.645)}
    assert optimum["best_of_seeds"] == [0.95, 0.95]


def test_the_papers_curves_come_out_of_its_points() -> None:
    memory = log_linear(np.array(paper.MEMORY.x), paper.MEMORY.losses)
    assert memory["coefficients"] == pytest.approx([1.9418, -0.0284], abs=2e-4)
    assert not memory["curvature"]["differs_from_0"]
    for curve, drawn in ((paper.ALLOCATION, 0.738), (paper.ALLOCATION_SMALLER, 0.725)):  # minima of its dashed lines
        optimum = u_curve(np.array(curve.x), curve.losses)["optimum"]
        assert optimum["rho"] == pytest.approx(drawn, abs=0.005)
        assert optimum["best"]["rho"] == pytest.approx(0.85, abs=0.005)


def test_points_that_any_curve_meets_are_refused() -> None:
    with pytest.raises(ConfigError, match="its error could not be told"):
        fit_polynomial(np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0]), 1)
