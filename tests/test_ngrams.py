"""Counts of n-grams against counting them one by one."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.train.loader import IGNORED, Batch, Loader, LoaderState, windows
from engram_lm.train.ngrams import Positions, count_ngrams, seen_ngrams
from engram_lm.train.shards import Split

DOCUMENTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=6)
ORDERS = st.sampled_from([(2,), (1, 3), (2, 3, 4), (3, 2)])


def split(documents: list[list[int]]) -> Split:
    """Documents behind separators."""
    texts = [[0, *document] for document in documents]
    starts = np.cumsum([0, *map(len, texts[:-1])])
    return Split(np.concatenate(texts).astype(np.uint16), starts, np.array([len(text) for text in texts]))


def one_by_one(batches: list[Batch]):
    """(window, place, target, n-gram of every order that is whole there) of each position, in order."""
    for batch in batches:
        for tokens, targets, segments in zip(*(part.tolist() for part in vars(batch).values()), strict=True):
            for last in range(len(tokens)):
                ngrams = {}
                for order in range(1, last + 2):
                    first = last - order + 1
                    if segments[first] == segments[last]:
                        ngrams[order] = tuple(tokens[first : last + 1])
                yield targets[last], segments[last], ngrams


@given(DOCUMENTS, DOCUMENTS, st.integers(2, 9), ORDERS)
def test_seen_ngrams_counts_what_a_loop_counts(trained_on, documents, length, orders):
    training = list(windows(split(trained_on), 2, length))
    batches = list(windows(split(documents), 3, length))
    counts: Counter[tuple] = Counter()
    for target, _, ngrams in one_by_one(training):
        for ngram in ngrams.values():
            counts[ngram, None] += 1
            counts[ngram, target] += target >= 0
    alone, followed = seen_ngrams((Positions.of([batch]) for batch in training), Positions.of(batches), orders)
    for row, (target, _, ngrams) in enumerate(one_by_one(batches)):
        for column, order in enumerate(orders):
            whole = order in ngrams
            assert alone[row, column] == (counts[ngrams[order], None] if whole else -1)
            assert followed[row, column] == (counts[ngrams[order], target] if whole and target >= 0 else -1)


@given(DOCUMENTS, st.integers(1, 9))
def test_positions_know_documents_and_reach(documents, length):
    batches = list(windows(split(documents), 2, length))
    positions = Positions.of(batches)
    slow = [(target, document, max(ngrams)) for target, document, ngrams in one_by_one(batches)]
    found = zip(positions.targets.tolist(), positions.documents.tolist(), positions.reach.tolist(), strict=True)
    assert list(found) == slow
    np.testing.assert_array_equal(positions.counted, [target >= 0 for target, *_ in slow])
    assert positions.counted.sum() == sum(map(len, documents))  # each token but the separators is a target once


def test_windows_count_as_often_as_they_were_read():
    text = split([[1, 2, 1, 2, 1, 2, 3, 3, 1]])
    loader, everything = Loader(text, batch_size=1, length=3, seed=1), Positions.of(windows(text, 1, 3))
    state, read = LoaderState(), []
    for _ in range(2 * loader.num_windows):
        batch, state = loader.next(state)
        read.append(Positions.of([batch]))
    once, twice, first = (seen_ngrams(training, everything, (3,))[0] for training in ([everything], read, read[:1]))
    whole = everything.reach == 3
    np.testing.assert_array_equal(twice[whole], 2 * once[whole])
    assert sorted(first[whole, 0].tolist()) == [0, 0, 1]


def test_windows_without_segments_are_documents():
    tokens = torch.tensor([[1, 2, 1, 2], [2, 1, 2, 1]])
    targets = torch.tensor([[2, 1, 2, 3], [1, 2, 1, IGNORED]])
    positions = Positions.of([Batch(tokens, targets, None)])
    assert positions.reach.tolist() == [1, 2, 3, 4] * 2
    alone, followed = seen_ngrams([positions], positions, (2,))
    assert alone[:, 0].tolist() == [-1, 3, 3, 3, -1, 3, 3, 3]
    assert followed[:, 0].tolist() == [-1, 2, 2, 1, -1, 2, 2, -1]


def test_no_batches_have_no_positions():
    assert [len(field) for field in vars(Positions.of([])).values()] == [0, 0, 0, 0]


def test_nothing_was_seen_without_training():
    positions = Positions.of(windows(split([[1, 2, 3]]), 1, 4))
    assert seen_ngrams([], positions, (2,))[0].tolist() == [[-1], [0], [0], [0]]


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(0, 4), max_size=12),
    st.sampled_from([(2,), (2, 3), (4, 1)]),
)
def test_count_ngrams_counts_what_a_loop_counts(training, text, orders):
    def count(end: int, order: int) -> int:
        ngram = text[end - order + 1 : end + 1] if end >= order - 1 else None
        return sum(training[i : i + order] == ngram for i in range(len(training) - order + 1))

    counted = count_ngrams(np.array(training, dtype=np.int64), np.array(text, dtype=np.int64), orders)
    assert counted == [[count(end, order) for order in orders] for end in range(len(text))]


def test_count_ngrams_does_not_overflow_with_a_large_vocabulary():
    ids = np.array([2**31, 2**31 - 1, 2**31, 2**31 - 1, 2**31])
    assert count_ngrams(ids, ids, (4,)) == [[0], [0], [0], [1], [1]]
