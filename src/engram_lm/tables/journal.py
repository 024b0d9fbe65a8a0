"""The journal of a table file: every version of every row that was changed, in the order of the changes.

Training appends here and leaves the table file alone, where each changed row would cost a whole page. An index in RAM knows
where the newest version of a row is; rows that it lacks are as in the table file. A commit costs two fsyncs, and what
follows the last commit is gone after a kill. When nobody needs the commits before some clock any more, the rows up to there
are written into the table file, block after block, and a shorter journal takes over: `drop`.

    <table file>.journal = head | segment | segment | ...        little-endian, all in multiples of 64 bytes
    rows   = mark | ids int64 [n] | records uint8 [n, stride]    rows as they are from now on
    seal   = mark                                                commit, or apply: all that is before it is durable
    void   = mark | anything                                     what a rollback took back

The head is written once and renamed into place. A mark is 32 bytes, twice, within one sector; a seal is written when all
before it is durable. So a kill or a power cut leaves whole segments and then anything but a seal, and what cannot be read
before a seal is damage. A rollback turns what it takes back into a void: a cut might be half done when the power fails.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import numpy as np

from ..errors import CheckpointError, DataError, MismatchError
from ..kernels.index import IdMap
from ..kernels.reads import Reader
from .file import TableFile, sync

MAGIC = b"engram-j"
HEAD = Struct("<8s I q 32s 8x I")  # magic, generation, clock of the table file, its identity, CRC-32 of all this
MARK = Struct("<8s I I q I I")  # magic, kind, generation, rows or clock, CRC-32 of the body, CRC-32 of all this
UNIT = 2 * MARK.size  # a mark lies there twice, lest a flipped bit in the last commit's makes it a torn tail
ROWS, COMMIT, APPLY, VOID = 1, 2, 3, 4
PORTION = 1 << 24  # bytes in memory at a time where a journal is read or copied as a whole


def journal_path(table: TableFile) -> Path:
    """Where the journal of a table file is, if it has one."""
    return Path(f"{table.path}.journal")


class Mark(NamedTuple):
    """How a segment begins."""

    kind: int
    generation: int
    value: int  # of rows: how many; of a seal: its clock; of a void: its bytes
    checksum: int  # of the body


class Journal:
    """The versions of rows that are newer than the table file's; for one thread, but `locate` is for any.

    table: if it is open for writing, a journal is made when there is none and an interrupted `drop` is completed; if not,
    nothing is altered. reader: reads the rows that `drop` applies.

    Attributes:
        descriptor: of the file, for reading at the offsets that `locate` gives; another one after `drop`.
        commits: clock -> where that commit ends, in order; the first is the clock of the table file itself.

    Raises:
        DataError: when the journal is damaged.
        MismatchError: when it is another table's, or the table file's of another time.
        CheckpointError: when it cannot be opened; when a `drop` was interrupted and the table is open for reading only.
    """

    def __init__(self, table: TableFile, reader: Reader) -> None:
        self.path = journal_path(table)
        self.lock = threading.Lock()  # of the index
        self._table, self._reader = table, reader
        self.descriptor, self._generation, self._index = -1, 0, IdMap()
        self._end, self.commits = HEAD.size, {table.clock: HEAD.size}
        self._applying = -1  # clock of an unfinished `drop`: the table file may hold rows of any time up to then
        self._unsure = False  # an fsync failed: what was written before it may be lost, and no later one would tell
        try:
            if self.path.exists():
                self._open()
            elif table.writable:
                with self._explained("cannot be made"):
                    self._replace(table.clock, HEAD.size)
        except BaseException:
            self._release()
            raise

    def _open(self) -> None:
        table, writable = self._table, self._table.writable
        with self._explained("cannot be opened"):
            self.descriptor = os.open(self.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            head, size = os.pread(self.descriptor, HEAD.size, 0), os.fstat(self.descriptor).st_size
        if len(head) < HEAD.size or not _sound(head):
            raise DataError(
                f"{self.path}: no journal, or its head is damaged: rows newer than the table file's are in it."
            )
        _, self._generation, base, owner, _ = HEAD.unpack(head)
        if owner != _identity(table):
            raise MismatchError(
                f"{self.path} belongs to another table file than {table.path}: that table's rows would have taken the place "
                "of this one's."
            )
        self.commits = {base: HEAD.size}
        self._index, self.commits, self._applying, self._end = self._load(size)
        if table.clock not in (base, self._applying):
            raise MismatchError(
                f"{self.path} continues a table file of clock {base}, but {table.path} is of clock {table.clock}: one was "
                "restored without the other, and rows of different times would have been mixed."
            )
        if writable:
            self._finish()
        elif self._applying >= 0:
            raise CheckpointError(
                f"{table.path}: its journal was being applied when the process ended, so it holds rows of different times. "
                "Open it for writing once to complete that."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._end

    @property
    def resident(self) -> int:
        """Bytes of the index in RAM."""
        return self._index.nbytes

    @property
    def base(self) -> int:
        """Clock that the table file itself stands for."""
        return next(iter(self.commits))

    @property
    def clock(self) -> int:
        """Clock of the last commit, or of the table file if there is none."""
        return next(reversed(self.commits))

    @property
    def empty(self) -> bool:
        """Whether there is no commit since the table file."""
        return max(self.commits.values()) == HEAD.size

    def locate(self, ids: np.ndarray) -> np.ndarray:
        """Offsets [n] int64 of the newest records of ids [n]; -1: as in the table file."""
        with self.lock:
            return self._index.get(ids)

    def append(self, ids: np.ndarray, records: np.ndarray) -> None:
        """Take up distinct rows as they are now: ids [n] int64, records [n, stride] uint8. Durable with the next commit.

        Raises CheckpointError when the disk is full; the journal is as before then.
        """
        if len(ids) == 0:
            return
        ids, records = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(records)
        first = self._end + UNIT + ids.nbytes
        body = ids.data, records.data, bytes(-(ids.nbytes + records.nbytes) % UNIT)
        with self._explained("cannot take up more rows"):
            self._write(self._mark(ROWS, len(ids), *body), *body)
        with self.lock:
            self._index.put(ids, first + np.arange(len(ids)) * records.shape[1])

    def commit(self, clock: int) -> None:
        """Make everything so far durable, as the table of `clock`.

        Raises CheckpointError when the disk is full or fails, and MismatchError for a clock before the last one.
        """
        if clock < self.clock:
            raise MismatchError(
                f"{self.path}: commit {clock} after commit {self.clock}: it would pass for the earlier one."
            )
        if self.commits.get(clock) != self._end:
            with self._explained(f"cannot keep commit {clock}"):
                self._seal(COMMIT, clock)
            self.commits[clock] = self._end

    def rollback(self, clock: int | None = None) -> None:
        """Forget what came after commit `clock`; None: all. Of a table open for reading only this process forgets.

        Raises MismatchError when there is no such commit.
        """
        self._finish()
        if clock is not None and clock not in self.commits:
            raise MismatchError(
                f"{self.path} has no commit {clock}, only {', '.join(map(str, self.commits))}: rows of another time than the "
                "checkpoint's would have been read."
            )
        end = HEAD.size if clock is None else self.commits[clock]
        if end < self._end:
            index, commits, _, _ = self._load(end)
            if self._table.writable:
                with self._explained("cannot be rolled back"):
                    self._sync()
                    _write_all(self.descriptor, end, self._mark(VOID, self._end - end - UNIT))
                    self._sync()
            self.commits = commits
            with self.lock:
                self._index = index

    def newest(self, clock: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n], ascending, of the rows that changed up to commit `clock`, and offsets [n] of their records as of then."""
        ids, offsets = self._load(self.commits[clock])[0].items()
        order = np.argsort(ids)
        return ids[order], offsets[order]

    def drop(self, clock: int) -> None:
        """Write the rows of the last commit up to `clock` into the table file and forget the commits up to there.

        An apply seal comes first: who finds it when opening does all of this again, for which the journal has everything.
        Raises CheckpointError when the disk is full; nothing is lost then, and the next `drop` or opening goes on.
        """
        torn, clock = self._applying >= 0, max(clock, self._applying)
        clock = max((known for known in self.commits if known <= clock), default=self.base)
        cut, table = self.commits[clock], self._table
        if cut == HEAD.size:
            return
        with self._explained(f"cannot be applied up to commit {clock}"):
            if clock != self._applying:
                self._seal(APPLY, clock)
                self._applying = clock
            ids, offsets = self.newest(clock)
            step = max(1, PORTION // table.form.stride)
            for some in (slice(first, first + step) for first in range(0, len(ids), step)):
                records = np.empty((len(ids[some]), table.form.stride), np.uint8)
                self._reader.read(self.descriptor, offsets[some], records)
                table.write_scattered(ids[some], records, torn=torn)
            table.clock = clock
            table.sync()
            self._replace(clock, cut)

    def close(self) -> None:
        """Let go of the file; one without a commit is removed. Once more does nothing."""
        if self.descriptor >= 0 and self._table.writable and self.empty:
            self.path.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _finish(self) -> None:
        """Complete a `drop` that was interrupted."""
        if self._applying >= 0:
            self.drop(self._applying)

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write(self, *parts: bytes | memoryview) -> None:
        """Append a segment, whole or not at all, over the torn tail if there is one."""
        try:
            end = _write_all(self.descriptor, self._end, *parts)
        except BaseException:
            os.ftruncate(self.descriptor, self._end)  # room for others
            raise
        self._end = end

    def _mark(self, kind: int, value: int, *body: bytes | memoryview) -> bytes:
        checksum = 0
        for part in body:
            checksum = zlib.crc32(part, checksum)
        return 2 * _with_crc(MARK.pack(MAGIC, kind, self._generation, value, checksum, 0))

    def _seal(self, kind: int, clock: int) -> None:
        """Make everything durable, then say so durably."""
        if self._unsure:
            raise OSError("an fsync failed before, so rows may be lost; open the table again")
        self._sync()
        self._write(self._mark(kind, clock))
        self._sync()

    def _sync(self) -> None:
        try:
            os.fsync(self.descriptor)
        except OSError:
            self._unsure = True
            raise

    def _replace(self, base: int, cut: int) -> None:
        """Begin a new journal, of a table file of clock `base`, with what comes after `cut` in this one."""
        partial, shift = self.path.with_name(f"{self.path.name}.partial"), cut - HEAD.size
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            head = _with_crc(HEAD.pack(MAGIC, self._generation + 1, base, _identity(self._table), 0))
            end = _write_all(descriptor, 0, head)
            for at in range(cut, self._end, PORTION):
                end = _write_all(descriptor, end, os.pread(self.descriptor, min(PORTION, self._end - at), at))
            os.fsync(descriptor)
            os.rename(partial, self.path)
        except BaseException:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            raise
        ids, offsets = self._index.items()
        later = offsets >= cut
        index = IdMap(int(later.sum()))
        index.put(ids[later], offsets[later] - shift)
        self._release()
        with self.lock:
            self.descriptor, self._index = descriptor, index
        self.commits = {base: HEAD.size} | {clock: at - shift for clock, at in self.commits.items() if at > cut}
        self._generation, self._end, self._applying = self._generation + 1, end, -1
        sync(self.path.parent)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _load(self, end: int) -> tuple[IdMap, dict[int, int], int, int]:
        """Of the first `end` bytes: index, commits, the clock of an unfinished `drop` or -1, and where the torn tail starts."""
        index, commits, applying, whole = IdMap(), {self.base: HEAD.size}, -1, HEAD.size
        pending: list[tuple[int, int]] = []  # rows that no commit followed so far
        for mark, start, stop in self._segments(end):
            if mark.kind == ROWS:
                pending.append((start, mark.value))
            elif mark.kind == COMMIT:
                for at, count in pending:
                    ids = np.frombuffer(os.pread(self.descriptor, 8 * count, at), np.int64)
                    index.put(ids, at + 8 * count + np.arange(count) * self._table.form.stride)
                pending = []
                commits[mark.value] = whole = stop
            elif mark.kind == VOID:
                whole = stop
            elif mark.generation == self._generation:  # others are of a journal that this one took over from
                applying = mark.value
        return index, commits, applying, whole

    def _segments(self, end: int) -> Iterator[tuple[Mark, int, int]]:
        """Marks, and where their bodies start and end, up to the torn tail."""
        at, number = HEAD.size, 0
        while at + UNIT <= end:
            start, mark = at + UNIT, _mark(os.pread(self.descriptor, UNIT, at))
            stop = start + self._size(mark) if mark else start
            if mark is None or stop > end or (mark.kind == ROWS and self._checksum(start, stop) != mark.checksum):
                if self._sealed(start, end):
                    raise DataError(
                        f"{self.path}: segment {number}, at byte {at}, is damaged: rows of that time and later ones would "
                        "have been those of an earlier time. Restore the table file and its journal from a copy."
                    )
                return
            yield mark, start, stop
            at, number = stop, number + 1

    def _size(self, mark: Mark) -> int:
        """Bytes of a body."""
        if mark.kind == ROWS:
            size = mark.value * (8 + self._table.form.stride)
            return size + -size % UNIT
        return mark.value if mark.kind == VOID else 0

    def _checksum(self, start: int, stop: int) -> int:
        """CRC-32 of a body."""
        checksum, buffer = 0, memoryview(bytearray(min(stop - start, PORTION)))
        for at in range(start, stop, PORTION):
            count = os.preadv(self.descriptor, [buffer[: stop - at]], at)
            checksum = zlib.crc32(buffer[:count], checksum)
        return checksum

    def _sealed(self, start: int, end: int) -> bool:
        """Whether there is a seal anywhere from `start` on."""
        for at in range(start, end, PORTION):
            raw = os.pread(self.descriptor, min(PORTION, end - at), at)
            words = np.frombuffer(raw, np.uint64, len(raw) // MARK.size * (MARK.size // 8))
            for place in np.flatnonzero(words[:: MARK.size // 8] == np.frombuffer(MAGIC, np.uint64)) * MARK.size:
                mark = _mark(raw[place : place + MARK.size])
                if mark and (mark.kind == COMMIT or (mark.kind == APPLY and mark.generation == self._generation)):
                    return True
        return False

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say what a failure of the disk means."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{self.path} {what} ({error}). Its last commit, {self.clock}, is intact.") from None


def _identity(table: TableFile) -> bytes:
    """32 bytes that tell the table file from others."""
    return hashlib.sha256(table.identity).digest()


def _with_crc(raw: bytes) -> bytes:
    """A head or mark with the CRC-32 of what comes before its last four bytes in them."""
    return raw[:-4] + zlib.crc32(raw[:-4]).to_bytes(4, "little")


def _sound(raw: bytes) -> bool:
    return raw.startswith(MAGIC) and _with_crc(raw) == raw


def _mark(raw: bytes) -> Mark | None:
    """The mark in its first or second copy, unless both are damaged."""
    sound = (half for half in (raw[: MARK.size], raw[MARK.size :]) if _sound(half))
    return next((Mark(*MARK.unpack(half)[1:-1]) for half in sound), None)


def _write_all(descriptor: int, at: int, *parts: bytes | memoryview) -> int:
    """Write the parts one after another from byte `at`, without joining them; where they end."""
    views = [view for part in parts if (view := memoryview(part).cast("B"))]
    while views:
        count = os.pwritev(descriptor, views, at)
        at += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    return at
