"""Many small reads: what comes back is the file's bytes, on every path, and what cannot be read is said."""

import errno
import os
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram_lm.errors import DataError
from engram_lm.kernels import compiled, reads
from engram_lm.kernels.reads import Reader

LENGTH = 20_011
BYTES = np.random.default_rng(0).integers(0, 256, LENGTH, np.uint8)


@pytest.fixture(params=["compiled", "plain", "threads"])
def reader(request, monkeypatch):
    """A Reader on each of its paths."""
    if request.param == "compiled" and not compiled():
        pytest.skip("no Numba")
    if request.param == "plain":
        monkeypatch.setattr(reads, "compiled", lambda: False)
    if request.param == "threads":
        monkeypatch.delattr(os, "posix_fadvise")
    reader = Reader(depth=7)
    yield reader
    reader.close()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows"
    BYTES.tofile(path)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def expected(offsets, size):
    return BYTES[np.asarray(offsets, np.int64)[:, None] + np.arange(size)]


def read(reader, descriptor, offsets, size):
    out = np.full((len(offsets), size), 255, np.uint8)
    reader.read(descriptor, np.asarray(offsets, np.int64), out)
    return out


def both(size):
    return st.tuples(st.just(size), st.lists(st.integers(0, LENGTH - size), max_size=40))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 700).flatmap(both))
def test_the_files_bytes(reader, file, case):
    """Any size, order, overlap and repetition; with a depth of 7, several bursts and broken ones."""
    size, offsets = case
    assert np.array_equal(read(reader, file, offsets, size), expected(offsets, size))


@pytest.mark.parametrize("count", [1, 128, 129, 256, 257, 3000])
def test_default_depth(reader, file, count):
    reader = reader if reader._threads else Reader()
    offsets = np.random.default_rng(count).integers(0, LENGTH - 264, count)
    assert np.array_equal(read(reader, file, offsets, 264), expected(offsets, 264))


def test_strided_offsets(reader, file):
    """A column of a table of offsets is as good as an array of its own."""
    table = np.arange(60).reshape(20, 3) * 100
    out = np.empty((20, 33), np.uint8)
    reader.read(file, table[:, 1], out)
    assert np.array_equal(out, expected(table[:, 1], 33))


@pytest.mark.parametrize("offset", [LENGTH - 263, LENGTH, LENGTH + 5000, 2**62])
def test_beyond_the_end(reader, file, offset):
    with pytest.raises(DataError, match=f"ends at byte 20,011.* 264 bytes starts at byte {offset:,}"):
        read(reader, file, [0, 264, offset, 528], 264)


def test_shrunk_file(reader, file):
    offsets = [0, 10_000, 19_000]
    assert np.array_equal(read(reader, file, offsets, 100), expected(offsets, 100))
    os.ftruncate(file, 10_050)
    with pytest.raises(DataError, match=r"ends at byte 10,050.* starts at byte 10,000"):
        read(reader, file, offsets, 100)


def test_system_errors(reader, file, tmp_path):
    with pytest.raises(OSError, match="byte -1") as negative:
        read(reader, file, [0, -1], 8)
    assert negative.value.errno == errno.EINVAL
    closed = os.dup(file)
    os.close(closed)
    with pytest.raises(OSError) as bad:
        read(reader, closed, [0], 8)
    assert bad.value.errno == errno.EBADF
    directory = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        read(reader, directory, [0], 8)
    os.close(directory)


def test_nothing_to_read(reader):
    """Not even the descriptor is looked at."""
    assert read(reader, -1, [], 264).shape == (0, 264)
    assert read(reader, -1, [3, 4], 0).shape == (2, 0)


def test_misfit(reader, file):
    """Memory is written through a bare pointer: what does not fit is refused first."""
    offsets = np.zeros(4, np.int64)
    frozen = np.empty((4, 8), np.uint8)
    frozen.flags.writeable = False
    for out in (
        np.empty((3, 8), np.uint8),
        np.empty((4, 8), np.int8),
        np.empty((4, 16), np.uint8)[:, ::2],
        np.empty((4, 16), np.uint8)[:, :8],
        np.empty((8, 4), np.uint8).T,
        np.empty(4, np.uint8),
        frozen,
    ):
        with pytest.raises(ValueError, match="elsewhere in memory"):
            reader.read(file, offsets, out)


def test_two_threads_at_once(reader, file):
    """Neither gets the other's rows."""
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            offsets = rng.integers(0, LENGTH - 100, 100)
            if not np.array_equal(read(reader, file, offsets, 100), expected(offsets, 100)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_file_as_it_is_now(reader, file):
    """Rows that were written since an earlier read are seen: a journal is read while it grows."""
    read(reader, file, [100], 8)
    os.pwrite(file, b"changed!", 100)
    assert read(reader, file, [100], 8).tobytes() == b"changed!"


def test_a_broken_off_read_is_finished(file, monkeypatch):
    """A signal or a network file system may hand out a record in pieces."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 3), offset))
    row = np.empty(100, np.uint8)
    reads.read_row(file, 50, row)
    assert np.array_equal(row, BYTES[50:150])


@pytest.mark.skipif(not compiled(), reason="no Numba")
def test_compiled_reading_goes_on_after_it(file, monkeypatch):
    """The rows that `pread` did not fill are finished one by one, and no other."""
    finished = []
    monkeypatch.setattr(reads, "read_row", lambda descriptor, offset, row: finished.append(offset))
    offsets = [5, LENGTH - 7, 50, 60, LENGTH, 500, LENGTH - 1]
    out = read(Reader(depth=2), file, offsets, 8)
    assert finished == [LENGTH - 7, LENGTH, LENGTH - 1]
    assert np.array_equal(out[[0, 2, 3, 5]], expected([5, 50, 60, 500], 8))


def test_close_leaves_nothing(reader, file):
    read(reader, file, range(50), 8)
    descriptors, before = len(os.listdir("/dev/fd")), threading.active_count()
    started = len(reader._threads._threads) if reader._threads else 0
    reader.close()
    reader.close()
    assert threading.active_count() == before - started
    assert len(os.listdir("/dev/fd")) == descriptors


def test_each_record_is_advised_once_and_in_time(monkeypatch):
    """One burst ahead at least and two at most."""
    advised, distances = [], []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, offset, size, advice: advised.append(offset))
    monkeypatch.setattr(reads, "read_row", lambda descriptor, offset, row: distances.append(len(advised) - offset))
    reads.read_rows(0, np.arange(50), np.empty((50, 8), np.uint8), burst=8)
    assert advised == list(range(50))
    assert all(8 < distance <= 16 for distance in distances[:40])


@pytest.mark.skipif(not compiled(), reason="no Numba")
def test_no_gil(file):
    """The training step's thread goes on while rows are read.

    With an endless switch interval the other thread gives the GIL up only of itself. So when this one runs again after
    `entered`, the read is under way: had it held the GIL, the last row would be there by now. Three tries, should this
    thread have slept through one.
    """
    reader, offsets = Reader(), np.zeros(50_000, np.int64)
    entered = []

    def work():
        entered.append(True)
        reader.read(file, offsets, out)

    def seen_unfinished():
        entered.clear()
        thread = threading.Thread(target=work)
        thread.start()
        while not entered:
            time.sleep(0)
        unfinished = out[-1, 0] != BYTES[0]
        thread.join()
        return unfinished

    interval = sys.getswitchinterval()
    out = np.empty((len(offsets), 1), np.uint8)
    reader.read(file, offsets, out)  # compiles
    sys.setswitchinterval(1000)
    try:
        tries = []
        for _ in range(3):
            out[:] = BYTES[0] + 1
            tries.append(seen_unfinished())
    finally:
        sys.setswitchinterval(interval)
    assert any(tries)
    assert (out == BYTES[0]).all()
