"""How far a loss would move had other documents been held out, by resampling documents.

Tokens of one document resemble each other, so documents are the unit. The loss is a ratio, sum of nats / sum of tokens, so
long documents weigh more. Differences are paired: nats of one model less nats of the other on the same documents.
"""

from __future__ import annotations

import numpy as np

DRAWS, SOME = 4000, 250  # of all resamples, and of those that are in memory at a time


def ratio_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
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
