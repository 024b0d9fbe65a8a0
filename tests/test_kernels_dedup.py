"""Distinct ids by the kernel and by torch: the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lm import kernels
from engram_lm.tables import dedup as tables
from engram_lm.tables import deduplicate

pytest.importorskip("numba")
fast = pytest.importorskip("engram_lm.kernels.dedup")

SPREADS = {
    "any": lambda n, g: torch.randint(0, 800_000_000, (n,), generator=g),
    "few": lambda n, g: torch.randint(0, 50, (n,), generator=g) * 16_000_057,
    "one": lambda n, g: torch.full((n,), 767_999_999),
    "most the same": lambda n, g: torch.randint(0, 800_000_000, (n,), generator=g) * (torch.rand(n, generator=g) < 0.1),
    "neighbours far off": lambda n, g: torch.cat([torch.randint(0, 3, (n - 1,), generator=g), torch.tensor([2**40])]),
    "falling": lambda n, g: torch.arange(n).flip(0),
}


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(fast, "threads", lambda: request.param)
    monkeypatch.setattr(kernels, "threads", lambda: request.param)
    monkeypatch.setattr(fast, "GRAIN", 300)


def check(ids):
    unique, inverse = deduplicate(ids)
    expected, expected_inverse = torch.unique(ids, return_inverse=True)
    assert unique.dtype == inverse.dtype == torch.int64
    assert torch.equal(unique, expected)
    assert torch.equal(inverse, expected_inverse)


@given(
    st.sampled_from([5, 2**14, 2**30, 2**46, 2**63 - 1]).flatmap(
        lambda most: st.lists(st.integers(0, most) | st.integers(0, min(most, 300)), max_size=200)
    )
)
def test_same_as_torch(ids):
    check(torch.tensor(ids, dtype=torch.int64))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("count", [2, 1000, 70_001])
def test_threads_take_ranges_however_the_ids_are_spread(spread, count, threads):
    check(SPREADS[spread](count, torch.Generator().manual_seed(count)))


def test_shapes_strides_and_nothing():
    check(torch.randint(0, 99, (3, 4, 2, 5)))
    check(torch.randint(0, 99, (6, 8)).t()[::2])
    check(torch.tensor(7))
    check(torch.empty(0, 2, dtype=torch.int64))


def test_results_are_not_overwritten_by_the_next_call():
    ids = torch.tensor([5, 3, 5])
    unique, inverse = deduplicate(ids)
    deduplicate(torch.tensor([9, 8, 7]))
    assert unique.tolist() == [3, 5]
    assert inverse.tolist() == [1, 0, 1]


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_a_negative_id_is_refused(compiled, monkeypatch):
    monkeypatch.setattr(tables, "compiled", lambda: compiled)
    with pytest.raises(IndexError, match="id -3 is negative"):
        deduplicate(torch.tensor([4, -3, 2**62, -1]))
