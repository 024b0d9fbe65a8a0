"""Intervals against published quantiles, and against how often they hold the truth."""

import math

import numpy as np
import pytest

from engram_lm.errors import DataError, MismatchError
from engram_lm.statistics import over_documents, over_seeds, ratio_interval, student_t, wilson, within

# Two-sided 95 % quantiles as in any table, for example NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    9: 2.262,
    10: 2.228,
    29: 2.045,
    30: 2.042,
    100: 1.984,
}


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_quantiles_of_students_t(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 12])
def test_the_distribution_is_the_integral_of_its_density(degrees):
    t = np.linspace(-2, 2, 100_001)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2)
    assert within(2.0, degrees) == pytest.approx(np.trapezoid(density, t), abs=1e-8)


def test_with_many_degrees_t_is_normal():
    assert student_t(100_000) == pytest.approx(1.95996, abs=1e-4)


def test_seeds():
    mean, low, high = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2
    assert (low, high) == (
        pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4),
        pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4),
    )
    assert over_seeds([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_one_seed_tells_nothing():
    assert over_seeds([1.0]) is None
    assert over_seeds(np.zeros(0)) is None


def test_the_interval_over_three_seeds_covers_the_truth():
    rng = np.random.default_rng(0)
    intervals = [over_seeds(rng.normal(1, 2, 3)) for _ in range(2000)]
    assert 0.93 <= np.mean([low < 1 < high for _, low, high in intervals]) <= 0.97


# --- documents ----------------------------------------------------------------------------------------------


def documents(seeds: int, number: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Nats [seeds, number] and tokens [number]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, 500, number).astype(np.float64)
    return tokens * rng.normal(4, 0.5, number) + rng.normal(0, 3, (seeds, number)), tokens


def test_the_difference_is_that_of_the_means_over_seeds():
    base, tokens = documents(3)
    own = base - 0.2 * tokens + np.random.default_rng(1).normal(0, 2, base.shape)
    difference, interval = over_documents(own, base, tokens)
    change = (own - base).mean(0)
    assert difference == pytest.approx(change.sum() / tokens.sum())
    assert interval == pytest.approx(ratio_interval(change, tokens))
    assert interval[0] < difference < interval[1] < 0


def test_the_difference_is_paired():
    base, tokens = documents(2)
    difference, interval = over_documents(base - 0.3 * tokens, base, tokens)
    assert difference == pytest.approx(-0.3)
    assert interval == pytest.approx((-0.3, -0.3))


def test_arms_may_have_different_numbers_of_seeds():
    base, tokens = documents(1)
    own = np.concatenate([base - tokens, base - 3 * tokens])
    assert over_documents(own, base, tokens)[0] == pytest.approx(-2)


def test_documents_without_tokens_do_not_count():
    base, tokens = documents(2, number=12)
    tokens[3:] = 0
    base[:, 3:] = 0
    own = base - 0.1 * tokens
    own[:, :3] += np.arange(3)
    assert over_documents(own, base, tokens) == over_documents(own[:, :3], base[:, :3], tokens[:3])
    tokens[1:], base[:, 1:], own[:, 1:] = 0, 0, 0
    assert over_documents(own, base, tokens) == (pytest.approx(-0.1), None)


def test_bad_comparisons_are_refused():
    base, tokens = documents(2)
    with pytest.raises(MismatchError, match="different evaluations"):
        over_documents(base, base[:, 1:], tokens)
    with pytest.raises(MismatchError, match="different evaluations"):
        over_documents(base, base, tokens[1:])
    with pytest.raises(DataError, match="no document has a token"):
        over_documents(base * 0, base * 0, tokens * 0)


# --- shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "trials", "interval"),
    [
        (0, 20, (0.0, 0.1611)),
        (15, 148, (0.0624, 0.1605)),
        (81, 263, (0.2553, 0.3662)),
        (1, 29, (0.0061, 0.1718)),
    ],  # Newcombe 1998, table I
)
def test_wilson(right, trials, interval):
    assert wilson(right / trials, trials) == pytest.approx(interval, abs=1e-4)
    low, high = wilson(1 - right / trials, trials)
    assert (1 - high, 1 - low) == pytest.approx(interval, abs=1e-4)


def test_no_trial_says_nothing():
    assert wilson(0.0, 0) == (0.0, 1.0)
