"""A table that was saved in pieces by as many processes as had it, read again by any number of them.

    CHECKPOINT/table.safetensors                  all rows, saved by one process
    CHECKPOINT/table-1-of-4/table.safetensors     the rows of the second of four
    CHECKPOINT/table-1-of-4/table.txt             where they are, if they are in a file that stays in place

Each process reads the records of the rows that it keeps, accumulators too, a portion at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CheckpointError, MismatchError
from .base import Table
from .file import TableFile
from .records import Newest, ever_written


def piece_name(rank: int, size: int) -> str:
    """Of the rows that a rank keeps."""
    return f"table-{rank}-of-{size}"


def load_table(table: Table, directory: Path, clock: int, piece: str = "") -> None:
    """Return to what any number of processes have saved in `directory`, on any tier. piece: the part that the table is.

    A table that did not save it itself must be without updates. Raises what `Table.load` raises; also MismatchError for pieces
    of another table and for a table with updates, CheckpointError when rows are missing.
    """
    own = directory / piece
    whole = bool(piece) or not any(directory.glob("table-*-of-*"))
    if whole and own.is_dir() and (own / "table.safetensors").exists() == (table.place is None):
        table.load(own, clock)
        return
    table.begin(again=True)
    if table.clock:
        where = table.place or "the table"
        raise MismatchError(
            f"{where} holds {table.clock} updates, but the rows of {directory} are divided in another way and would be mixed "
            "with its own. Remove it, and it is made again from them."
        )
    first = table.form.first
    missing = table.num_rows
    for source in _sources(directory, clock):
        if (replace(source.form, first=0), source.digest) != (replace(table.form, first=0), table.digest):
            raise MismatchError(
                f"{source.file.path} holds {source.form} of the plan {source.digest!r} where this run has {table.form} of "
                f"{table.digest!r}: its bytes would have meant other numbers."
            )
        offset = source.form.first - first  # of its row 0, counted from ours
        ours = range(max(0, offset), min(table.num_rows, offset + source.num_rows))
        missing -= len(ours)
        for ids, records in source.written(rows=range(ours.start - offset, ours.stop - offset)):
            kept = ever_written(records)
            table.restore(torch.from_numpy(ids[kept] + offset), torch.from_numpy(records[kept]))
    if missing:
        raise CheckpointError(
            f"{directory}: {missing:,} of {table.num_rows:,} rows from number {first:,} are not there."
        )
    table.clock = clock


def _sources(directory: Path, clock: int) -> Iterator[Newest]:
    """The pieces, each open while it is read."""
    for place in sorted(directory.glob("table-*-of-*")) or [directory]:
        path = place / "table.safetensors"
        if (elsewhere := place / "table.txt").exists():
            path = place / elsewhere.read_text(encoding="utf-8")
        with ExitStack() as stack:
            try:
                file = stack.enter_context(TableFile.open(path))
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); its rows are missing.") from None
            source = Newest(file, clock)
            stack.callback(source.close)
            yield source
