"""A table in a file: plain safetensors, sparse until rows are written, every byte checked. docs/format.md specifies it.

    length       8 bytes
    header       JSON: metadata, and where the tensors lie; spaces fill the page
    clock        int64 [512]: updates that the rows hold, and its checksum; zeros
    checksums    uint8: 8 bytes for each block of rows; zeros fill the page
    rows         uint8 [num_rows, stride]: the records of rows.py

All zeros have the checksum zero: a file as created, which takes one page of disk space, is valid.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, ConfigError, DataError, MismatchError
from ..kernels import compiled
from .rows import RowFormat

FORMAT = "engram-table/1"
PAGE = 4096
PIECE = 4 << 20  # bytes of rows that are read or written at a time
SEAL = b'"header_crc32":"'  # eight hexadecimal digits follow
GAMMA = 0x9E3779B97F4A7C15  # odd: of splitmix64, and of the clock's checksum
HEADER_LIMIT = 100_000_000  # bytes, safetensors' own


class Damage(NamedTuple):
    """A block whose rows and checksum do not belong together.

    Entries behind the last block's checksum count as blocks without rows.
    """

    block: int
    first_row: int
    last_row: int  # exclusive

    def __str__(self) -> str:
        rows = f"rows {self.first_row:,} to {self.last_row - 1:,}"
        return (
            f"block {self.block:,} ({rows if self.last_row > self.first_row else 'no rows: the end of the checksums'})"
        )


# --- header ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a table file says about itself; all that its layout follows from.

    name: random, so that the journal of one table is never taken for another's; "" when rows cannot be trained.
    """

    num_rows: int
    form: RowFormat
    digest: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    name: str = ""
    block_rows: int = 64

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.block_rows < 1:
            raise ConfigError(f"a table needs at least one row, got {self.num_rows} in blocks of {self.block_rows}.")

    @property
    def num_blocks(self) -> int:
        """Blocks of rows; the last one may be shorter."""
        return -(-self.num_rows // self.block_rows)

    @property
    def checksum_bytes(self) -> int:
        """Bytes of all checksums, in whole pages."""
        return -(-8 * self.num_blocks // PAGE) * PAGE

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """The tensors as safetensors describes them."""
        rows = PAGE + self.checksum_bytes
        shape = [self.num_rows, self.form.stride]
        return {
            "clock": {"dtype": "I64", "shape": [PAGE // 8], "data_offsets": [0, PAGE]},
            "checksums": {"dtype": "U8", "shape": [self.checksum_bytes], "data_offsets": [PAGE, rows]},
            "rows": {"dtype": "U8", "shape": shape, "data_offsets": [rows, rows + math.prod(shape)]},
        }

    def to_bytes(self) -> bytes:
        """The beginning of the file, up to the checksums. Raises ConfigError for facts with the name of something else."""
        form = self.form
        metadata = {
            "format": FORMAT,
            "num_rows": str(self.num_rows),
            "dim": str(form.dim),
            "encoding": form.encoding,
            "row_bytes": str(form.row_bytes),
            "trainable": str(form.trainable).lower(),
            "std": repr(float(form.std)),
            "seed": str(form.seed),
            "block_rows": str(self.block_rows),
            **({"first": str(form.first)} if form.first else {}),
            "digest": self.digest,
            "name": self.name,
            "header_crc32": "00000000",
        }
        if taken := sorted((metadata.keys() | {"first"}) & self.facts.keys()):
            raise ConfigError(f"a table's facts cannot be called {', '.join(taken)}: the file itself says that.")
        text = json.dumps({"__metadata__": metadata | self.facts, **self.tensors}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + _sealed(text)

    @staticmethod
    def from_metadata(metadata: dict[str, str]) -> Header:
        """The inverse. Raises KeyError, ValueError or ConfigError for what no table file says."""
        said = dict(metadata)
        for key in ("format", "header_crc32"):
            del said[key]
        form = RowFormat(
            dim=int(said.pop("dim")),
            encoding=said.pop("encoding"),  # type: ignore[arg-type] # RowFormat refuses others
            trainable={"true": True, "false": False}[said.pop("trainable")],
            std=float(said.pop("std")),
            seed=int(said.pop("seed")),
            first=int(said.pop("first", "0")),
        )
        if int(said.pop("row_bytes")) != form.row_bytes:
            raise ValueError(f"row_bytes is not {form.row_bytes}")
        return Header(
            num_rows=int(said.pop("num_rows")),
            form=form,
            digest=said.pop("digest"),
            name=said.pop("name"),
            block_rows=int(said.pop("block_rows")),
            facts=said,
        )


def read_header(path: Path, descriptor: int) -> tuple[dict[str, Any], int]:
    """The header of any safetensors file, and where its data begin.

    Raises DataError for a file that is no safetensors file, is truncated, or whose header is damaged.
    """
    size = os.fstat(descriptor).st_size
    try:
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        raw = os.pread(descriptor, min(length, HEADER_LIMIT), 8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    if not raw.startswith(b"{") or length > HEADER_LIMIT:
        raise DataError(f"{path}: not a safetensors file; it does not begin with the length of a header and a header.")
    if len(raw) < length:
        raise DataError(f"{path}: truncated inside its header: {8 + length:,} bytes expected, {size:,} found.")
    try:
        if SEAL in raw and _sealed(raw) != raw:
            raise ValueError("its checksum differs")
        header = json.loads(raw)
        end = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: its header was altered or damaged ({error}); rows could be misread.") from None
    if size != end:
        what = "truncated" if size < end else "longer than it says"
        raise DataError(f"{path}: {what}: {end:,} bytes expected, {size:,} found.")
    return header, 8 + length


def _sealed(text: bytes) -> bytes:
    """A header with the CRC-32 of itself, in which the CRC's own digits count as zeros."""
    at = text.index(SEAL) + len(SEAL)
    before, after = text[:at], text[at + 8 :]
    return before + b"%08x" % zlib.crc32(before + b"00000000" + after) + after


def _table_header(path: Path, descriptor: int) -> tuple[Header, int]:
    """The header of a table file, and where its checksums begin. Raises DataError, and MismatchError for another version."""
    found, start = read_header(path, descriptor)
    metadata = found.get("__metadata__", {})
    version = metadata.get("format", "")
    if not version.startswith(FORMAT.split("/")[0]) or "header_crc32" not in metadata:
        raise DataError(
            f"{path}: a safetensors file, but not an engram table: its metadata do not say format {FORMAT}. "
            "`engram-lm table convert` makes a table of plain rows."
        )
    if version != FORMAT:
        raise MismatchError(f"{path}: has format {version}, this version of engram-lm reads {FORMAT}.")
    try:
        header = Header.from_metadata(metadata)
        if {name: found[name] for name in header.tensors} != header.tensors or start % PAGE:
            raise ValueError("its tensors do not lie where they should")
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: its metadata describe no table ({error}).") from None
    return header, start


# --- checksums ------------------------------------------------------------------------------------------------------


def block_checksums(blocks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """[n] uint64 of blocks [n, block_rows, stride] uint8, a short one filled with zeros; numbers: which blocks they are.

    The sum of word[j] * odd(j) over a block's 32-bit words, times odd(number), modulo 2^64. The factors are odd, so
    a change within one word always shows; they depend on the place, so rows and blocks that changed places show as well.
    """
    words = np.ascontiguousarray(blocks).reshape(len(blocks), math.prod(blocks.shape[1:])).view("<u4")
    factors = _factors(words.shape[1])
    if compiled():
        from ..kernels.checksum import weighted_sums as fast

        return fast(words, factors) * _odd(numbers)
    return weighted_sums(words, factors) * _odd(numbers)


def weighted_sums(words: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """words @ factors modulo 2^64: [n] uint64 of uint32 [n, w] and uint64 [w]. The truth of kernels/checksum.py."""
    return words.astype(np.uint64) @ factors


@functools.lru_cache(maxsize=8)
def _factors(count: int) -> np.ndarray:
    return _odd(np.arange(count))


def _odd(numbers: np.ndarray) -> np.ndarray:
    """2 * splitmix64(number) + 1 (Steele, Lea and Flood 2014)."""
    x = numbers.astype(np.uint64) + np.uint64(GAMMA)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (x ^ x >> np.uint64(31)) << np.uint64(1) | np.uint64(1)


# --- file -----------------------------------------------------------------------------------------------------------


class TableFile:
    """An open table file: one writer, or any number of readers. Made by `create`, `draft` or `open`; a context manager.

    Attributes:
        path, descriptor, writable: the file, its number in this process, and whether this is the writer.
        num_rows, form, digest, facts: what the file says; digest "" belongs to no plan.
        rows_offset: where the first record is in the file, a multiple of 4096.
        block_rows, num_blocks: rows under one checksum, and how many checksums there are.
        piece: blocks that are read or written at a time, about 4 MiB.
    """

    def __init__(self, path: Path, descriptor: int, header: Header, start: int, *, writable: bool) -> None:
        self.path, self.descriptor, self.header, self.writable = path, descriptor, header, writable
        self.num_rows, self.form = header.num_rows, header.form
        self.digest, self.facts = header.digest, header.facts
        self.block_rows, self.num_blocks = header.block_rows, header.num_blocks
        self._stride, self._block_bytes = header.form.stride, header.block_rows * header.form.stride
        self.piece = max(1, PIECE // self._block_bytes)
        self._clock_offset, self._checksums_offset = start, start + PAGE
        self.rows_offset = self._checksums_offset + header.checksum_bytes
        self._end = self.rows_offset + header.num_rows * header.form.stride
        self._clock = 0
        self._target: Path | None = None  # the name that a draft is published under

    @staticmethod
    def create(
        path: Path | str,
        num_rows: int,
        form: RowFormat,
        *,
        digest: str = "",
        facts: dict[str, str] | None = None,
    ) -> TableFile:
        """A new table of rows that were never written, open for writing. It takes time and space when rows are written.

        Raises:
            CheckpointError: when the path is taken (a table is never overwritten) or cannot be written.
            ConfigError: for a table without rows, or facts that the file itself says.
        """
        table = TableFile.draft(path, num_rows, form, digest=digest, facts=facts)
        try:
            return table.publish()
        except BaseException:
            table.close()
            raise

    @staticmethod
    def draft(
        path: Path | str,
        num_rows: int,
        form: RowFormat,
        *,
        digest: str = "",
        facts: dict[str, str] | None = None,
    ) -> TableFile:
        """As `create`, but called PATH.partial until `publish`. Closed before that, it vanishes."""
        path = Path(path)
        header = Header(num_rows, form, digest, facts or {}, name=secrets.token_hex(8) if form.trainable else "")
        beginning = header.to_bytes()
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"{path}: no table can be created there ({error.strerror}).") from None
        table = TableFile(partial, descriptor, header, len(beginning), writable=True)
        try:
            _lock(partial, descriptor, write=True)
            table._target = path
            if path.exists():
                raise CheckpointError(f"{path}: exists, and a table is never overwritten; remove it or name another.")
            os.ftruncate(descriptor, 0)  # what a process that was killed left
            table._store(np.frombuffer(beginning, np.uint8), 0)
            os.ftruncate(descriptor, table._end)
        except OSError as error:
            table.close()
            raise CheckpointError(f"{path}: the table cannot be created ({error.strerror}); nothing is left.") from None
        except BaseException:
            table.close()
            raise
        return table

    def publish(self) -> TableFile:
        """Make a draft durable under its own name; it stays open. Raises CheckpointError when it cannot be."""
        assert self._target is not None
        try:
            os.fsync(self.descriptor)
            self.path.rename(self._target)
            sync(self._target.parent)
        except OSError as error:
            raise CheckpointError(f"{self._target}: cannot be written ({error.strerror}).") from None
        self.path, self._target = self._target, None
        return self

    @staticmethod
    def open(path: Path | str, *, write: bool = False, digest: str | None = None) -> TableFile:
        """Open a table file; digest: of the plan and vocabulary that it will be used with, None for any.

        Raises:
            DataError: for a file that is missing, truncated, altered in its header, or no table.
            MismatchError: for a table of another plan, or of none when one is expected; for another format version.
            CheckpointError: for one that may not be opened, or is in use: a writer is alone.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR if write else os.O_RDONLY)
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such table file; `engram-lm table create` makes one.") from None
        except OSError as error:
            how = "writing" if write else "reading"
            raise CheckpointError(f"{path}: cannot be opened for {how} ({error.strerror}).") from None
        try:
            _lock(path, descriptor, write)
            header, start = _table_header(path, descriptor)
            if digest is not None and digest != header.digest:
                raise MismatchError(
                    f"{path}: belongs to the plan and vocabulary {header.digest or '(none)'}, opened for {digest}: every "
                    "row would be read from the wrong place."
                )
            table = TableFile(path, descriptor, header, start, writable=write)
            table._clock = table._read_clock()
            return table
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def identity(self) -> bytes:
        """What tells this table from all others, as long as the file exists."""
        return self.header.to_bytes()

    @property
    def clock(self) -> int:
        """Updates that the rows of the file hold, as their writer says; setting it writes it."""
        return self._clock

    @clock.setter
    def clock(self, clock: int) -> None:
        page = np.array([clock, clock * GAMMA % 2**64], np.uint64)  # within one sector: written whole, or not at all
        with self._writing("the clock"):
            self._store(page, self._clock_offset)
        self._clock = clock

    def _read_clock(self) -> int:
        page = np.empty(PAGE // 8, np.uint64)
        self._fill(page, self._clock_offset)
        clock, check = page[:2].tolist()
        if clock * GAMMA % 2**64 != check or page[2:].any():
            raise DataError(
                f"{self.path}: its clock is damaged; whether its rows are those of a checkpoint is unknown."
            )
        return clock

    def close(self) -> None:
        """Let go of the file; a draft is removed. Once more does nothing."""
        if self.descriptor >= 0:
            if self._target:
                self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        with self._writing("what was written last"):
            os.fsync(self.descriptor)

    # reading

    def offsets(self, ids: np.ndarray) -> np.ndarray:
        """Byte offsets [U] int64 of the records of rows [U]."""
        return self.rows_offset + ids * self._stride

    def read(self, first: int, last: int) -> np.ndarray:
        """Records [last - first, stride] uint8 of a run of rows. Raises DataError when the file no longer holds them."""
        self._check(first, last)
        records = np.zeros((last - first, self._stride), np.uint8)
        self._fill_kept([records], [self.rows_offset + first * self._stride])
        return records

    def blocks(self, numbers: np.ndarray, *, checked: bool = True) -> np.ndarray:
        """Blocks [n, block_rows, stride] uint8 of `numbers` [n], ascending; zeros behind the last row.

        Raises DataError for one that is damaged, if `checked`.
        """
        blocks = np.zeros((len(numbers), self.block_rows, self._stride), np.uint8)
        starts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
        self._fill_kept(np.split(blocks, starts), self._block_offsets(numbers[[0, *starts]]))
        if checked:
            first, end = int(numbers[0]), int(numbers[-1]) + 1
            bad = numbers[block_checksums(blocks, numbers) != self.checksums(first, end)[numbers - first]]
            if len(bad):
                raise DataError(
                    f"{self.path}: {self._damage(int(bad[0]))} does not match its checksum: the file was damaged; "
                    "`engram-lm table verify` lists every such block."
                )
        return blocks

    def checksums(self, first: int, last: int) -> np.ndarray:
        """The checksums [last - first] uint64 of blocks as the file has them."""
        sums = np.zeros(last - first, "<u8")
        self._fill_kept([sums.view(np.uint8)], [self._checksums_offset + 8 * first])
        return sums

    def written(self, first: int = 0, last: int | None = None) -> Iterator[np.ndarray]:
        """Numbers [n] of the blocks that the file system keeps, ascending, a piece at a time; all others are zeros."""
        last = self.num_blocks if last is None else last
        numbers: list[int] = []
        for start, end in self._kept(*self._block_offsets(np.array([first, last]))):
            lo = max(first, (start - self.rows_offset) // self._block_bytes)
            first = -(-(end - self.rows_offset) // self._block_bytes)
            while lo < first:
                step = min(first - lo, self.piece - len(numbers))
                numbers += range(lo, lo + step)
                lo += step
                if len(numbers) == self.piece:
                    yield np.array(numbers)
                    numbers = []
        if numbers:
            yield np.array(numbers)

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
        """Every block that does not match its checksum; the header was checked when the file was opened.

        progress: called with the number of blocks that are done, and of all.
        """
        found: list[Damage] = []
        done, total = 0, self.header.checksum_bytes // 8
        for numbers in chain(self.written(), [np.empty(0, np.int64)]):
            end = int(numbers[-1]) + 1 if len(numbers) else total
            actual = np.zeros(end - done, np.uint64)  # of holes
            if len(numbers):
                actual[numbers - done] = block_checksums(self.blocks(numbers, checked=False), numbers)
            found += [self._damage(done + int(block)) for block in np.flatnonzero(actual != self.checksums(done, end))]
            done = end
            progress(done, total)
        return found

    # writing

    def write(self, first: int, records: np.ndarray, *, torn: bool = False) -> None:
        """Write a run of rows, records [n, stride] uint8, and the checksums of their blocks. Holes stay holes under zeros.

        torn: an earlier call with these rows may have been cut short, so their blocks need not match their checksums.

        Raises:
            DataError: when a block is damaged of which only a part is written: the new checksum would hide it.
            CheckpointError: when the disk is full or fails.
        """
        self._check(first, first + len(records))
        last, end = first + len(records), -(-(first + len(records)) // self.block_rows)
        with self._writing(f"rows {first:,} to {last - 1:,}"):
            for lo in range(first // self.block_rows, end, self.piece):
                numbers = np.arange(lo, min(lo + self.piece, end))
                row, behind = lo * self.block_rows, min((lo + len(numbers)) * self.block_rows, self.num_rows)
                begin, stop = max(first, row), min(last, behind)
                if (begin, stop) == (row, behind):
                    blocks = np.zeros((len(numbers), self.block_rows, self._stride), np.uint8)
                else:
                    blocks = self.blocks(numbers, checked=not torn)
                blocks.reshape(-1, self._stride)[begin - row : stop - row] = records[begin - first : stop - first]
                self._put(lo, blocks)

    def _put(self, first: int, blocks: np.ndarray) -> None:
        """Write consecutive blocks, all but those of zeros where the file has a hole."""
        numbers = np.arange(first, first + len(blocks))
        sums = block_checksums(blocks, numbers)
        kept = (blocks.reshape(len(blocks), -1).view(np.uint32) != 0).any(1)
        for there in self.written(first, first + len(blocks)):
            kept[there - first] = True
        edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).tolist()
        for lo, hi in zip(edges[::2], edges[1::2], strict=True):
            [offset] = self._block_offsets(numbers[lo : lo + 1])
            self._store(blocks[lo:hi].reshape(-1)[: self._end - offset], offset)
            self._store(sums[lo:hi], self._checksums_offset + 8 * (first + lo))

    def write_scattered(self, ids: np.ndarray, records: np.ndarray, *, torn: bool = False) -> None:
        """Write rows `ids` [U], ascending, with records [U, stride] uint8, and the checksums of their blocks.

        `torn` and errors as in `write`.
        """
        if not len(ids):
            return
        self._check(int(ids[0]), int(ids[-1]) + 1)
        numbers, starts, counts = np.unique(ids // self.block_rows, return_index=True, return_counts=True)
        with self._writing(f"{len(ids):,} rows from {ids[0]:,} to {ids[-1]:,}"):
            for lo in range(0, len(numbers), self.piece):
                some = slice(lo, lo + self.piece)
                rows = slice(starts[lo], starts[lo] + counts[some].sum())
                self._patch(numbers[some], counts[some], ids[rows], records[rows], torn)

    def _patch(self, numbers: np.ndarray, counts: np.ndarray, ids: np.ndarray, records: np.ndarray, torn: bool) -> None:
        """Write rows into blocks `numbers` [b], so many of them into each."""
        blocks = self.blocks(numbers, checked=not torn)
        inside = ids % self.block_rows
        blocks[np.repeat(np.arange(len(numbers)), counts), inside] = records
        ends = np.cumsum(counts)
        spans = inside[ends - counts].tolist(), (inside[ends - 1] + 1).tolist()
        for block, offset, lo, hi in zip(blocks, self._block_offsets(numbers), *spans, strict=True):
            self._store(block[lo:hi], offset + lo * self._stride)
        first, end = int(numbers[0]), int(numbers[-1]) + 1
        sums = self.checksums(first, end)
        sums[numbers - first] = block_checksums(blocks, numbers)
        self._store(sums, self._checksums_offset + 8 * first)

    # bytes

    def _check(self, first: int, last: int) -> None:
        if not 0 <= first <= last <= self.num_rows:
            raise IndexError(f"{self.path}: has rows 0 to {self.num_rows - 1:,}, not {first:,} to {last - 1:,}.")

    def _damage(self, block: int) -> Damage:
        return Damage(block, *(min(edge * self.block_rows, self.num_rows) for edge in (block, block + 1)))

    def _block_offsets(self, numbers: np.ndarray) -> list[int]:
        """Where blocks begin in the file."""
        return (self.rows_offset + numbers * self._block_bytes).tolist()

    def _kept(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs [lo, hi) of the bytes from `start` to `end` that the file system keeps.

        Between them are holes, which read as zeros, but not fast (ext4: 0.2 GB/s).
        """
        end = min(end, self._end)
        while start < end:
            try:
                lo = os.lseek(self.descriptor, start, os.SEEK_DATA)
                start = os.lseek(self.descriptor, lo, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise DataError(f"{self.path}: cannot be read at byte {start:,} ({error.strerror}).") from None
                if (size := os.fstat(self.descriptor).st_size) < self._end:
                    raise self._cut(size) from None
                return  # a hole up to the end
            if lo < end:
                yield lo, min(start, end)

    def _fill_kept(self, runs: Sequence[np.ndarray], offsets: Sequence[int]) -> None:
        """Read each of `runs`, uint8 and zero, from its offset, without the holes and what lies behind the rows."""
        pieces = [
            (run.reshape(-1)[lo - offset : hi - offset], lo)
            for run, offset in zip(runs, offsets, strict=True)
            for lo, hi in self._kept(offset, offset + run.nbytes)
        ]
        if len(pieces) > 1 and hasattr(os, "posix_fadvise"):  # have the disk read all of them at once
            for piece, offset in pieces:
                os.posix_fadvise(self.descriptor, offset, len(piece), os.POSIX_FADV_WILLNEED)
        for piece, offset in pieces:
            self._fill(piece, offset)

    def _fill(self, out: np.ndarray, offset: int) -> None:
        """Read `out`, whatever its type, from the bytes at `offset`."""
        view = out.reshape(-1).view(np.uint8).data
        while len(view):
            try:
                count = os.preadv(self.descriptor, [view], offset)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read at byte {offset:,} ({error.strerror}).") from None
            if not count:
                raise self._cut(offset)
            view, offset = view[count:], offset + count

    def _cut(self, size: int) -> DataError:
        return DataError(f"{self.path}: ends at byte {size:,} now; it was cut while in use, and rows are lost.")

    def _store(self, data: np.ndarray, offset: int) -> None:
        """Write `data`, whatever its type, to the bytes at `offset`."""
        view = data.reshape(-1).view(np.uint8).data
        while len(view):
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Say what a failure of the disk means."""
        if not self.writable:
            raise CheckpointError(f"{self.path}: {what} cannot be written, for the file was opened for reading.")
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {what} cannot be written ({error.strerror}). All else in the file is intact; these are in "
                "doubt until they are written again."
            ) from None


def _lock(path: Path, descriptor: int, write: bool) -> None:
    """Held until the file is closed or the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        would = "two writers would overwrite each other's rows" if write else "rows would change while they are read"
        raise CheckpointError(f"{path}: in use by {_holder(descriptor)}; {would}.") from None


def _holder(descriptor: int) -> str:
    """The process that holds a lock on an open file, as far as the system tells."""
    status = os.fstat(descriptor)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            match line.split():
                case [_, "FLOCK", _, kind, process, place, *_] if place == file:
                    return f"process {process}, which {'writes to it' if kind == 'WRITE' else 'reads it'}"
    return "another process"


def sync(path: Path) -> None:
    """Make a file or directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
