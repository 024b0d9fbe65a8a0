"""The kernel against the readable truth, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm import kernels
from engram_lm.hashing import HashConfig, HashPlan, hash_ngrams, reference_hash_ngrams

pytest.importorskip("numba")
fast = pytest.importorskip("engram_lm.kernels.hashing")

BIG = 2**63 - 1


def reduced(mixes, sizes, by_reciprocal=True):
    """What the kernel makes of each mix and eight sizes: [mixes, 8]."""
    sizes, ids = np.array(sizes), np.empty(8 * len(mixes), np.int64)
    fast.reduce(np.array([mixes]), 8, by_reciprocal, sizes, fast.lowered(sizes), np.arange(8), ids)
    return ids.reshape(-1, 8) - np.arange(8)


@given(
    sizes=st.lists(
        st.integers(2**14, 2**62) | st.sampled_from([2**14, 2**14 + 1, 2**31 - 1, 2**53 + 1]), min_size=8, max_size=8
    ),
    mixes=st.lists(st.integers(0, BIG), min_size=1),
)
@settings(max_examples=300)
def test_remainders_are_exact(sizes, mixes):
    """For any mix, and next to the multiples, where a quotient that is off by one shows."""
    mixes += [mix - mix % size + step for mix in (*mixes, BIG) for size in sizes for step in (0, size - 1, -1)]
    mixes = [mix for mix in mixes if 0 <= mix <= BIG]
    assert reduced(mixes, sizes).tolist() == [[mix % size for size in sizes] for mix in mixes]


def test_smaller_sizes_would_not_be_exact():
    """So the limit is needed."""
    mixes = [BIG - below for below in range(1000)]
    exact = [[mix % 3] * 8 for mix in mixes]
    assert reduced(mixes, [3] * 8).tolist() != exact
    assert reduced(mixes, [3] * 8, by_reciprocal=False).tolist() == exact
    plan = HashPlan.build(HashConfig(rows_per_head=(20_000, 16_000)), vocab_size=10, pad=2)
    assert not fast.Constants.of(plan).by_reciprocal


@st.composite
def plans(draw):
    orders = tuple(sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=3))))
    rows = st.integers(1, 60) | st.sampled_from([2**14, 16_000_000, 2**31, 2**53])
    config = HashConfig(
        orders=orders,
        heads=draw(st.sampled_from([1, 2, 3, 8, 11, 16])),
        rows_per_head=draw(rows | st.tuples(*[rows] * len(orders))),
        layers=draw(st.sampled_from([(0,), (1, 14), (5, 2, 9)])),
        seed=draw(st.integers(0, 99)),
        scheme=draw(st.sampled_from(["engram", "engram", "ple", "capacity_1"])),
    )
    return HashPlan.build(
        config, vocab_size=draw(st.sampled_from([4, 30, 100_000, 2**40])), pad=draw(st.integers(0, 3))
    )


@given(
    plan=plans(),
    batch=st.integers(0, 3),
    lengths=st.lists(st.integers(0, 9) | st.sampled_from([300, 700]), min_size=1, max_size=4),
    given_arguments=st.sets(st.sampled_from(["segments", "dead"])),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150)
def test_same_as_the_reference_in_any_pieces(plan, batch, lengths, given_arguments, seed):
    g = torch.Generator().manual_seed(seed)
    history = None
    for length in lengths:
        tokens = torch.randint(0, plan.vocab_size, (batch, length), generator=g)
        tokens[torch.rand(tokens.shape, generator=g) < 0.1] = plan.pad
        arguments = {
            "segments": (torch.rand(batch, length, generator=g) < 0.2).cumsum(1),
            "dead": torch.rand(batch, length, generator=g) < 0.1,
        }
        arguments = {name: arguments[name] for name in given_arguments}
        expected, expected_history = reference_hash_ngrams(plan, tokens, history=history, **arguments)
        ids, history = hash_ngrams(plan, tokens, history=history, **arguments)
        assert ids.dtype == history.dtype == torch.int64
        assert torch.equal(ids, expected)
        assert torch.equal(history, expected_history)


@pytest.mark.parametrize("shape", [(1, 2000), (5, 333), (700, 1), (40, 2)])
def test_threads_meet_in_the_middle_of_a_sequence(shape, monkeypatch):
    monkeypatch.setattr(kernels, "threads", lambda: 3)
    monkeypatch.setattr(fast, "GRAIN", 1)
    plan = HashPlan.build(HashConfig.deepseek_v41(), vocab_size=1000, pad=2)
    tokens, segments = torch.randint(0, 1000, shape), torch.randint(0, 2, shape)
    for one, other in zip(
        hash_ngrams(plan, tokens, segments=segments),
        reference_hash_ngrams(plan, tokens, segments=segments),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_strided_and_narrow_arguments():
    plan = HashPlan.build(HashConfig(rows_per_head=50), vocab_size=10, pad=2)
    tokens, segments = torch.randint(0, 10, (9, 4)).t(), torch.randint(0, 2, (4, 18), dtype=torch.int32)[:, ::2]
    dead = (torch.rand(9, 4) < 0.2).t()
    _, history = hash_ngrams(plan, tokens)
    arguments = {"segments": segments, "dead": dead, "history": history.flip(0)[[3, 1, 1, 0]]}
    for one, other in zip(
        hash_ngrams(plan, tokens, **arguments), reference_hash_ngrams(plan, tokens, **arguments), strict=True
    ):
        assert torch.equal(one, other)


def test_an_id_outside_the_vocabulary_is_seen_wherever_it_is(monkeypatch):
    monkeypatch.setattr(kernels, "threads", lambda: 3)
    monkeypatch.setattr(fast, "GRAIN", 1)
    plan = HashPlan.build(HashConfig(), vocab_size=10, pad=2)
    for at in (0, 700, 1399):
        for token in (-1, 10, BIG):
            tokens = torch.zeros(2, 700, dtype=torch.int64)
            tokens.view(-1)[at] = token
            with pytest.raises(ValueError, match=f"{token}.*arbitrary rows"):
                hash_ngrams(plan, tokens, dead=torch.ones(2, 700, dtype=torch.bool))
