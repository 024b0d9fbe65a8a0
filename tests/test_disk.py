"""Records in a file: the same as in RAM, whatever is read ahead, committed, rolled back, applied or reopened."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import CheckpointError, DataError, MismatchError
from engram_lm.tables.disk import FileStore
from engram_lm.tables.file import TableFile
from engram_lm.tables.rows import RowFormat
from engram_lm.tables.store import Held

FORM = RowFormat(dim=2)
NUM_ROWS = 300  # five blocks, the last one short
HERE = Path()
ALL = np.arange(NUM_ROWS)


def opened(path, write=True, **options):
    if not path.exists():
        TableFile.create(path, NUM_ROWS, FORM).close()
    file = TableFile.open(path, write=write)
    try:
        return FileStore(file, **options)
    except BaseException:
        file.close()
        raise


def records(seed, count=40):
    """Distinct ids, in no order, and records for them."""
    rng = np.random.default_rng(seed)
    return rng.permutation(NUM_ROWS)[:count], rng.integers(0, 256, (count, FORM.stride), np.uint8)


def put(store, ids, new):
    """Alter rows where they are held."""
    held = store.hold(ids)
    held.records[held.slots] = new
    store.changed(ids, held)


def contents(store):
    held = store.hold(ALL)
    return held.records[held.slots].copy()


@pytest.fixture
def store(tmp_path):
    store = opened(tmp_path / "table")
    yield store
    store.close()


# --- the same records as in RAM --------------------------------------------------------------------------------------

operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 2**32), st.integers(0, NUM_ROWS)),
        st.tuples(st.sampled_from(["save", "load", "settle", "compact", "reopen"])),
    ),
    max_size=20,
)


@pytest.mark.parametrize("reads", ["direct", "map"])
@settings(max_examples=30)
@given(operations=operations)
def test_holds_what_an_array_would(tmp_path_factory, reads, operations):
    path = tmp_path_factory.mktemp("table") / "table"
    store, clock = opened(path, reads=reads, journal_limit=2000), 0
    rows = np.zeros((NUM_ROWS, FORM.stride), np.uint8)
    saved = rows.copy()
    for name, *numbers in operations:
        match name:
            case "put":
                ids, new = records(*numbers)
                put(store, ids, new)
                rows[ids] = new
            case "save":
                clock += 1
                store.save(HERE, clock, "")
                saved = rows.copy()
            case "load":
                store.load(HERE, clock, "")
                rows = saved.copy()
            case "settle":
                store.settle(clock)
            case "compact":
                store.compact()
            case "reopen":
                store.close()
                store, rows = opened(path, reads=reads, journal_limit=2000), saved.copy()
        assert store.clock == clock
        np.testing.assert_array_equal(contents(store), rows)
    store.close()
    store = opened(path, write=False, reads=reads)
    np.testing.assert_array_equal(contents(store), saved)
    assert not store.writable
    store.close()


def test_what_is_staged_is_not_read_again(store, monkeypatch):
    put(store, *records(1))
    store.save(HERE, 1, "")
    store.compact()
    put(store, *records(2))
    wanted = np.random.default_rng(0).permutation(NUM_ROWS)[:100]
    staged = store.stage(np.sort(wanted[:60]))
    before = contents(store)

    read, plain = [], store.reader.read
    with monkeypatch.context() as patch:
        patch.setattr(store.reader, "read", lambda *arguments: (read.extend(arguments[1]), plain(*arguments)))
        held = store.hold(wanted, staged)
    assert len(read) == 40
    np.testing.assert_array_equal(held.records[held.slots], before[wanted])
    put(store, *records(3))
    staged = staged.without(np.sort(records(3)[0]))
    before[records(3)[0]] = records(3)[1]
    held = store.hold(wanted[:60], staged)  # not all of them are staged, and not all that are staged are wanted
    np.testing.assert_array_equal(held.records[held.slots], before[wanted[:60]])


def test_what_is_held_is_altered_apart_from_what_was_staged(store):
    ids, new = records(1)
    put(store, ids, new)
    staged = store.stage(np.sort(ids))
    held = store.hold(np.sort(ids), staged)
    held.records[held.slots] = 0
    assert staged.records.any()


def test_records_may_be_changed_wherever_they_are_held(store):
    ids, new = records(1)
    elsewhere = np.zeros((500, FORM.stride), np.uint8)
    slots = np.random.default_rng(0).permutation(500)[: len(ids)]
    elsewhere[slots] = new
    store.changed(ids, Held(elsewhere, slots))
    np.testing.assert_array_equal(contents(store)[ids], new)


def test_nothing_is_held_of_no_ids(store):
    held = store.hold(ALL[:0], store.stage(ALL[:0]))
    store.changed(ALL[:0], held)
    assert held.records.shape == (0, FORM.stride)
    assert store.journal.empty


def test_blocks_that_were_never_written_are_not_read(store, monkeypatch):
    places = []
    plain = store.reader.read

    def read(descriptor, offsets, out):
        places.extend((descriptor, int(offset)) for offset in offsets)
        plain(descriptor, offsets, out)

    monkeypatch.setattr(store.reader, "read", read)
    assert not contents(store).any()
    assert places == []
    ids = np.array([70, 75])  # of block 1
    put(store, ids, 7)
    assert not places
    contents(store)
    assert [descriptor for descriptor, _ in places] == [store.journal.descriptor] * 2
    store.save(HERE, 1, "")
    store.compact()
    places.clear()
    assert (contents(store)[ids] == 7).all()
    assert {place for _, place in places} == set(store.file.offsets(np.arange(64, 128)).tolist())


def test_reading_ahead_beside_training_gives_whole_records(tmp_path):
    """Every record is one number over and over, and that number rises: what is staged is of some moment since it began."""
    store, stop = opened(tmp_path / "table", journal_limit=100_000), threading.Event()
    version, failures = np.zeros(NUM_ROWS, np.int64), []

    def stage():
        rng = np.random.default_rng()
        while not stop.is_set():
            ids = np.sort(rng.permutation(NUM_ROWS)[:100])
            before = version[ids].copy()
            staged = store.stage(ids).records.astype(np.int64)
            after = version[ids] + 1  # the update under way
            if not (
                (staged == staged[:, :1]).all() and (before <= staged[:, 0]).all() and (staged[:, 0] <= after).all()
            ):
                failures.append((ids, before, staged, after))

    threads = [threading.Thread(target=stage) for _ in range(2)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(0)
    for clock in range(1, 200):
        ids = rng.permutation(NUM_ROWS)[:50]
        put(store, ids, (version[ids] + 1)[:, None])
        version[ids] += 1
        if clock % 5 == 0:
            store.save(HERE, clock, "")
            store.settle(clock)
        if clock % 50 == 0:
            store.load(HERE, clock, "")
            store.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    np.testing.assert_array_equal(contents(store)[:, 0], version)
    store.close()


# --- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_is_applied_when_it_is_large_enough(tmp_path):
    store = opened(tmp_path / "table", journal_limit=2000)
    put(store, *records(1))
    store.save(HERE, 1, "")
    store.settle(1)
    assert store.file.clock == 0
    put(store, *records(2))
    put(store, *records(3))
    store.save(HERE, 2, "")
    store.settle(1)
    assert store.file.clock == 1
    np.testing.assert_array_equal(store.file.read(0, NUM_ROWS)[records(1)[0]], records(1)[1])
    store.close()


def test_a_run_begins_with_the_rows_of_the_file(tmp_path):
    path = tmp_path / "table"
    store = opened(path)
    store.begin(0, again=False)
    put(store, *records(1))
    store.save(HERE, 4, "")
    store.close()
    store = opened(path)
    with pytest.raises(MismatchError, match="updates of an earlier run, up to clock 4"):
        store.begin(0, again=False)
    store.begin(0, again=True)
    assert store.clock == 0
    assert not contents(store).any()
    put(store, *records(2))
    store.save(HERE, 2, "")
    store.compact()
    store.begin(0, again=False)
    np.testing.assert_array_equal(contents(store)[records(2)[0]], records(2)[1])
    store.close()


def test_reading_only_gives_an_earlier_commit_too(tmp_path):
    path = tmp_path / "table"
    store = opened(path)
    for clock in (1, 2):
        put(store, *records(clock))
        store.save(HERE, clock, "")
    store.load(HERE, 1, "")
    expected = contents(store)
    store.close()
    store = opened(path, write=False)
    store.load(HERE, 1, "")
    np.testing.assert_array_equal(contents(store), expected)
    store.close()


def test_a_table_is_written_by_one_at_a_time(tmp_path):
    store = opened(tmp_path / "table")
    for write in (True, False):
        with pytest.raises(CheckpointError, match="in use"):
            opened(tmp_path / "table", write=write)
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["table"]  # the journal had nothing to say
    opened(tmp_path / "table").close()


def test_a_file_that_shrank_is_an_error(tmp_path):
    path = tmp_path / "table"
    store = opened(path)
    put(store, ALL, 1)
    store.save(HERE, 1, "")
    store.compact()
    os.truncate(path, store.file.rows_offset + 10 * FORM.stride)
    with pytest.raises(DataError):
        store.hold(ALL)
    store.close()


def test_resident_bytes_follow_the_rows_that_changed(store):
    small = store.resident
    put(store, ALL, 1)
    assert store.resident >= small + NUM_ROWS * FORM.stride
    for clock in range(20):
        put(store, ALL, clock)
        store.save(HERE, clock, "")
    grown = store.resident
    put(store, ALL, 1)
    assert store.resident == grown
    assert store.nbytes == NUM_ROWS * FORM.stride
