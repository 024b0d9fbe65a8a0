"""The map from ids to places: against a dict, through growth, deletion and runs that wrap around."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.kernels.index import DictMap, IdMap

ids_of = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**62)), max_size=60)
steps_of = st.lists(st.tuples(st.sampled_from(["put", "remove", "clear"]), ids_of), max_size=12)


def array(numbers) -> np.ndarray:
    return np.array(numbers, np.int64)


def contents(index: IdMap) -> dict[int, int]:
    ids, values = index.items()
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("kind", [IdMap, DictMap])
@given(steps=steps_of, asked=ids_of)
def test_it_is_a_dict(kind, steps, asked):
    index, truth, value = kind(1), {}, 0
    for step, ids in steps:
        if step == "put":
            values = list(range(value, value := value + len(ids)))
            index.put(array(ids), array(values))
            truth.update(zip(ids, values, strict=True))
        elif step == "remove":
            index.remove(array(ids))
            truth = {i: v for i, v in truth.items() if i not in ids}
        elif not ids:  # seldom
            index.clear()
            truth = {}
        asked = asked + ids
        assert contents(index) == truth
        assert len(index) == len(truth)
        assert index.get(array(asked)).tolist() == [truth.get(i, -1) for i in asked]


def test_growth_keeps_all_and_stays_in_proportion():
    rng = np.random.default_rng(0)
    ids = rng.permutation(1_000_000)[:50_000] * 7919
    index = IdMap()
    for part in np.split(ids, 50):
        index.put(part, part + 1)
    assert len(index) == 50_000
    assert (index.get(ids) == ids + 1).all()
    assert (index.get(ids + 1) == -1).all()
    assert index.nbytes <= 16 * 4 * 50_000 or isinstance(index, DictMap)


def test_a_map_of_the_right_capacity_never_grows():
    index = IdMap(10_000)
    before = index.nbytes
    for _ in range(3):  # removed ones leave nothing behind that would fill the cells
        index.put(np.arange(10_000), np.arange(10_000))
        index.remove(np.arange(10_000))
    index.put(np.arange(5_000, 15_000), np.arange(10_000))
    assert len(index) == 10_000
    assert index.nbytes == before or isinstance(index, DictMap)


@pytest.mark.parametrize("kind", [IdMap, DictMap])
def test_ids_that_share_a_home_and_wrap_around(kind):
    """Ids whose home is the last cell of 64: their run goes on at cell 0, and holes in it are closed."""
    every = np.arange(20_000, dtype=np.uint64)
    same = every[(every * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(58) == 63][:30].astype(np.int64)
    index = kind(1)
    index.put(same, np.arange(30))
    for gone in np.random.default_rng(1).permutation(30):
        index.remove(same[gone : gone + 1])
        assert index.get(same[gone : gone + 1]) == -1
        left = contents(index)
        assert all(left[i] == value for i, value in zip(same.tolist(), range(30), strict=True) if i in left)
        assert index.get(array(list(left))).tolist() == list(left.values())
    assert len(index) == 0


@pytest.mark.parametrize("kind", [IdMap, DictMap])
def test_crowded_cells(kind):
    """Runs of ids with different homes: those behind a hole move into it only as far as they may."""
    rng = np.random.default_rng(2)
    index, every = kind(40), rng.integers(0, 2**40, 80)
    for _ in range(100):
        index.put(every[:40], np.arange(40))
        gone = rng.permutation(40)
        for i in gone[:20]:
            index.remove(every[i : i + 1])
        expected = np.arange(40)
        expected[gone[:20]] = -1
        assert (index.get(every[:40]) == expected).all()
        index.clear()
        rng.shuffle(every)


def test_without_numba_it_is_the_dict(monkeypatch):
    monkeypatch.setattr("engram_lm.kernels.index.compiled", lambda: False)
    assert type(IdMap(8)) is DictMap
