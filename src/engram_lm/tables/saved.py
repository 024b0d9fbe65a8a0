"""Records in memory, written to a table file and read back: how a table in memory is part of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import MismatchError
from .file import TableFile
from .rows import RowFormat

CHUNK = 1 << 26  # bytes written or read at a time


def save_records(path: Path, records: np.ndarray, form: RowFormat, digest: str) -> None:
    """Write records [N, stride] as a new table file; blocks that were never written take no space in it."""
    with TableFile.create(path, len(records), form, digest=digest) as file:
        step = max(1, CHUNK // form.stride // file.block_rows) * file.block_rows
        for first in range(0, len(records), step):
            file.write(first, records[first : first + step])


def load_records(path: Path, records: np.ndarray, form: RowFormat, digest: str) -> None:
    """Fill records [N, stride] from a table file. Raises MismatchError when it is another's, DataError when it is damaged."""
    with TableFile.open(path, digest=digest) as file:
        require(file, form, len(records))
        done = 0
        for numbers in file.written():
            runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
            for run in runs:
                first, last = int(run[0]) * file.block_rows, min((int(run[-1]) + 1) * file.block_rows, len(records))
                clear(records[done:first])
                blocks = file.blocks(run)
                records[first:last] = blocks.reshape(-1, blocks.shape[-1])[: last - first]
                done = last
        clear(records[done:])


def clear(records: np.ndarray) -> None:
    """Zero records [n, stride], where they are not: memory that was never touched stays so."""
    step = max(1, CHUNK // records.shape[1])
    for first in range(0, len(records), step):
        if records[first : first + step].any():
            records[first : first + step] = 0


def require(file: TableFile, form: RowFormat, num_rows: int) -> None:
    """Raise MismatchError unless the file holds `num_rows` rows of this format."""
    for what, expected, found in (
        ("rows of the format", form, file.form),
        ("rows", f"{num_rows:,}", f"{file.num_rows:,}"),
    ):
        if expected != found:
            raise MismatchError(
                f"{file.path} holds {found} where this run has {expected} ({what}): its bytes would have meant other numbers."
            )
