"""Which rows a text reads most: n-grams are as uneven as words, so few rows answer many lookups."""

from __future__ import annotations

import numpy as np

from ..model.lookup import Lookup
from .loader import Batches, first

BATCHES = 64  # that are counted


def hottest(lookup: Lookup, batches: Batches) -> np.ndarray:
    """Numbers of the rows that the first batches read, the most wanted first.

    A batch reads a row once, however often it names it: so do tables.
    """
    seen = [lookup.ids(batch.tokens, segments=batch.segments)[0].unique() for batch in first(batches, BATCHES)]
    rows, counts = np.unique(np.concatenate([ids.cpu().numpy() for ids in seen]), return_counts=True)
    return rows[np.argsort(-counts, kind="stable")]
