"""Records in a file: those that training changed in a journal beside it, all others in the table file itself."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import MismatchError
from ..kernels.reads import Reader
from .codec import gather
from .file import TableFile
from .journal import Journal
from .store import Held, Staged, Store


class FileStore(Store):
    """The records of a table file, read where they are when they are wanted; its own from now on, to be closed with it.

    Writable when the file is, with a journal beside it; otherwise as of the journal's last commit, if there is one.

    depth: of the Reader. reads: `direct` asks for each row, many at a time; `map` lets the system page the file in, one page
    at a time and thread, for tables that mostly fit in RAM (a file that is cut short meanwhile ends the process then).
    journal_limit: bytes up to which `settle` lets the journal grow before it applies it.

    `stage` may run on other threads beside everything but `close`. Errors are those of Journal and Reader.
    """

    def __init__(
        self,
        file: TableFile,
        *,
        depth: int = 128,
        reads: Literal["direct", "map"] = "direct",
        journal_limit: int = 4 << 30,
    ) -> None:
        self.file, self.num_rows, self.form, self.writable = file, file.num_rows, file.form, file.writable
        self.reader, self.journal_limit = Reader(depth), journal_limit
        self._mapped = _mapped(file) if reads == "map" else None
        self.journal = Journal(file, self.reader)
        self._steady = threading.Lock()  # nothing that was located moves while this is held
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="engram-journal")
        self._appending: Future[None] | None = None
        self._blank = self._blank_blocks()
        self._buffer = np.empty((0, self.form.stride), np.uint8)

    @property
    def clock(self) -> int:
        """Clock of the last commit."""
        return self.journal.clock

    @property
    def resident(self) -> int:
        """Bytes of the journal's index, of the list of empty blocks and of the buffer."""
        return self.journal.resident + self._blank.nbytes + self._buffer.nbytes

    def hold(self, ids: np.ndarray, staged: Staged | None = None) -> Held:
        """Copy what is staged, read the rest."""
        if len(self._buffer) < len(ids):
            self._buffer = np.empty((len(ids) * 5 // 4, self.form.stride), np.uint8)
        records = self._buffer[: len(ids)]
        if staged is None or len(staged.ids) == 0:
            self._read(ids, records)
        else:
            at = np.searchsorted(staged.ids, ids).clip(max=len(staged.ids) - 1)
            found = staged.ids[at] == ids
            records[found] = staged.records[at[found]]
            if not found.all():
                missing = np.empty((len(ids) - np.count_nonzero(found), self.form.stride), np.uint8)
                self._read(ids[~found], missing)
                records[~found] = missing
        return Held(records, np.arange(len(ids)))

    def stage(self, ids: np.ndarray) -> Staged:
        """Read records; those that change meanwhile are of either time."""
        records = np.empty((len(ids), self.form.stride), np.uint8)
        with self._steady:
            self._read(ids, records)
        return Staged(ids, records)

    def advise(self, ids: np.ndarray) -> None:
        """Advise the system to read records, wherever they are."""
        with self._steady:
            newer = self.journal.locate(ids)
            in_file = (newer < 0) & ~self._blank[ids // self.file.block_rows]
            self.reader.advise(self.journal.descriptor, newer[newer >= 0], self.form.stride)
            self.reader.advise(self.file.descriptor, self.file.offsets(ids[in_file]), self.form.stride)

    def changed(self, ids: np.ndarray, held: Held) -> None:
        """Append them to the journal, on a thread of its own; what goes wrong there is raised by all calls until `load`."""
        self._appended()
        records = gather(held.records, held.slots)  # a copy: what is held may change before it is written
        self._appending = self._writer.submit(self.journal.append, ids.copy(), records)

    def _appended(self) -> None:
        """Wait until the journal has everything."""
        if (appending := self._appending) is not None:
            appending.result()

    def save(self, directory: Path, clock: int, digest: str) -> None:
        """Commit the journal, in place: the table file stays where it is."""
        self._appended()
        self.journal.commit(clock)

    def load(self, directory: Path, clock: int, digest: str) -> None:
        """Roll the journal back."""
        self._rollback(clock)

    def _rollback(self, clock: int | None) -> None:
        if self._appending is not None:
            wait([self._appending])  # whatever became of it
        self._appending = None
        with self._steady:
            self.journal.rollback(clock)

    def begin(self, clock: int, *, again: bool) -> int:
        """Start from the rows of the table file; `again`: forget what the journal has.

        Raises MismatchError when it has commits that are not to be forgotten.
        """
        if not again and not self.journal.empty:
            raise MismatchError(
                f"{self.journal.path} holds updates of an earlier run, up to clock {self.clock}: this run would have started "
                "from them. Go on with that run, or apply its journal to the table file first."
            )
        self._rollback(None)
        return self.clock

    def settle(self, clock: int) -> None:
        """Apply the commits up to `clock` once the journal is larger than `journal_limit`."""
        self._appended()
        if self.journal.nbytes > self.journal_limit:
            self._apply(clock)

    def compact(self) -> None:
        """Apply all commits, so that the table file alone is the table."""
        self._apply(self.clock)

    def close(self) -> None:
        """Close the file, its journal and the reader. What no commit followed is lost."""
        self._writer.shutdown()
        with self._steady:
            self._mapped = None
            self.reader.close()
            self.journal.close()
            self.file.close()

    def _apply(self, clock: int) -> None:
        self._appended()
        with self._steady:
            self.journal.drop(clock)
            self._blank = self._blank_blocks()

    def _blank_blocks(self) -> np.ndarray:
        """[num_blocks] bool: those of rows that were never written, which need no reading."""
        return self.file.checksums(0, self.file.num_blocks) == 0

    def _read(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Records [n, stride] of ids [n] into `out`."""
        self._appended()
        newer = self.journal.locate(ids)
        in_journal, blank = newer >= 0, self._blank[ids // self.file.block_rows]
        in_file = ~(in_journal | blank)
        out[blank] = 0
        self._fill(self.journal.descriptor, newer, in_journal, out)
        if self._mapped is None:
            self._fill(self.file.descriptor, self.file.offsets(ids), in_file, out)
        else:
            out[in_file] = gather(self._mapped, ids[in_file])

    def _fill(self, descriptor: int, offsets: np.ndarray, chosen: np.ndarray, out: np.ndarray) -> None:
        """out[chosen] from offsets[chosen] of a file; offsets [n], chosen [n] bool, out [n, stride]."""
        if chosen.all():
            self.reader.read(descriptor, offsets, out)
        elif chosen.any():
            records = np.empty((np.count_nonzero(chosen), out.shape[1]), np.uint8)
            self.reader.read(descriptor, offsets[chosen], records)
            out[chosen] = records


def _mapped(file: TableFile) -> np.ndarray:
    """All records [num_rows, stride] of the file as memory that is read when it is touched."""
    pages = mmap.mmap(file.descriptor, 0, prot=mmap.PROT_READ)
    pages.madvise(mmap.MADV_RANDOM)  # the pages around a row are no more likely to be wanted than others
    return np.frombuffer(pages, np.uint8, offset=file.rows_offset).reshape(file.num_rows, file.form.stride)
