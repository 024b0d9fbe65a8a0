"""The journal against a dict of dicts: any order of operations, a kill before and within any write, damage, a full disk."""

import errno
import os
import random
import re
import signal
import stat
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import CheckpointError, DataError, MismatchError
from engram_lm.kernels.reads import Reader
from engram_lm.tables import journal as journals
from engram_lm.tables.file import TableFile
from engram_lm.tables.journal import HEAD, UNIT, Journal
from engram_lm.tables.rows import RowFormat

FORM = RowFormat(dim=2)
NUM_ROWS = 300  # five blocks, the last one short
KILLS = int(os.environ.get("ENGRAM_KILLS", "4"))


class Model:
    """What a journal must remember: the rows now and at each commit, all in memory."""

    def __init__(self):
        self.now = np.zeros((NUM_ROWS, FORM.stride), np.uint8)
        self.commits = {0: self.now.copy()}

    def append(self, ids, records):
        self.now[ids] = records

    def commit(self, clock):
        self.commits[clock] = self.now.copy()

    def rollback(self, clock):
        self.commits = {known: rows for known, rows in self.commits.items() if known <= clock}
        self.now = self.commits[clock].copy()

    def drop(self, clock):
        base = max([known for known in self.commits if known <= clock], default=-1)
        self.commits = {known: rows for known, rows in self.commits.items() if known >= base}

    def reopen(self):
        self.now = self.commits[max(self.commits)].copy()


@contextmanager
def opened(path, write=True):
    """A journal beside the table file, which is created if need be."""
    table = TableFile.open(path, write=write) if path.exists() else TableFile.create(path, NUM_ROWS, FORM)
    reader = Reader(2)
    try:
        journal = Journal(table, reader)
        try:
            yield journal
        finally:
            journal.close()
    finally:
        reader.close()
        table.close()


def contents(journal):
    """All records [NUM_ROWS, stride] as of now."""
    rows, at = journal._table.read(0, NUM_ROWS), journal.locate(np.arange(NUM_ROWS))
    for row, offset in zip(rows, at, strict=True):
        if offset >= 0:
            row[:] = np.frombuffer(os.pread(journal.descriptor, FORM.stride, offset), np.uint8)
    return rows


def assert_same(journal, model):
    """Now, and at each commit, of which all but the first are given up."""
    assert list(journal.commits) == list(model.commits)
    np.testing.assert_array_equal(contents(journal), model.now)
    for clock in reversed(model.commits):
        journal.rollback(clock)
        np.testing.assert_array_equal(contents(journal), model.commits[clock])
    assert journal._table.verify() == []


def changes(seed, count=40):
    """Distinct ids, in no order, and records for them."""
    rng = np.random.default_rng(seed)
    return rng.permutation(NUM_ROWS)[:count], rng.integers(0, 256, (count, FORM.stride), np.uint8)


def filled(path, steps):
    """A journal on which the steps were taken, closed; and its model."""
    model = Model()
    with opened(path) as journal:
        for name, *arguments in steps:
            getattr(journal, name)(*arguments)
            getattr(model, name)(*arguments)
    model.reopen()
    return model


def journal_of(path):
    return path.with_name(f"{path.name}.journal")


COMMITS = [
    ("append", *changes(1)),
    ("commit", 10),
    ("append", *changes(2)),
    ("append", *changes(3, count=1)),
    ("commit", 20),
    ("append", *changes(4)),
    ("commit", 30),
]

# --- any order of operations -----------------------------------------------------------------------------------------

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 2**32), st.integers(0, NUM_ROWS)),
        st.tuples(st.just("commit"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["rollback", "drop"]), st.integers(0, 5)),
        st.tuples(st.just("reopen")),
    ),
    max_size=25,
)


@settings(max_examples=40)
@given(operations)
def test_behaves_like_a_dict_of_dicts(tmp_path_factory, operations):
    path, model = tmp_path_factory.mktemp("property") / "table", Model()
    with opened(path):
        pass
    while operations:
        with opened(path) as journal:
            np.testing.assert_array_equal(contents(journal), model.now)
            while operations:
                name, *numbers = operations.pop(0)
                if name == "reopen":
                    model.reopen()
                    break
                clocks = list(model.commits)
                match name:
                    case "append":
                        arguments = changes(*numbers)
                    case "commit":
                        arguments = (clocks[-1] + numbers[0],)
                    case _:
                        arguments = (clocks[numbers[0] % len(clocks)],)
                getattr(journal, name)(*arguments)
                getattr(model, name)(*arguments)
                np.testing.assert_array_equal(contents(journal), model.now)
            else:
                assert_same(journal, model)


def test_a_clock_between_two_commits_means_the_earlier_one(tmp_path):
    filled(tmp_path / "table", COMMITS)
    with opened(tmp_path / "table") as journal:
        journal.drop(5)
        assert list(journal.commits) == [0, 10, 20, 30]
        journal.drop(25)
        assert list(journal.commits) == [20, 30]
        assert journal._table.clock == 20
        journal.drop(99)
        assert list(journal.commits) == [30]
        assert journal.empty


def test_a_completed_drop_is_not_taken_for_an_interrupted_one(tmp_path):
    steps = [*COMMITS, ("append", *changes(5)), ("drop", 20), ("commit", 40)]  # its seal is before that commit
    model = filled(tmp_path / "table", steps)
    with opened(tmp_path / "table", write=False) as journal:
        assert_same(journal, model)


def test_newest_gives_ascending_ids_and_the_records_of_that_commit(tmp_path):
    model = filled(tmp_path / "table", COMMITS)
    with opened(tmp_path / "table") as journal:
        ids, offsets = journal.newest(20)
        assert ids.tolist() == sorted({*changes(1)[0], *changes(2)[0], *changes(3, count=1)[0]})
        records = np.empty((len(ids), FORM.stride), np.uint8)
        journal._reader.read(journal.descriptor, offsets, records)
        np.testing.assert_array_equal(records, model.commits[20][ids])


def test_a_journal_without_commits_vanishes(tmp_path):
    filled(tmp_path / "table", [*COMMITS, ("drop", 30)])
    assert not journal_of(tmp_path / "table").exists()
    with opened(tmp_path / "table") as journal:
        assert journal.clock == 30


def test_rolls_back_to_the_table_file_whatever_its_commits_are_called(tmp_path):
    with opened(tmp_path / "table") as journal:
        journal.append(*changes(1))
        journal.commit(0)
        journal.rollback(0)
        assert contents(journal).any()
        journal.rollback(None)
        assert not contents(journal).any()


def test_an_unknown_commit_is_named_with_those_that_there_are(tmp_path):
    filled(tmp_path / "table", COMMITS)
    with opened(tmp_path / "table") as journal:
        with pytest.raises(MismatchError, match=r"no commit 15, only 0, 10, 20, 30: .* would have been read"):
            journal.rollback(15)
        with pytest.raises(MismatchError, match="commit 20 after commit 30"):
            journal.commit(20)


def test_writes_that_are_cut_short_are_continued(tmp_path, monkeypatch):
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda descriptor, data, at: pwritev(descriptor, [b"".join(data)[:50]], at))
    model = filled(tmp_path / "table", [*COMMITS, ("drop", 10)])
    with opened(tmp_path / "table") as journal:
        assert_same(journal, model)


# --- reading only ----------------------------------------------------------------------------------------------------


def test_a_table_opened_for_reading_leaves_the_journal_alone(tmp_path):
    path = tmp_path / "table"
    model = filled(path, [*COMMITS, ("append", *changes(5))])
    before = journal_of(path).read_bytes()
    with opened(path, write=False) as one, opened(path, write=False) as other:
        for journal in (one, other):
            assert_same(journal, model)
    assert journal_of(path).read_bytes() == before


def test_a_table_opened_for_reading_needs_no_journal(tmp_path):
    with opened(tmp_path / "table"):
        pass
    with opened(tmp_path / "table", write=False) as journal:
        assert not contents(journal).any()
    assert not journal_of(tmp_path / "table").exists()


# --- kill -9 ---------------------------------------------------------------------------------------------------------

LIFE = [
    *COMMITS,
    ("drop", 10),
    ("append", *changes(5)),
    ("commit", 40),
    ("append", *changes(5)),
    ("rollback", 30),
    ("append", *changes(6)),
    ("drop", 20),  # with rows that no commit followed yet
    ("commit", 40),
    ("drop", 40),
    ("append", *changes(7)),
    ("commit", 40),  # the same clock once more
    ("append", *changes(8)),
]


class Killed(BaseException):
    """What a process that is killed does: nothing any more."""


@contextmanager
def mortal(kill, die):
    """Die before the `kill`-th operation on a file, or in the middle of it when it writes."""
    count, pwrite, pwritev = 0, os.pwrite, os.pwritev

    def counted(operation):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == kill and operation in (pwrite, pwritev):
                descriptor, data, at = arguments
                data = bytes(data) if operation is pwrite else b"".join(data)
                pwrite(descriptor, data[: len(data) // 2 // UNIT * UNIT], at)
            if count >= kill:
                die()
            return operation(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "pwrite", "pwritev", "ftruncate", "fsync", "rename", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def killed(function, kill):
    """Whether a function was killed. It dies by an exception after which no operation succeeds, as processes are slow."""

    def die():
        raise Killed

    try:
        with mortal(kill, die):
            function()
    except Killed:
        return True
    return False


def really_killed(function, kill):
    """The same with a process."""
    child = os.fork()
    if child == 0:
        try:
            with mortal(kill, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                function()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def live(path, diary):
    """Take all steps, noting each that is done."""
    with opened(path) as journal:
        for name, *arguments in LIFE:
            getattr(journal, name)(*arguments)
            with diary.open("a") as file:
                file.write(".")


def after(steps):
    """The model after that many steps, reopened."""
    model = Model()
    for name, *arguments in LIFE[:steps]:
        getattr(model, name)(*arguments)
    model.reopen()
    return model


def assert_survives(path, kill, killed):
    """Killed in its life and then in every recovery, each time an operation later. False when life was shorter."""
    path.parent.mkdir()
    diary = path.parent.with_suffix(".diary")
    diary.touch()
    with opened(path):
        pass

    def recover():
        with opened(path) as journal:
            journal.append(*changes(0))

    if not killed(lambda: live(path, diary), kill):
        return False
    again = 1
    while killed(recover, again):
        again += 1
    steps = len(diary.read_text())
    with opened(path) as journal:
        now = contents(journal)
        model = next(  # the step that was cut short is done or not
            model
            for model in map(after, (steps, steps + 1))
            if list(model.commits) == list(journal.commits) and np.array_equal(model.now, now)
        )
        assert_same(journal, model)
        journal.append(*changes(9))
        journal.commit(50)
    with opened(path, write=False) as journal:
        assert journal.clock == 50
        np.testing.assert_array_equal(contents(journal)[changes(9)[0]], changes(9)[1])
    return True


def test_killed_at_any_operation_and_at_any_of_its_recovery_it_is_at_its_last_commit(tmp_path):
    kill = 1
    while assert_survives(tmp_path / str(kill) / "table", kill, killed):
        kill += 1
    assert kill > 80


@pytest.mark.parametrize("kill", random.Random(0).choices(range(1, 80), k=KILLS))
def test_really_killed_it_is_at_its_last_commit(tmp_path, kill):
    assert assert_survives(tmp_path / "life" / "table", kill, really_killed)


class Disk:
    """What of a directory is on the disk: what was synced, and after a power cut any of the sectors written since."""

    def __init__(self, directory, seed):
        self.directory, self.rng = directory, random.Random(seed)
        self.names, self.files = None, {}  # name -> inode -> bytes

    def settle(self):
        self.names = self.listing()
        self.files = {inode: (self.directory / name).read_bytes() for name, inode in self.names.items()}

    def listing(self):
        return {path.name: path.stat().st_ino for path in self.directory.iterdir()}

    def killed(self, function, kill):
        """Whether the power was cut before the `kill`-th operation."""
        if self.names is None:
            self.settle()
        fsync, open = os.fsync, os.open

        def synced(descriptor):
            fsync(descriptor)
            state = os.fstat(descriptor)
            if stat.S_ISDIR(state.st_mode):
                self.names = self.listing()
            else:
                self.files[state.st_ino] = os.pread(descriptor, state.st_size, 0)

        def made(path, flags, *mode):
            descriptor = open(path, flags, *mode)
            if flags & os.O_TRUNC:
                self.files[os.fstat(descriptor).st_ino] = b""
            return descriptor

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", synced)
            patch.setattr(os, "open", made)
            if not killed(function, kill):
                return False
        self.cut()
        return True

    def cut(self):
        now = self.listing()
        written = {inode: (self.directory / name).read_bytes() for name, inode in now.items()}
        after = {}
        for name, inode in self.rng.choice([self.names, now]).items():
            synced = self.files[inode]
            after[name] = self.mixed(synced, written.get(inode, synced))
        for name in now:
            (self.directory / name).unlink()
        for name, data in after.items():
            (self.directory / name).write_bytes(data)
        self.settle()

    def mixed(self, synced, written):
        size = len(self.rng.choice([synced, written]))
        synced, written = synced.ljust(size, b"\0"), written.ljust(size, b"\0")
        sectors = (self.rng.choice([synced, written])[at : at + UNIT] for at in range(0, size, UNIT))
        return b"".join(sectors)[:size]


@pytest.mark.parametrize("seed", range(KILLS))
def test_after_a_power_cut_it_is_at_its_last_commit(tmp_path, seed):
    for kill in range(1 + seed, 90, 4):
        disk = Disk(tmp_path / str(kill), seed)
        assert_survives(disk.directory / "table", kill, disk.killed)


@pytest.mark.parametrize("kill", range(3, 10))
def test_after_a_power_cut_a_rollback_is_done_or_not(tmp_path, kill):
    for seed in range(10):
        path = tmp_path / str(seed) / "table"
        model = filled(path, COMMITS)

        def rollback(path=path):
            with opened(path) as journal:
                journal.append(*changes(5))
                journal.rollback(10)

        Disk(path.parent, seed).killed(rollback, kill)
        with opened(path) as journal:
            if 20 not in journal.commits:
                model.rollback(10)
            assert_same(journal, model)


def test_a_table_that_was_being_written_is_not_read_before_it_is_recovered(tmp_path):
    path = tmp_path / "table"
    model = filled(path, COMMITS)

    def drop():
        with opened(path) as journal:
            journal.drop(20)

    assert killed(drop, 12)
    with pytest.raises(CheckpointError, match="Open it for writing once"), opened(path, write=False):
        pass
    model.drop(20)
    with opened(path) as journal:
        assert_same(journal, model)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path):
    path = tmp_path / "table"
    model = filled(path, COMMITS)
    whole = journal_of(path).read_bytes()
    found, harmless = [], 0
    for at in random.Random(0).sample(range(len(whole)), 500):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        journal_of(path).write_bytes(damaged)
        try:
            with opened(path, write=False) as journal:
                assert_same(journal, model)
            harmless += 1
        except DataError as error:
            found.append(str(error))
    assert all(re.search(r"table.journal: .*(segment \d, at byte|head is damaged)", error) for error in found)
    assert 0 < harmless < 7 * UNIT  # one copy of a mark


def test_a_lost_sector_is_found(tmp_path):
    path = tmp_path / "table"
    filled(path, COMMITS)
    whole = journal_of(path).read_bytes()
    for at in range(HEAD.size, len(whole) - UNIT, UNIT):
        journal_of(path).write_bytes(whole[:at] + bytes(UNIT) + whole[at + UNIT :])
        with pytest.raises(DataError, match="is damaged"), opened(path, write=False):
            pass


@pytest.mark.parametrize("fill", [0, 1], ids=["cut", "zeros"])
def test_a_torn_tail_is_dropped(tmp_path, fill):
    path = tmp_path / "table"
    model = filled(path, COMMITS)
    whole = journal_of(path).read_bytes()
    with opened(path, write=False) as journal:
        commits = dict(journal.commits)
    for at in range(HEAD.size, len(whole), UNIT if fill else 7):
        journal_of(path).write_bytes(whole[:at] + bytes(fill * (len(whole) - at)))
        with opened(path) as journal:
            assert list(journal.commits) == [clock for clock, end in commits.items() if end <= at]
            np.testing.assert_array_equal(contents(journal), model.commits[journal.clock])
    for at in range(HEAD.size):
        journal_of(path).write_bytes(whole[:at])
        with pytest.raises(DataError, match="no journal, or its head is damaged"), opened(path):
            pass


def test_another_tables_journal_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        filled(path, COMMITS)
    journal_of(one).write_bytes(journal_of(other).read_bytes())
    with pytest.raises(MismatchError, match="belongs to another table file"), opened(one):
        pass


def test_a_table_file_of_another_time_is_refused(tmp_path):
    path = tmp_path / "table"
    filled(path, COMMITS)
    early = path.read_bytes()
    with opened(path) as journal:
        journal.drop(10)
    path.write_bytes(early)
    with pytest.raises(MismatchError, match=r"of clock 10, but .* of clock 0"), opened(path):
        pass


def test_a_journal_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "PORTION", 1 << 18)
    path, form = tmp_path / "table", RowFormat(dim=1024)
    TableFile.create(path, 4096, form).close()
    ids, records = np.arange(4096), np.zeros((4096, form.stride), np.uint8)
    with opened(path) as journal:
        journal.append(ids, records)  # 16 MiB
        journal.commit(1)
    tracemalloc.start()
    try:
        with opened(path) as journal:
            peak = tracemalloc.get_traced_memory()[1]
            assert len(journal.newest(1)[0]) == 4096
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


# --- a disk that is full or fails ------------------------------------------------------------------------------------


def failing(operation, code, after=0):
    """The operation, which fails from the call number `after` on; a write of several parts does half of its work first."""
    calls, pwritev = 0, os.pwritev

    def call(descriptor, *arguments):
        nonlocal calls
        calls += 1
        if calls <= after:
            return operation(descriptor, *arguments)
        if operation is pwritev and calls == after + 1 and len(arguments[0]) > 1:
            return operation(descriptor, arguments[0][:-1], arguments[1])
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("step", [("append", *changes(5)), ("commit", 40), ("drop", 20)], ids=lambda step: step[0])
def test_a_full_disk_leaves_the_last_commit_and_a_journal_that_goes_on(tmp_path, monkeypatch, step):
    path = tmp_path / "table"
    model = filled(path, COMMITS)
    with opened(path) as journal:
        journal.append(*changes(6))
        before, size = contents(journal), journal_of(path).stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", failing(os.pwritev, errno.ENOSPC))
            with pytest.raises(CheckpointError, match=r"No space left.*last commit, 30, is intact"):
                getattr(journal, step[0])(*step[1:])
        assert journal_of(path).stat().st_size == size
        np.testing.assert_array_equal(contents(journal), before)
        model.append(*changes(6))
        getattr(journal, step[0])(*step[1:])
        getattr(model, step[0])(*step[1:])
        assert_same(journal, model)


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_disk_that_is_full_while_applying_loses_nothing(tmp_path, monkeypatch, after):
    path = tmp_path / "table"
    model = filled(path, COMMITS)
    with opened(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing(os.pwrite, errno.ENOSPC, after))
            with pytest.raises(CheckpointError, match=r"cannot be applied up to commit 20 .*No space left"):
                journal.drop(20)
        np.testing.assert_array_equal(contents(journal), model.now)
        for each in (journal, model):
            each.append(*changes(5))
            each.commit(40)
    model.drop(20)
    with opened(path) as journal:  # completes it
        assert_same(journal, model)


def test_what_is_being_applied_is_completed_before_a_rollback(tmp_path, monkeypatch):
    path = tmp_path / "table"
    model = filled(path, COMMITS)
    with opened(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing(os.pwrite, errno.ENOSPC, after=2))
            with pytest.raises(CheckpointError):
                journal.drop(20)
        with pytest.raises(MismatchError, match="no commit 10, only 20, 30"):
            journal.rollback(10)
        model.drop(20)
        assert_same(journal, model)


def test_nothing_is_committed_after_a_failed_fsync(tmp_path, monkeypatch):
    path = tmp_path / "table"
    model = filled(path, COMMITS)
    with opened(path) as journal:
        journal.append(*changes(5))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync, errno.EIO))
            with pytest.raises(CheckpointError, match="cannot keep commit 40"):
                journal.commit(40)
        with pytest.raises(CheckpointError, match="an fsync failed before"):
            journal.commit(40)
    with opened(path) as journal:
        assert_same(journal, model)


def test_a_journal_that_cannot_be_opened_says_so(tmp_path):
    path = tmp_path / "table"
    filled(path, COMMITS)
    journal_of(path).unlink()
    journal_of(path).mkdir()
    with pytest.raises(CheckpointError, match="cannot be opened"), opened(path):
        pass
