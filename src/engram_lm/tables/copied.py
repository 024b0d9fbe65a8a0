"""A table in use, on whichever tier, copied to a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import ConfigError
from .base import Table
from .cached import CachedStore
from .device import DeviceTable
from .disk import FileStore
from .file import PIECE, TableFile
from .host import MemoryStore
from .pinned import PinnedTable
from .records import Newest, Records, convert
from .rows import Encoding, RowFormat
from .stored import StoredTable


class InMemory:
    """Records [N, stride] in memory, for `convert`."""

    def __init__(self, records: np.ndarray | Tensor, form: RowFormat) -> None:
        self.records, self.form, self.num_rows = records, form, len(records)

    def written(self, *, every: bool = False) -> Iterator[Records]:
        """Pieces in which any row was ever written; or all."""
        step = -(-PIECE // self.form.stride // 64) * 64  # whole blocks
        for first in range(0, self.num_rows, step):
            piece = self.records[first : first + step]
            records = piece.cpu().numpy() if isinstance(piece, Tensor) else piece
            if every or records.any():
                yield np.arange(first, first + len(records)), records


class InUse(Newest):
    """The rows of a table file that a store has open, as of its last commit; nothing to be closed."""

    def __init__(self, store: FileStore) -> None:
        self.file, self.form, self.num_rows = store.file, store.form, store.num_rows
        self.reader, self.journal = store.reader, store.journal
        self.changed, self.offsets = store.journal.newest(store.clock)


def copy_table(table: Table, path: Path, *, encoding: Encoding | None = None, serving: bool = False) -> TableFile:
    """Write the rows of a table as they are now to a new file, bound to the same plan, and leave it open.

    encoding: of the file, the table's by default; in another one rows are rounded to the nearest. serving: leave out the
    accumulators; rows that were never written are written as what they read as then. A table on disk is committed.

    Raises ConfigError for a table that keeps its rows elsewhere, DataError for damaged blocks of a table on disk, and
    CheckpointError when the file cannot be written.
    """
    old, trainable = table.form, table.form.trainable and not serving
    form = old.stored_as(encoding or old.encoding, trainable=trainable)
    return write_table(_rows(table), path, form, digest=table.digest, clock=table.clock)


def write_table(source: Newest | InMemory, path: Path, form: RowFormat, *, digest: str, clock: int) -> TableFile:
    """Write the rows of `source` to a new file in the format `form`, and leave it open. Errors as in `copy_table`."""
    target = TableFile.draft(path, source.num_rows, form, digest=digest)
    try:
        convert(source, target, lambda done, total: None)  # type: ignore[arg-type]  # it asks for no more than InMemory has
        target.clock = clock
        return target.publish()
    except BaseException:
        target.close()
        raise


def _rows(table: Table) -> Newest | InMemory:
    if isinstance(table, DeviceTable | PinnedTable):
        return InMemory(table.settled(), table.form)
    store = table.store if isinstance(table, StoredTable) else None
    if isinstance(store, CachedStore):
        store = store.inner
    if isinstance(store, MemoryStore):
        return InMemory(store.records, store.form)
    if isinstance(store, FileStore):
        store.save(store.file.path.parent, table.clock, table.digest)
        return InUse(store)
    raise ConfigError(f"a {type(table).__name__} cannot be copied: there is no reading all of its rows.")
