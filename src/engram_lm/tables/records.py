"""Records of a table a portion at a time, from wherever they are: to convert them, count them or send them elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..errors import DataError
from ..kernels.reads import Reader
from . import codec
from .file import PIECE, TableFile
from .journal import Journal, journal_path
from .rows import BLOCK, Encoding, RowFormat

Records = tuple[np.ndarray, np.ndarray]  # ids [n] int64, ascending, and their records [n, stride] uint8
PLAIN: dict[str, Encoding] = {"F32": "fp32", "F16": "fp32", "BF16": "bf16", "F8_E4M3": "fp8_e8m0"}


class Newest:
    """The rows of a table file as they are now, or were at commit `clock`: its own, and newer ones in the journal beside it."""

    def __init__(self, file: TableFile, clock: int | None = None) -> None:
        self.file, self.num_rows, self.form, self.trainable = file, file.num_rows, file.form, file.form.trainable
        self.digest, self.facts, self.clock = file.digest, file.facts, file.clock
        self.reader, self.journal = Reader(), None
        self.changed, self.offsets = np.empty(0, np.int64), np.empty(0, np.int64)
        if journal_path(file).exists():
            self.journal = Journal(file, self.reader)
            self.clock = self.journal.clock if clock is None else clock
            self.changed, self.offsets = self.journal.newest(self.clock)

    def written(self, *, every: bool = False, rows: range | None = None) -> Iterator[Records]:
        """All rows that were ever written, and others in the same blocks; or every row. Raises DataError for damaged ones.

        rows: only those, and no other block is read.
        """
        file = self.file
        in_file = [*file.written(), self.changed[:0]]
        numbers = np.union1d(np.concatenate(in_file), self.changed // file.block_rows)
        if every:
            numbers = np.arange(file.num_blocks)
        rows = range(self.num_rows) if rows is None else rows
        numbers = numbers[(numbers >= rows.start // file.block_rows) & (numbers * file.block_rows < rows.stop)]
        for first in range(0, len(numbers), file.piece):
            some = numbers[first : first + file.piece]
            ids = (some[:, None] * file.block_rows + np.arange(file.block_rows)).reshape(-1)
            ids = ids[ids < file.num_rows]
            records = file.blocks(some).reshape(-1, self.form.stride)[: len(ids)]
            if self.journal:
                newer = slice(*np.searchsorted(self.changed, (ids[0], ids[-1] + 1)))
                fresh = np.empty((newer.stop - newer.start, self.form.stride), np.uint8)
                self.reader.read(self.journal.descriptor, self.offsets[newer], fresh)
                records[np.searchsorted(ids, self.changed[newer])] = fresh
            inside = slice(*np.searchsorted(ids, (rows.start, rows.stop)))
            yield ids[inside], records[inside]

    def close(self) -> None:
        """Release the journal; the file stays open."""
        if self.journal:
            self.journal.close()
        self.reader.close()


class Plain:
    """The rows of a safetensors file that is no table. `tensor` names them, or is "" when only one tensor can be meant.

    Raises DataError when it is not there or not one.
    """

    digest, clock, trainable = "", 0, True

    def __init__(self, path: Path, tensor: str) -> None:
        self.facts: dict[str, str] = {}
        file = safe_open(path, "pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        candidates = {name: parts for name in slices if (parts := self._parts(name, slices))}
        chosen = [tensor] if tensor else list(candidates)
        if len(chosen) != 1 or chosen[0] not in candidates:
            what = f"has no rows called {tensor!r}" if tensor else "does not say which tensor holds the rows"
            raise DataError(
                f"{path}: {what}; of float tensors [rows, dim] it has {', '.join(candidates) or 'none'}. Name one with --tensor."
            )
        self.parts = candidates[chosen[0]]
        self.num_rows, dim = self.parts[0].get_shape()
        self.form = RowFormat(dim, PLAIN[self.parts[0].get_dtype()], trainable=False)

    def _parts(self, name: str, slices: dict[str, Any]) -> list[Any]:
        """Slices of the tensors that together are rows, or none."""
        shape, dtype = slices[name].get_shape(), slices[name].get_dtype()
        if len(shape) != 2 or 0 in shape or dtype not in PLAIN:
            return []
        if dtype != "F8_E4M3":
            return [slices[name]]
        scale = slices.get(f"{name.removesuffix('.weight')}.scale")
        fits = scale and scale.get_dtype() == "F8_E8M0" and scale.get_shape() == [shape[0], -(-shape[1] // BLOCK)]
        return [slices[name], scale] if fits else []

    def written(self, *, every: bool = False) -> Iterator[Records]:
        """Every row."""
        step = max(1, PIECE // self.form.stride)
        for first in range(0, self.num_rows, step):
            ids = np.arange(first, min(first + step, self.num_rows))
            parts = [part[first : first + len(ids)] for part in self.parts]
            data = [(part.float() if part.dtype == torch.float16 else part).view(torch.uint8).numpy() for part in parts]
            records = np.zeros((len(ids), self.form.stride), np.uint8)
            records[:, : sum(part.shape[1] for part in data)] = np.concatenate(data, axis=1)
            yield ids, records


def convert(source: Newest | Plain, target: TableFile, progress: Callable[[int, int], None]) -> None:
    """Write the rows of `source` into `target`, in its format, rounded to the nearest."""
    old, new = source.form, target.form
    every = old.std > 0 and not new.trainable  # rows that were never written have numbers that only the source knows
    same = old.encoding == new.encoding
    for ids, records in source.written(every=every):
        kept = ever_written(records)
        rounded = ~kept & every if same else kept | every
        out = np.zeros((len(ids), new.stride), np.uint8)
        if same:
            out[kept, : new.row_bytes] = records[kept, : old.row_bytes]
        out[rounded, : new.row_bytes] = codec.encode(new, codec.decoded(old, ids[rounded], records[rounded]))
        if new.trainable and old.trainable:
            out[:, new.row_bytes :] = records[:, old.row_bytes :]
        edges = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
        for lo, hi in pairwise(edges):
            target.write(int(ids[lo]), out[lo:hi])
        progress(int(ids[-1]) + 1, source.num_rows)


def ever_written(records: np.ndarray) -> np.ndarray:
    """[n] bool: whether rows were ever written."""
    return np.asarray((np.ascontiguousarray(records).view(np.uint32) != 0).any(1))
