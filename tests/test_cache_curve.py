"""The curve is that of the cache itself, and its ends are known without it."""

import numpy as np
import pytest

from engram_lm.analysis.cache_curve import Stream, curve
from engram_lm.tables.cached import CachedStore
from engram_lm.tables.rows import RowFormat
from engram_lm.tables.store import Held, Store


class Zeros(Store):
    """Rows of nothing."""

    num_rows, form, resident = 10**6, RowFormat(1), 0

    def hold(self, ids, staged=None):
        return Held(np.zeros((len(ids), self.form.stride), np.uint8), np.arange(len(ids)))

    def save(self, directory, clock, digest):
        raise NotImplementedError

    def load(self, directory, clock, digest):
        raise NotImplementedError


def text(tokens=600, rows_per_token=4, seed=0):
    """Rows [T, K] in which few are frequent: a power law."""
    rng = np.random.default_rng(seed)
    ranks = (rng.pareto(0.7, (tokens, rows_per_token)) * 10).astype(np.int64).clip(max=9_999)
    return ranks * 4 + np.arange(rows_per_token)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("policy", ["s3fifo", "static", "half"])
def test_it_counts_what_the_cache_counts(tokens, policy):
    ids = text()
    stream = Stream.of(ids, tokens, warm=0.4)
    calls = [np.unique(ids[first : first + tokens]) for first in range(0, len(ids) - tokens + 1, tokens)]
    warm = int(0.4 * len(calls))
    for slots in (0, 5, 60, 300):
        asked, counts = np.unique(np.concatenate(calls[:warm]), return_counts=True)
        hot = asked[np.argsort(-counts, kind="stable")][: {"s3fifo": 0, "static": slots, "half": slots // 2}[policy]]
        store = CachedStore(Zeros(), len(hot) if policy == "static" else slots, hot=hot)
        for call in calls[:warm]:
            store.hold(call)
        store.counts.reset()
        for call in calls[warm:]:
            store.hold(call)
        assert curve(stream, [slots], policy).tolist() == [[store.counts.hit_rate]]
        assert stream.hits(slots, policy).sum() == store.counts.hits


def test_a_cache_of_all_rows_misses_each_row_once():
    ids = text()
    stream = Stream.of(ids)
    before = np.isin(ids[300:], ids[:300])
    _, first = np.unique(ids, return_index=True)
    expected = 1 - (first >= ids[:300].size).sum() / ids[300:].size
    assert curve(stream, [len(stream.rows)])[0, 0] == pytest.approx(expected)
    assert curve(stream, [len(stream.rows)], "static")[0, 0] == pytest.approx(before.mean())
    assert curve(stream, [0])[0, 0] == 0


def test_groups_make_up_the_whole():
    stream = Stream.of(text(), tokens=8)
    group = stream.rows % 4
    rates = curve(stream, [20, 200], group=group)
    shares = np.bincount(group[stream.measured]) / len(stream.measured)
    assert rates.shape == (2, 5)
    np.testing.assert_allclose(rates[:, 1:] @ shares, rates[:, 0])
    assert (rates[1] > rates[0]).all()
