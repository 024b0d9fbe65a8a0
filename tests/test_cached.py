"""A cache changes nothing but speed: the same bytes as the store behind it, whatever is held, altered, staged or rolled back."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.kernels import cache, compiled
from engram_lm.tables.cached import CachedStore
from engram_lm.tables.rows import RowFormat
from engram_lm.tables.store import Held, Staged, Store

ROWS = 24


class PlainStore(Store):
    """Records in an array that nobody outside may touch, and what was saved of it: a file in small."""

    resident = 1000

    def __init__(self, num_rows=ROWS, writable=True):
        self.num_rows, self.form, self.writable = num_rows, RowFormat(1, "int8", trainable=False), writable
        self.records = np.random.default_rng(0).integers(0, 256, (num_rows, self.form.stride), np.uint8)
        self.saved = {0: self.records.copy()}
        self.reads = []  # ids that were neither cached nor staged

    def hold(self, ids, staged=None):
        ahead = np.empty(0, np.int64) if staged is None else staged.ids
        self.reads += ids[~np.isin(ids, ahead)].tolist()
        records = self.records[ids]
        for i, record in zip(ahead, () if staged is None else staged.records, strict=True):
            records[ids == i] = record
        return Held(records, np.arange(len(ids)))

    def stage(self, ids):
        return Staged(ids, self.records[ids])

    def changed(self, ids, held):
        self.records[ids] = held.records[held.slots]

    def save(self, directory, clock, digest):
        self.saved[clock] = self.records.copy()

    def load(self, directory, clock, digest):
        self.records = self.saved[clock].copy()


def array(numbers):
    return np.array(sorted(numbers), np.int64)


def contents(held):
    return held.records[held.slots]


def alter(store, ids, value):
    """As an optimizer does it: in place, where the records are held."""
    held = store.hold(ids)
    held.records[held.slots] += np.uint8(value)
    store.changed(ids, held)


some_ids = st.sets(st.integers(0, ROWS - 1), min_size=1).map(array)
few_ids = st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=4).map(array)
step_of = st.one_of(
    st.tuples(st.just("hold"), st.one_of(some_ids, few_ids)),
    st.tuples(st.just("alter"), st.one_of(some_ids, few_ids)),
    st.tuples(st.just("stage"), st.one_of(some_ids, few_ids)),
    st.tuples(st.just("staged hold"), st.one_of(some_ids, few_ids)),
    st.tuples(st.just("save"), st.none()),
    st.tuples(st.just("load"), st.none()),
)


@settings(max_examples=150)
@given(
    rows=st.integers(0, 12),
    hot=st.sets(st.integers(0, ROWS - 1), max_size=12),
    steps=st.lists(step_of, max_size=20),
)
def test_same_bytes_as_the_store_itself(rows, hot, steps):
    truth, cached = PlainStore(), CachedStore(PlainStore(), rows, hot=array(sorted(hot)[:rows]))
    staged, altered = None, set()
    for number, (step, ids) in enumerate(steps):
        if step == "hold":
            assert (contents(cached.hold(ids)) == contents(truth.hold(ids))).all()
        elif step == "alter":
            alter(truth, ids, number)
            alter(cached, ids, number)
            altered |= set(ids.tolist())
        elif step == "stage":
            staged, altered = cached.stage(ids), set()
        elif step == "staged hold" and staged is not None:  # of other ids too, with others held since
            held = cached.hold(ids, staged.without(array(altered)))
            assert (contents(held) == contents(truth.hold(ids))).all()
        elif step == "save":
            truth.save(None, 1, "")
            cached.save(None, 1, "")
        elif step == "load":
            truth.load(None, max(truth.saved), "")
            cached.load(None, max(truth.saved), "")
            staged = None
        assert (cached.inner.records == truth.records).all()  # nothing is in the cache alone
    every = np.arange(ROWS)
    assert (contents(cached.hold(every)) == truth.records).all()


def test_rows_in_the_cache_are_not_read_again():
    inner = PlainStore()
    store = CachedStore(inner, 8)
    ids = np.arange(6)
    store.hold(ids)
    first = store.hold(ids[::-1].copy())
    assert inner.reads == ids.tolist()
    assert len(store.stage(ids).ids) == 0
    assert store.stage(np.arange(3, 9)).ids.tolist() == [6, 7, 8]
    assert (contents(first) == inner.records[ids[::-1]]).all()
    assert (store.counts.hits, store.counts.misses, store.counts.evictions) == (6, 6, 0)
    assert store.counts.hit_rate == 0.5


def test_staged_records_are_not_read_and_cached_ones_win():
    inner = PlainStore()
    store = CachedStore(inner, 8)
    ids = np.arange(4)
    staged = store.stage(ids)
    alter(store, ids[:2], 1)  # these come into the cache after they were staged
    inner.reads.clear()
    assert (contents(store.hold(ids, staged)) == inner.records[ids]).all()
    assert inner.reads == []


def test_a_call_never_evicts_its_own_rows():
    store = CachedStore(PlainStore(), 10)
    store.hold(np.arange(10))
    ids = np.array([3, 20, 9, 21, 0, 22, 15, 16])
    held = store.hold(ids)
    assert len(set(held.slots.tolist())) == len(ids)
    assert (contents(held) == store.inner.records[ids]).all()
    assert store.counts.evictions == 5


@pytest.mark.parametrize("hot", [[], [2, 5, 7]])
def test_a_call_of_more_rows_than_slots(hot):
    inner = PlainStore()
    store, before = CachedStore(inner, 5, hot=array(hot)), inner.records.copy()
    every = np.arange(ROWS)
    alter(store, every, 9)
    assert (inner.records == before + np.uint8(9)).all()
    inner.reads.clear()
    assert (contents(store.hold(every)) == inner.records).all()
    assert len(inner.reads) == ROWS - 5  # the slots were filled all the same


def test_hot_rows_stay_and_come_back_after_a_load():
    inner = PlainStore()
    hot = array([1, 4, 9])
    store = CachedStore(inner, 5, hot=hot)
    for ids in np.random.default_rng(0).permutation(np.tile(np.arange(ROWS), 3)).reshape(-1, 1):
        store.hold(ids)
    inner.reads.clear()
    store.hold(hot)
    assert inner.reads == []
    alter(store, hot, 3)
    store.load(None, 0, "")
    inner.reads.clear()
    assert (contents(store.hold(hot)) == inner.saved[0][hot]).all()
    assert inner.reads == []


def test_with_hot_rows_only_nothing_else_is_kept():
    inner = PlainStore()
    store = CachedStore(inner, 3, hot=array([1, 4, 9]))
    inner.reads.clear()
    for _ in range(2):
        store.hold(np.arange(6))
    assert inner.reads == [0, 2, 3, 5] * 2
    assert store.counts.hit_rate == 1 / 3
    store.counts.reset()
    assert store.counts.hit_rate == 0


def test_a_read_that_fails_leaves_the_cache_as_it_was():
    class Failing(PlainStore):
        def hold(self, ids, staged=None):
            if 7 in ids:
                raise OSError("no")
            return super().hold(ids, staged)

    inner = Failing()
    store = CachedStore(inner, 4)
    store.hold(np.arange(4))
    with pytest.raises(OSError, match="no"):
        store.hold(np.arange(2, 10))
    assert (contents(store.hold(np.arange(6))) == inner.records[:6]).all()


def kept_by_the_policy(calls, count):
    """The truth, in queues: after each call, the ids in `count` slots that it keeps."""
    probation, main, uses = deque([None] * count), deque(), {}
    for ids in calls:
        held = {i for i in ids if i in uses}
        for i in held:
            uses[i] = min(uses[i] + 1, 3)
        new, aside = [], set()
        for i in ids:
            while i not in held:
                if probation and (len(probation) + len(new) > count // 4 or not main):
                    row = probation.popleft()
                    if row is None or uses[row] == 0:
                        break
                    uses[row] = 0
                    main.append(row)
                elif main:
                    row = main.popleft()
                    if row in held:
                        aside.add(row)
                    elif uses[row] == 0:
                        break
                    else:
                        uses[row] -= 1
                        main.append(row)
                else:
                    row = i
                    break
            if i not in held and row != i:
                uses.pop(row, None)
                new.append(i)
        probation.extend(new)
        main.extend(i for i in ids if i in aside)
        uses |= dict.fromkeys(new, 0)
        yield sorted(uses)


@pytest.mark.parametrize("kind", ["compiled", "plain"])
@given(
    count=st.integers(0, 20),
    hot=st.integers(0, 3),
    calls=st.lists(
        st.lists(st.integers(0, 5), max_size=30).map(lambda steps: np.unique(np.cumsum(steps))), max_size=20
    ),
)
def test_the_policy_call_by_call(kind, count, hot, calls):
    with pytest.MonkeyPatch.context() as patch:
        if kind == "plain" and compiled():
            for name in ("admit", "make_room", "push", "pop"):
                patch.setattr(cache, name, getattr(cache, name).py_func)
        every = np.arange(200)
        store = CachedStore(PlainStore(200), count + hot, hot=every[200 - hot :])
        for ids, kept in zip(calls, kept_by_the_policy([ids.tolist() for ids in calls], count), strict=True):
            store.hold(ids)
            absent = store.stage(every[: 200 - hot]).ids
            assert np.setdiff1d(every[: 200 - hot], absent).tolist() == kept


def test_a_scan_does_not_wash_out_what_is_used_again():
    store = CachedStore(PlainStore(10_000), 200)
    used, rng = np.arange(100), np.random.default_rng(0)
    for first in range(1000, 10_000, 50):
        store.hold(np.sort(rng.choice(used, 10, replace=False)))
        if first == 4000:
            store.counts.reset()
        store.hold(np.arange(first, first + 50))  # each once
    hits = store.counts.hits / (store.counts.hits + store.counts.misses) * 60 / 10
    assert hits > 0.8  # FIFO or LRU of this size forget a row after 200 others, and find a third


@pytest.mark.parametrize("steps", [1, 2])
def test_altering_is_no_second_use(steps):
    """Rows that one step of training reads and updates leave first; those of two steps stay."""
    store, rows = CachedStore(PlainStore(200), 40), np.arange(8)
    for _ in range(steps):
        store.hold(rows)
        alter(store, rows, 1)
    for first in range(100, 140, 8):
        store.hold(np.arange(first, first + 8))
    assert len(store.stage(rows).ids) == (8 if steps == 1 else 0)


def test_what_it_weighs():
    inner = PlainStore(100_000)
    store = CachedStore(inner, 50_000)
    assert store.nbytes == inner.nbytes
    weight = store.resident - inner.resident
    assert 50_000 * inner.form.stride < weight <= 50_000 * CachedStore.bytes_per_row(inner.form)


def test_read_only_over_a_read_only_store():
    assert CachedStore(PlainStore(), 4).writable
    assert not CachedStore(PlainStore(writable=False), 4).writable


def test_hot_rows_that_cannot_be():
    with pytest.raises(ConfigError, match="3 hot rows do not fit in a cache of 2"):
        CachedStore(PlainStore(), 2, hot=np.arange(3))
    with pytest.raises(ConfigError, match="counted for another"):
        CachedStore(PlainStore(), 2, hot=np.array([ROWS]))
