"""What a text does with a table, against loops over its positions and n-grams."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.analysis.cache_curve import Stream, curve
from engram_lm.analysis.ngrams import Ngrams, crowding, rows_of, views
from engram_lm.analysis.usage import hot_set, usage
from engram_lm.errors import DataError
from engram_lm.model.lookup import Lookup, build_plan
from engram_lm.tables import DeviceTable
from engram_lm.tables.rows import RowFormat, initial
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.loader import Batch, windows

HASHES = {
    "engram": replace(tiny.HASH, rows_per_head=29, layers=(1, 0)),
    "three heads": replace(tiny.HASH, heads=3, rows_per_head=(11, 53), orders=(1, 3)),
    "ple": replace(tiny.HASH, scheme="ple", pad_id=5, orders=(2, 4)),
    "capacity_1": replace(tiny.HASH, scheme="capacity_1"),
}


def lookup_of(config, std=0.0):
    """A table behind a vocabulary that folds pairs of tokens."""
    vocabulary = CanonicalVocabulary(np.arange(tiny.VOCABULARY) // 2)
    plan = build_plan(config, vocabulary)
    form = RowFormat(4, std=std, seed=3)
    return Lookup(vocabulary, plan, DeviceTable(plan.num_rows, form))


def batches(length=11):
    return list(windows(tiny.split(), 3, length))


def reads(lookup, batches):
    """Slow: (layer, order, head, row, n-gram) of every read, from what the lookup itself says and from the text."""
    plan, found = lookup.plan, []
    for batch in batches:
        ids = lookup.ids(batch.tokens, segments=batch.segments)[0].unflatten(-1, (len(plan.orders), plan.heads))
        canonical = lookup.vocabulary(batch.tokens).tolist()
        for b, t in np.ndindex(*batch.tokens.shape):
            for column, order in enumerate(plan.orders):
                ngram, inside = [], True
                for place in range(t, t - order, -1):
                    inside &= place >= 0 and bool(batch.segments[b, place] == batch.segments[b, t])
                    ngram.append(canonical[b][place] if inside else plan.pad)
                    inside &= place == t or ngram[-1] != plan.eos
                for layer, head in np.ndindex(len(plan.layers), plan.heads):
                    row = int(ids[b, t, layer, column, head])
                    found.append((plan.layers[layer], order, head, row, tuple(ngram)))
    return found


@pytest.mark.parametrize("name", HASHES)
def test_counts_are_those_of_a_loop(name):
    lookup = lookup_of(HASHES[name])
    slow = reads(lookup, batches())
    found = usage(lookup, batches())
    per_row = Counter(read[3] for read in slow)
    assert found["reads"] == len(slow)
    assert found["tokens"] * lookup.plan.sizes.size == len(slow)
    assert found["rows"] == lookup.plan.num_rows
    assert found["used"] == len(per_row)
    assert found["coverage"] == len(per_row) / lookup.plan.num_rows

    limits = [(0, 0), (1, 1), (2, 3), (4, 15), (16, 63), (64, 255), (256, 10**9)]
    inside = [[count for count in per_row.values() if low <= count <= high] for low, high in limits]
    expected = [lookup.plan.num_rows - len(per_row), *map(len, inside[1:])]
    assert found["histogram"]["reads"] == ["0", "1", "2-3", "4-15", "16-63", "64-255", "256+"]
    assert found["histogram"]["rows"] == expected
    assert found["histogram"]["share_of_reads"] == pytest.approx([sum(counts) / len(slow) for counts in inside])

    by_frequency = sorted(per_row.values(), reverse=True)
    for rows, share in zip(found["hot"]["rows"], found["hot"]["share"], strict=True):
        assert share == pytest.approx(sum(by_frequency[:rows]) / len(slow))
    assert found["hot"]["rows"][-1] == len(per_row)


@pytest.mark.parametrize("name", HASHES)
def test_collisions_are_those_of_a_loop(name):
    lookup = lookup_of(HASHES[name])
    plan, slow = lookup.plan, reads(lookup, batches())
    found = usage(lookup, batches())["blocks"]
    assert [(block["layer"], block["order"]) for block in found] == [(l, o) for l in plan.layers for o in plan.orders]
    for block in found:
        here = [read[2:] for read in slow if read[:2] == (block["layer"], block["order"])]
        ngrams_of, rows_of_ngram = defaultdict(set), defaultdict(dict)
        for head, row, ngram in here:
            ngrams_of[row].add(ngram)
            rows_of_ngram[ngram][head] = row
        shared = {ngram: [len(ngrams_of[r]) > 1 for r in rows.values()] for ngram, rows in rows_of_ngram.items()}
        same = Counter(tuple(rows[head] for head in range(plan.heads)) for rows in rows_of_ngram.values())
        number, column = len(rows_of_ngram), plan.orders.index(block["order"])
        heads = slice(column * plan.heads, (column + 1) * plan.heads)
        rows = int(plan.sizes[plan.layers.index(block["layer"]), heads].sum())
        assert block == {
            "layer": block["layer"],
            "order": block["order"],
            "rows": rows,
            "used": len(ngrams_of),
            "coverage": pytest.approx(len(ngrams_of) / rows),
            "ngrams": number,
            "ngrams_per_row": pytest.approx(np.mean([len(ngrams) for ngrams in ngrams_of.values()])),
            "shared": pytest.approx(np.mean(list(shared.values()))),
            "shared_everywhere": pytest.approx(np.mean([all(heads) for heads in shared.values()])),
            "indistinguishable": pytest.approx(sum(n for n in same.values() if n > 1) / number),
            "shared_reads": pytest.approx(np.mean([len(ngrams_of[row]) > 1 for _, row, _ in here])),
        }


def test_one_row_a_head_is_shared_by_all():
    found = usage(lookup_of(HASHES["capacity_1"]), batches())
    assert found["coverage"] == 1
    for block in found["blocks"]:
        assert [block[key] for key in ("shared", "shared_everywhere", "indistinguishable", "shared_reads")] == [1] * 4


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=40))
def test_ngrams_are_counted_exactly(seen):
    text = Ngrams.of(np.array(seen), 10)
    for n in (1, 2, 3):
        expected = Counter(tuple(view[:n]) for view in seen)
        counted = zip(text.seen[n - 1].tolist(), text.counts[n - 1].tolist(), strict=True)
        assert {tuple(ngram): count for ngram, count in counted} == expected
        asked = np.array([*seen, [9, 9, 9], [0, 9, 0], [0, 0, 9]])
        assert text.times(asked)[:, n - 1].tolist() == [expected[tuple(view[:n])] for view in asked.tolist()]


@pytest.mark.parametrize("name", HASHES)
def test_rows_of_views_are_those_of_the_text(name):
    lookup, batch = lookup_of(HASHES[name]), batches()[0]
    seen = views(lookup, batch.tokens, batch.segments)
    expected = lookup.ids(batch.tokens, segments=batch.segments)[0]
    assert np.array_equal(rows_of(lookup.plan, seen).reshape(expected.shape), expected)


def test_crowding_counts_the_others_in_the_fullest_head():
    lookup = lookup_of(HASHES["engram"])
    plan = lookup.plan
    training = Ngrams.of(np.concatenate([views(lookup, b.tokens, b.segments) for b in batches()]), plan.vocab_size)
    text = views(
        lookup, torch.cat([batches()[0].tokens[:1], tiny.text(11)])
    )  # one text of the training text's, one not
    rows, collides = crowding(plan, training, text)
    assert np.array_equal(rows, rows_of(plan, text)[:, 0])
    for t, view in enumerate(text):
        for column, order in enumerate(plan.orders):
            others = [ngram for ngram in training.seen[order - 1] if ngram.tolist() != view[:order].tolist()]
            taken = rows_of(plan, np.array(others))[:, 0, column]
            assert collides[t, column] == (taken == rows[t, column]).sum(0).max()


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_norms_are_those_of_the_rows_that_are_read(std):
    lookup = lookup_of(HASHES["engram"], std)
    table = lookup.table
    per_row = Counter(read[3] for read in reads(lookup, batches()))
    ids = torch.tensor(sorted(per_row))
    grown = ids[::2]
    table.write(grown, table.fetch(grown) * 3 + 1)
    found = usage(lookup, batches())["norms"]

    rows = table.fetch(ids)
    start = initial(table.form, ids) if std else torch.zeros_like(rows)
    norm, moved = rows.norm(dim=1).numpy(), (rows - start).norm(dim=1).numpy()
    assert found["rows"] == len(ids)
    assert found["initial"] == std * 2
    assert found["unmoved"] == pytest.approx(1 - len(grown) / len(ids))
    for name, values in ("norm", norm), ("moved", moved):
        assert found[name] == {q: pytest.approx(np.quantile(values, float(q)), rel=1e-5) for q in found[name]}
    counts = np.array([per_row[row] for row in ids.tolist()])
    often = (counts >= 16) & (counts < 64)
    bucket = next(bucket for bucket in found["by_reads"] if bucket["reads"] == "16-63")
    assert bucket["rows"] == often.sum()
    assert bucket["norm"] == pytest.approx(np.median(norm[often]), rel=1e-5)
    assert sum(bucket["rows"] for bucket in found["by_reads"]) == len(ids)


def test_only_rows_that_are_read_are_fetched_and_no_more_than_asked_for(monkeypatch):
    lookup, fetched = lookup_of(HASHES["engram"]), []
    used = {read[3] for read in reads(lookup, batches())}
    fetch = DeviceTable.fetch
    monkeypatch.setattr(DeviceTable, "fetch", lambda self, ids: (fetched.extend(ids.tolist()), fetch(self, ids))[1])
    assert usage(lookup, batches(), norm_rows=40)["norms"]["rows"] == 40
    assert len(set(fetched)) == len(fetched) == 40
    assert set(fetched) <= used


def test_the_cache_curve_is_that_of_the_ids():
    lookup = lookup_of(HASHES["engram"])
    found = usage(lookup, batches(), cache_tokens=50)["cache"]
    ids = torch.cat([lookup.ids(b.tokens, segments=b.segments)[0].flatten(0, 1) for b in batches()])[:50]
    stream = Stream.of(ids.flatten(1).numpy())
    assert found["tokens"] == 50
    assert found["slots"][-1] == len(stream.rows)
    for policy in ("s3fifo", "static"):
        assert found[policy] == curve(stream, found["slots"], policy)[:, 0].tolist()


def test_the_hot_set_of_equal_rows_grows_evenly():
    assert hot_set(np.ones(20, np.int64)) == {"rows": [1, 4, 16, 20], "share": [0.05, 0.2, 0.8, 1.0]}


def test_no_text_is_refused():
    with pytest.raises(DataError, match="no text"):
        usage(lookup_of(tiny.HASH), [])


def test_a_single_token_is_a_text():
    batch = Batch(torch.tensor([[1]]), torch.tensor([[2]]), None)
    found = usage(lookup_of(tiny.HASH), [batch])
    assert found["reads"] == found["used"] == 4
