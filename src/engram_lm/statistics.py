"""What a figure rests on: other documents, other seeds, other questions.

Two uncertainties of a loss, never mixed. Over documents: had other text been held out. Tokens of one document resemble each other,
so documents are resampled, whole; a loss is a ratio, sum of nats / sum of tokens, so long ones weigh more. Over seeds: had the
weights and the order of batches been drawn anew; arms of a seed see the same batches, so seeds are paired. Differences are
paired too: nats of one model less nats of the other on the same documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .errors import DataError, MismatchError

Interval = tuple[float, float]
NORMAL_95 = 1.959964
DRAWS, SOME = 4000, 250  # of all resamples, and of those that are in memory at a time


def ratio_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> Interval | None:
    """95 % percentile interval of sum(sums) / sum(counts) over documents [D]; None for fewer than two of them."""
    documents = len(sums)
    if documents < 2:
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(0, DRAWS, SOME):
        drawn = generator.multinomial(documents, np.full(documents, 1 / documents), SOME)
        ratios.append((drawn @ sums) / (drawn @ counts))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return float(low), float(high)


def over_documents(nats: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> tuple[float, Interval | None]:
    """Loss of one arm less another's, the means over their seeds, with its paired 95 % interval over documents.

    nats: [S, D]; other: [S', D]; tokens: [D], of which some may be 0. Nats a token; the interval is None for fewer than two
    documents that have tokens. Raises MismatchError when the documents do not agree, DataError when none has a token.
    """
    if not nats.shape[1] == other.shape[1] == len(tokens):
        raise MismatchError(
            f"losses of {nats.shape[1]} and {other.shape[1]} documents and sizes of {len(tokens)}: they come from different "
            "evaluations, and their difference would mean nothing."
        )
    some = tokens > 0
    if not some.any():
        raise DataError("no document has a token to compare losses on; the difference would be 0 / 0.")
    change, tokens = (nats.mean(0) - other.mean(0))[some], tokens[some]
    return float(change.sum() / tokens.sum()), ratio_interval(change, tokens)


def over_seeds(values: Sequence[float] | np.ndarray) -> tuple[float, float, float] | None:
    """Mean of one value a seed, and its 95 % interval by Student's t (low, high); None for fewer than two seeds.

    For a comparison, give the difference of each seed: the test is then paired.
    """
    seeds = len(values)
    if seeds < 2:
        return None
    mean = float(np.mean(values))
    half = student_t(seeds - 1) * float(np.std(values, ddof=1)) / math.sqrt(seeds)
    return mean, mean - half, mean + half


def student_t(degrees: int) -> float:
    """What |t| stays below with probability 95 %, for whole degrees of freedom; by bisection."""
    low, high = 0.0, 16.0  # one degree has 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, degrees) < 0.95 else (low, middle)
    return high


def within(t: float, degrees: int) -> float:
    """Probability that |T| < t for Student's T with whole degrees of freedom (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def wilson(share: float, trials: int) -> Interval:
    """95 % score interval of a share of independent trials (Wilson 1927); all that is possible for none."""
    if trials == 0:
        return 0.0, 1.0
    z = NORMAL_95
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
