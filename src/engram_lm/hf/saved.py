"""A table as a file of a model's directory, wherever its rows live."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..tables import DeviceTable, Table
from ..tables.cached import CachedStore
from ..tables.file import TableFile
from ..tables.journal import journal_path
from ..tables.pinned import PinnedTable
from ..tables.stored import StoredTable


def save_table(table: Table, path: Path) -> None:
    """Write the rows as they are now, with accumulators and clock, as a table file that is whole or not at all.

    Replaces a table that is there. Raises CheckpointError when that one is being trained, or the file cannot be written.
    """
    if path.exists():
        with TableFile.open(path) as old:
            if journal_path(old).exists():
                raise CheckpointError(
                    f"{path}: has a journal, so it is a table that was trained in place; it would have been replaced while "
                    "its newest rows are in the journal. Save to another directory."
                )
    fresh = path.with_name(f"{path.stem}.new{path.suffix}")
    fresh.unlink(missing_ok=True)  # of a process that was killed
    with TableFile.draft(fresh, table.num_rows, table.form, digest=table.digest) as file:
        step = file.piece * file.block_rows
        for first in range(0, table.num_rows, step):
            file.write(first, records_of(table, first, min(first + step, table.num_rows)))
        file.clock = table.clock
        file.publish()
    fresh.replace(path)


def records_of(table: Table, first: int, last: int) -> np.ndarray:
    """Records [last - first, stride] uint8 of a run of rows."""
    if isinstance(table, DeviceTable | PinnedTable):
        return table.settled()[first:last].cpu().numpy()
    assert isinstance(table, StoredTable)
    store = table.store.inner if isinstance(table.store, CachedStore) else table.store  # rows read once are not hot
    with table.lock:
        held = store.hold(np.arange(first, last))
        return held.records[held.slots]
