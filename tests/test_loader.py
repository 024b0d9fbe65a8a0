"""The loader: every window once an epoch, the same continuation from any state, documents apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm import config
from engram_lm.errors import DataError, MismatchError
from engram_lm.train.loader import IGNORED, Loader, LoaderState, permuted, windows
from engram_lm.train.shards import Split


def split_of(lengths: list[int]) -> Split:
    """Documents of these lengths; a token's id is its place, so that any window tells where it comes from."""
    starts = np.cumsum([0, *lengths[:-1]])
    return Split(np.arange(sum(lengths), dtype=np.uint16), starts, np.array(lengths))


def same(a, b) -> bool:
    return all(map(torch.equal, (a.tokens, a.targets, a.segments), (b.tokens, b.targets, b.segments)))


def batches(loader: Loader, state: LoaderState, count: int):
    for _ in range(count):
        batch, state = loader.next(state)
        yield batch, state


splits = st.lists(st.integers(2, 15), min_size=1, max_size=10).map(split_of)
untimed = settings(deadline=None)  # the machine may be busy


@untimed
@given(splits, st.data())
def test_every_window_is_seen_exactly_once_an_epoch(split, data):
    length = data.draw(st.integers(1, len(split.tokens) - 1))
    n = (len(split.tokens) - 1) // length
    loader = Loader(split, data.draw(st.integers(1, n)), length, seed=data.draw(st.integers(0, 9)))
    count = -(-3 * n // loader.batch_size)
    firsts = torch.cat([batch.tokens[:, 0] for batch, _ in batches(loader, LoaderState(), count)])
    for epoch in range(3):
        assert sorted(firsts[epoch * n : (epoch + 1) * n].tolist()) == [i * length for i in range(n)]


@untimed
@given(splits, st.integers(1, 8), st.integers(0, 6), st.data())
def test_any_state_resumes_the_same_sequence(split, length, steps, data):
    length = min(length, len(split.tokens) - 1)
    n = (len(split.tokens) - 1) // length
    arguments = (split, data.draw(st.integers(1, n)), length, 3)
    through = list(batches(Loader(*arguments), LoaderState(), steps + 3))
    state = through[steps - 1][1] if steps else LoaderState()
    resumed = batches(Loader(*arguments), config.from_dict(LoaderState, config.to_dict(state)), 3)
    for (a, state_a), (b, state_b) in zip(through[steps:], resumed, strict=True):
        assert same(a, b)
        assert state_a == state_b


def naive_window(split: Split, first: int, length: int):
    """One window, token by token."""
    document = [number for number, size in enumerate(split.bytes.tolist()) for _ in range(size)]
    places = range(first, min(first + length, len(split.tokens) - 1))
    tokens = [int(split.tokens[p]) for p in places]
    targets = [int(split.tokens[p + 1]) if document[p] == document[p + 1] else IGNORED for p in places]
    return tokens, targets, [document[p] + 1 for p in places]


@untimed
@given(splits, st.integers(1, 12))
def test_a_batch_is_what_the_naive_loop_says(split, length):
    length = min(length, len(split.tokens) - 1)
    batch, _ = Loader(split, 1, length).next(LoaderState())
    tokens, targets, segments = naive_window(split, int(batch.tokens[0, 0]), length)
    assert batch.tokens.tolist() == [tokens]
    assert batch.targets.tolist() == [targets]
    assert batch.segments.tolist() == [segments]


@untimed
@given(splits, st.integers(1, 5), st.integers(1, 12))
def test_validation_sees_every_target_once_in_order(split, batch_size, length):
    seen = list(windows(split, batch_size, length))
    for i, batch in enumerate(seen):
        assert len(batch.tokens) == batch_size or i == len(seen) - 1
        for j, row in enumerate(batch.targets.tolist()):
            tokens, targets, segments = naive_window(split, (i * batch_size + j) * length, length)
            used = len(tokens)
            assert batch.tokens[j, :used].tolist() == tokens
            assert row == targets + [IGNORED] * (length - used)
            assert batch.segments[j, :used].tolist() == segments
            filling = batch.segments[j, used + 1 :]  # behind the split's last token, which has no target
            assert not set(filling.tolist()) & set(segments)
    targets = torch.cat([batch.targets.flatten() for batch in seen])
    assert targets[targets != IGNORED].tolist() == sorted(set(split.tokens.tolist()) - set(split.starts.tolist()))


def test_validation_with_a_limit_spreads_over_the_split():
    split = split_of([50, 50])
    assert [len(batch.tokens) for batch in windows(split, 4, 5, limit=6)] == [4, 2]
    assert [len(batch.tokens) for batch in windows(split, 4, 200, limit=6)] == [1]
    every = torch.cat([batch.tokens for batch in windows(split, 4, 5)])
    some = torch.cat([batch.tokens for batch in windows(split, 4, 5, limit=5)])
    assert some.tolist() == every[::4].tolist()


def test_types_and_shapes():
    batch, state = Loader(split_of([40, 40]), 3, 7).next(LoaderState())
    for tensor, dtype in (
        (batch.tokens, torch.int64),
        (batch.targets, torch.int64),
        (batch.segments, torch.int32),
    ):
        assert tensor.shape == (3, 7)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
    assert state == LoaderState(0, 3)


def test_order_depends_on_seed_and_epoch():
    split = split_of([500])
    epoch = [Loader(split, 90, 5, seed).next(LoaderState(e)) for seed, e in ((0, 0), (0, 1), (1, 0))]
    orders = [batch.tokens[:, 0].tolist() for batch, _ in epoch]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]


@untimed
@given(st.integers(1, 2000), st.integers(0, 99), st.integers(0, 99))
def test_a_permutation_permutes(n, seed, epoch):
    assert sorted(permuted(np.arange(n), n, (seed, epoch)).tolist()) == list(range(n))


def test_the_first_batches_are_those_that_next_gives():
    loader = Loader(split_of([30, 50, 7]), 4, 10, seed=3)
    expected = [batch for batch, _ in batches(loader, LoaderState(), 7)]
    assert all(map(same, loader.first(7), expected))
    assert len(list(loader.first(7))) == 7


def test_a_permutation_has_no_pattern():
    """Neighbours land far apart, and no step between them is common, as in a random order."""
    n = 10_000
    order = permuted(np.arange(n), n, (0, 0))
    steps, counts = np.unique(np.diff(order), return_counts=True)
    assert counts.max() <= 8
    assert len(steps) > n * 0.6
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05


def test_the_order_is_the_same_on_every_machine():
    """A changed order would break the continuation of every run that was begun before the change."""
    assert permuted(np.arange(8), 1000, (7, 3)).tolist() == [731, 673, 262, 210, 60, 767, 128, 926]
    assert permuted(np.arange(8), 10**12, (7, 3)).max() < 10**12


def test_a_corpus_shorter_than_a_batch_says_how_much_is_missing():
    with pytest.raises(DataError, match=r"holds 40 tokens, but one batch needs 41 \(4 windows of 10\)"):
        Loader(split_of([40]), 4, 10)
    assert Loader(split_of([41]), 4, 10).num_windows == 4


@pytest.mark.parametrize("index", [-1, 4, 99])
def test_a_state_of_another_corpus_is_refused(index):
    with pytest.raises(MismatchError, match="another corpus"):
        Loader(split_of([41]), 2, 10).next(LoaderState(0, index))
