"""The table file: any reader opens it, no single flipped bit passes, holes stay holes, and whoever must not write cannot."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError
from engram_lm.hashing import splitmix64
from engram_lm.kernels import compiled
from engram_lm.tables.file import PAGE, Damage, TableFile, block_checksums, weighted_sums
from engram_lm.tables.rows import RowFormat

FORM = RowFormat(3, "bf16", std=0.5, seed=7)  # records of 12 bytes
ROWS = 300  # four blocks of 64 and one of 44


def records(rows=ROWS, form=FORM, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, form.stride), np.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.safetensors"


@pytest.fixture
def full(path):
    """A table file in which every row was written, closed."""
    with TableFile.create(path, ROWS, FORM, digest="d1", facts={"made by": "a test"}) as file:
        file.write(0, records())
        file.clock = 12
    return path


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


# --- what the file is -----------------------------------------------------------------------------------------------


def test_any_safetensors_reader_opens_it(full):
    arrays = load_file(full)
    assert list(arrays) == ["clock", "checksums", "rows"] or set(arrays) == {"clock", "checksums", "rows"}
    assert np.array_equal(arrays["rows"], records())
    assert arrays["clock"][0] == 12
    with safe_open(full, "pt") as file:
        assert torch.equal(file.get_slice("rows")[70:80], torch.from_numpy(records()[70:80]))
        assert file.metadata() | {"name": "", "header_crc32": ""} == {
            "format": "engram-table/1",
            "num_rows": "300",
            "dim": "3",
            "encoding": "bf16",
            "row_bytes": "8",
            "trainable": "true",
            "std": "0.5",
            "seed": "7",
            "block_rows": "64",
            "digest": "d1",
            "name": "",
            "header_crc32": "",
            "made by": "a test",
        }


def test_data_begin_on_pages(full):
    with TableFile.open(full) as file:
        assert file.rows_offset % PAGE == 0
        assert full.read_bytes()[file.rows_offset :] == records().tobytes()
        assert int.from_bytes(full.read_bytes()[:8], "little") % PAGE == PAGE - 8
        assert file.offsets(np.array([0, 299])).tolist() == [file.rows_offset, file.rows_offset + 299 * FORM.stride]


def test_what_was_said_at_creation_is_read_back(path):
    form = RowFormat(5, "int8", trainable=False)
    awkward = {"quotes": '"header_crc32":"00000000', "others": "é\n\\"}
    TableFile.create(path, 7, form, digest="abc", facts=awkward).close()
    with TableFile.open(path, digest="abc") as file:
        assert (file.num_rows, file.form, file.digest, file.facts, file.clock) == (7, form, "abc", awkward, 0)
        assert (file.num_blocks, file.block_rows) == (1, 64)
        assert not file.read(0, 7).any()


def test_a_large_table_takes_no_space_until_rows_are_written(path):
    with TableFile.create(path, 100_000_000, RowFormat(64)) as file:
        assert path.stat().st_size > 26e9
        assert path.stat().st_blocks * 512 <= 1 << 16
        assert file.verify() == []
        ids = np.arange(5, 100_000_000, 9_999_999)
        file.write_scattered(ids, records(len(ids), file.form))
        assert path.stat().st_blocks * 512 < 1 << 25  # the checksums, at most
        written = np.concatenate([*file.written()])
        assert np.isin(ids // 64, written).all()
        assert len(written) < 100  # pages do not end where blocks do
        assert file.verify() == []
        assert np.array_equal(file.read(int(ids[3]), int(ids[3]) + 1)[0], records(len(ids), file.form)[3])


def test_holes_stay_holes_under_zeros(path):
    rows = np.zeros((20_000, FORM.stride), np.uint8)
    rows[9_000] = 1
    with TableFile.create(path, len(rows), FORM) as file:
        file.write(0, rows)
        assert path.stat().st_blocks * 512 < 1 << 15
        rows[9_000] = 0
        file.write(0, rows)  # where there is no hole, zeros are written
        assert not file.read(0, len(rows)).any()
        assert file.verify() == []


@given(st.data())
@settings(max_examples=30)
def test_reads_what_was_written_last(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("file") / "table"
    num_rows = data.draw(st.integers(1, 400))
    expected = np.zeros((num_rows, FORM.stride), np.uint8)
    with TableFile.create(path, num_rows, FORM) as file:
        file.piece = 2  # blocks, so that there are several pieces
        for seed in range(data.draw(st.integers(1, 5))):
            first, last = sorted(data.draw(st.tuples(st.integers(0, num_rows), st.integers(0, num_rows))))
            new = records(num_rows, seed=seed) * data.draw(st.sampled_from([0, 1]))
            if data.draw(st.booleans()):
                file.write(first, new[first:last])
                expected[first:last] = new[first:last]
            else:
                ids = np.array(sorted(data.draw(st.sets(st.integers(0, num_rows - 1), max_size=40))), np.int64)
                file.write_scattered(ids, new[ids])
                expected[ids] = new[ids]
    with TableFile.open(path) as file:
        assert np.array_equal(file.read(0, num_rows), expected)
        assert np.array_equal(file.read(first, last), expected[first:last])
        assert file.verify() == []


def test_system_calls_may_do_less_than_they_were_asked(full, monkeypatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: read(fd, [views[0][:100]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: write(fd, view[:100], offset))
    with TableFile.open(full, write=True) as file:
        file.write(10, records(250, seed=1))
        assert np.array_equal(
            file.read(9, 261), np.concatenate([records()[9:10], records(250, seed=1), records()[260:261]])
        )
        assert file.verify() == []


def test_rows_outside_are_refused(full):
    with TableFile.open(full, write=True) as file:
        for first, count in ((-1, 2), (299, 2), (400, 1)):
            with pytest.raises(IndexError, match="has rows 0 to 299"):
                file.write(first, records(count))
            with pytest.raises(IndexError, match="has rows 0 to 299"):
                file.read(first, first + count)
        with pytest.raises(IndexError, match="not 4 to 300"):
            file.write_scattered(np.array([4, 300]), records(2))
    assert full.stat().st_size == TableFile.open(full).offsets(np.array([ROWS]))[0]


# --- checksums ------------------------------------------------------------------------------------------------------


def by_hand(block, number):
    words = np.frombuffer(block.tobytes(), "<u4").tolist()
    total = sum(word * (2 * splitmix64(j) + 1) for j, word in enumerate(words))
    return total * (2 * splitmix64(number) + 1) % 2**64


@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 99))
@settings(max_examples=40)
def test_checksums_are_those_of_the_specification(count, rows, words, first, seed):
    blocks = np.random.default_rng(seed).integers(0, 256, (count, rows, 4 * words), np.uint8)
    numbers = np.arange(first, first + count)
    expected = [by_hand(block, number) for block, number in zip(blocks, numbers.tolist(), strict=True)]
    assert block_checksums(blocks, numbers).tolist() == expected


@pytest.mark.skipif(not compiled(), reason="needs Numba")
@given(st.integers(0, 40), st.integers(0, 70), st.integers(0, 99))
@settings(max_examples=40)
def test_the_kernel_equals_the_truth(count, words, seed):
    from engram_lm.kernels import checksum

    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 2**32, (count, words), np.uint32)
    factors = rng.integers(0, 2**64, words, np.uint64)
    assert np.array_equal(checksum.weighted_sums(blocks, factors), weighted_sums(blocks, factors))


def test_checksums_know_places():
    blocks = records(4).reshape(2, 2, -1)
    sums = block_checksums(blocks, np.arange(2))
    assert not set(block_checksums(blocks[::-1], np.arange(2)).tolist()) & set(sums.tolist())  # blocks changed places
    assert not set(block_checksums(blocks[:, ::-1], np.arange(2)).tolist()) & set(sums.tolist())  # rows did
    assert block_checksums(blocks * 0, np.arange(2)).tolist() == [0, 0]


def test_the_example_of_the_specification(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/format.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    data = Path("table.safetensors").read_bytes()
    dump = re.findall(r"^ *(\d+)  ((?:[0-9a-f]{2} )+)(\.\.\.)?", page, re.MULTILINE)
    assert len(dump) == 8
    for offset, shown, _ in dump:
        assert data[int(offset) :].startswith(bytes.fromhex(shown))


# --- damage ---------------------------------------------------------------------------------------------------------


def found(path):
    """What opening and verifying say: damaged blocks, or why the file is refused."""
    try:
        with TableFile.open(path) as file:
            return file.verify()
    except (DataError, MismatchError) as error:
        return str(error)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "table"
    with TableFile.create(path, ROWS, FORM, digest="d1", facts={"a": "b"}) as file:
        file.write(0, records()[:200])  # the last block stays a hole
        file.clock = 2**40
        return path, file.rows_offset


@given(st.data())
@settings(max_examples=250)
def test_every_flipped_bit_is_found(sample, data):
    path, rows = sample
    size = path.stat().st_size
    parts = {"length": (0, 8), "header": (8, 900), "padding": (900, PAGE), "clock": (PAGE, PAGE + 24)}
    parts |= {"after the clock": (PAGE + 24, 2 * PAGE), "checksums": (2 * PAGE, 2 * PAGE + 40)}
    parts |= {"after the checksums": (2 * PAGE + 40, rows), "rows": (rows, size)}
    begin, end = parts[data.draw(st.sampled_from(sorted(parts)))]
    bit = data.draw(st.integers(8 * begin, 8 * end - 1))
    flip(path, bit)
    try:
        fault = found(path)
    finally:
        flip(path, bit)
    assert fault
    byte = bit // 8
    if byte >= rows:
        block = (byte - rows) // (64 * FORM.stride)
        assert fault == [Damage(block, 64 * block, min(64 * block + 64, ROWS))]
    elif byte >= 2 * PAGE:
        assert [damage.block for damage in fault] == [(byte - 2 * PAGE) // 8]
    else:
        assert isinstance(fault, str)
    assert found(path) == []


def test_damage_says_which_rows():
    assert str(Damage(17, 1088, 1152)) == "block 17 (rows 1,088 to 1,151)"
    assert str(Damage(19, 1100, 1100)) == "block 19 (no rows: the end of the checksums)"


def test_verify_reports_progress(full):
    calls = []
    with TableFile.open(full) as file:
        file.piece = 2
        file.verify(lambda done, total: calls.append((done, total)))
    assert calls == [(2, 512), (4, 512), (5, 512), (512, 512)]


def test_a_damaged_block_is_not_written_into(full):
    with TableFile.open(full, write=True) as file:
        flip(full, 8 * int(file.offsets(np.array([70]))[0]))
        damaged = r"block 1 \(rows 64 to 127\) does not match its checksum"
        with pytest.raises(DataError, match=damaged):
            file.write_scattered(np.array([3, 71]), records(2))
        with pytest.raises(DataError, match=damaged):
            file.write(71, records(1))
        with pytest.raises(DataError, match=damaged):
            file.blocks(np.array([0, 1, 4]))
        assert file.verify() == [Damage(1, 64, 128)]
        file.write(64, records(64))  # but it may be replaced as a whole
        assert file.verify() == []


def test_a_write_that_was_cut_short_is_done_again(full, monkeypatch):
    ids, new = np.array([3, 70, 299]), records(3, seed=1)
    write, calls = os.pwrite, []

    def stop(descriptor, view, offset):
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.append(offset)
        return write(descriptor, view, offset)

    with TableFile.open(full, write=True) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", stop)
            with pytest.raises(CheckpointError, match=r"3 rows from 3 to 299 cannot be written \(No space left"):
                file.write_scattered(ids, new)
        assert [damage.block for damage in file.verify()] == [0, 1]
        file.write_scattered(ids, new, torn=True)
        assert file.verify() == []
        assert np.array_equal(file.read(0, ROWS)[ids], new)


def test_a_full_disk_leaves_all_other_rows(full, monkeypatch):
    def fail(descriptor, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with TableFile.open(full, write=True) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(
                CheckpointError, match=r"rows 10 to 12 cannot be written .* All else in the file is intact"
            ):
                file.write(10, records(3))
        assert file.verify() == []


# --- refusals -------------------------------------------------------------------------------------------------------


def test_truncated_and_longer_files_are_refused(full):
    size = full.stat().st_size
    os.truncate(full, size - 1)
    with pytest.raises(DataError, match=f"truncated: {size:,} bytes expected, {size - 1:,} found"):
        TableFile.open(full)
    os.truncate(full, size + 5)
    with pytest.raises(DataError, match=f"longer than it says: {size:,} bytes expected, {size + 5:,} found"):
        TableFile.open(full)
    os.truncate(full, 100)
    with pytest.raises(DataError, match=f"truncated inside its header: {PAGE:,} bytes expected, 100 found"):
        TableFile.open(full)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 and so on", "not a safetensors file"),
        (b"\x02" + bytes(7) + b"{}", "its header was altered or damaged"),
        (b"\x05" + bytes(7) + b'{"a"}', "its header was altered or damaged"),
    ],
)
def test_foreign_files_are_refused(path, content, reason):
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        TableFile.open(path)


def test_other_safetensors_files_are_refused(path):
    save_file({"rows": records()}, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"not an engram table.*engram-lm table convert"):
        TableFile.open(path)


def rewrite_header(path, old, new):
    """Replace text of the same length and seal the header again, as another program might."""
    from engram_lm.tables import file

    data = path.read_bytes()
    assert data.count(old) == 1
    text = data[8:PAGE].replace(old, new)
    path.write_bytes(data[:8] + file._sealed(text) + data[PAGE:])


def test_other_versions_are_refused(full):
    rewrite_header(full, b"engram-table/1", b"engram-table/2")
    with pytest.raises(
        MismatchError, match=r"has format engram-table/2, this version of engram-lm reads engram-table/1"
    ):
        TableFile.open(full)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dim":"3"', b'"dim":"9"'),  # row_bytes follows from it
        (b'"dim":"3"', b'"dim":"x"'),
        (b'"bf16"', b'"bf61"'),
        (b'"num_rows":"300"', b'"num_rows":"299"'),
        (b'"block_rows":"64"', b'"block_rows":"00"'),
        (b'"std"', b'"sdt"'),
        (b'"trainable":"true"', b'"trainable":"yes!"'),
    ],
)
def test_impossible_metadata_are_refused(full, old, new):
    rewrite_header(full, old, new)
    with pytest.raises(DataError, match="its metadata describe no table"):
        TableFile.open(full)


def test_a_table_of_another_plan_is_refused(full, path):
    TableFile.open(full, digest="d1").close()
    with pytest.raises(
        MismatchError, match=r"vocabulary d1, opened for d2: every row would be read from the wrong place"
    ):
        TableFile.open(full, digest="d2")


def test_an_unbound_table_is_refused_where_a_plan_is_expected(path):
    TableFile.create(path, 5, FORM).close()
    with pytest.raises(MismatchError, match=r"vocabulary \(none\), opened for d1"):
        TableFile.open(path, digest="d1")


def test_missing_and_unreadable_files_are_refused(path, monkeypatch):
    with pytest.raises(DataError, match="there is no such table file"):
        TableFile.open(path)
    with pytest.raises(CheckpointError, match=r"cannot be opened for writing \(Is a directory\)"):
        TableFile.open(path.parent, write=True)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        TableFile.open(path.parent)

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(CheckpointError, match=r"cannot be opened for writing \(Read-only file system\)"):
        TableFile.open(path, write=True)
    with pytest.raises(CheckpointError, match=r"no table can be created there \(Read-only file system\)"):
        TableFile.create(path, 5, FORM)


def test_a_file_opened_for_reading_is_not_written(full):
    with TableFile.open(full) as file:
        for write in (lambda: file.write(0, records(1)), lambda: file.write_scattered(np.array([0]), records(1))):
            with pytest.raises(CheckpointError, match="for the file was opened for reading"):
                write()
        with pytest.raises(CheckpointError, match="the clock cannot be written"):
            file.clock = 13
        assert file.clock == 12


@pytest.mark.parametrize("left", [0, 100], ids=["in holes", "in rows"])
def test_a_file_that_is_cut_while_in_use(full, left):
    with TableFile.open(full) as file:
        os.truncate(full, file.rows_offset + left)
        for read in (lambda: file.read(0, 100), lambda: file.blocks(np.arange(2)), file.verify):
            with pytest.raises(DataError, match="it was cut while in use"):
                read()


# --- one writer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False], ids=["written", "read"])
def test_a_writer_is_alone(full, held):
    with TableFile.open(full, write=held):
        for write in (True, False):
            if held or write:
                holder = f"process {os.getpid()}" if Path("/proc/locks").exists() else "another process"
                with pytest.raises(CheckpointError, match=f"in use by {holder}"):
                    TableFile.open(full, write=write)
            else:
                TableFile.open(full).close()
    TableFile.open(full, write=True).close()


# --- creation -------------------------------------------------------------------------------------------------------


def test_a_table_is_never_overwritten(full):
    before = full.read_bytes()
    with pytest.raises(CheckpointError, match="exists, and a table is never overwritten"):
        TableFile.create(full, 5, FORM)
    assert full.read_bytes() == before
    assert list(full.parent.iterdir()) == [full]


def test_a_draft_vanishes_unless_it_is_published(path):
    with TableFile.draft(path, 5, FORM) as file:
        file.write(0, records(5))
        with pytest.raises(CheckpointError, match=r"partial: in use by"):
            TableFile.draft(path, 5, FORM)
    assert list(path.parent.iterdir()) == []
    with TableFile.draft(path, 5, FORM) as file:
        file.publish()
        file.write(0, records(5))
    assert list(path.parent.iterdir()) == [path]
    assert np.array_equal(TableFile.open(path).read(0, 5), records(5))


def test_what_a_killed_process_left_is_no_hindrance(path):
    path.with_name("table.safetensors.partial").write_bytes(b"\xff" * 100_000)
    with TableFile.create(path, 300, FORM) as file:
        assert file.verify() == []
        assert not file.read(0, 300).any()
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_without_room_for_the_header(path, monkeypatch):
    def fail(descriptor, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(
        CheckpointError, match=r"the table cannot be created \(No space left on device\); nothing is left"
    ):
        TableFile.create(path, 5, FORM)
    assert list(path.parent.iterdir()) == []


def test_impossible_tables_are_refused(path):
    with pytest.raises(ConfigError, match="at least one row"):
        TableFile.create(path, 0, FORM)
    with pytest.raises(ConfigError, match="cannot be called digest, dim: the file itself says that"):
        TableFile.create(path, 5, FORM, facts={"dim": "9", "digest": "x", "fine": "y"})
    assert list(path.parent.iterdir()) == []


def test_tables_that_can_be_trained_tell_themselves_apart(tmp_path):
    def identities(form):
        paths = [tmp_path / f"{form.trainable}{number}" for number in range(2)]
        files = [TableFile.create(path, 5, form) for path in paths]
        made = [file.identity for file in files]
        for file in files:
            file.clock = 3
            file.close()
        assert [TableFile.open(path).identity for path in paths] == made
        return made

    assert len(set(identities(FORM))) == 2
    assert len(set(identities(RowFormat(3, trainable=False)))) == 1  # the same rows give the same bytes
