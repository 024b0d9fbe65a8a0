"""`engram-lm table`: make table files, look into them, check them, convert them; block by block, whatever their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Union

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Grid
from safetensors import SafetensorError, safe_open
from tyro.conf import Positional, arg, subcommand

from ..errors import ConfigError, DataError
from ..kernels import compiled
from ..kernels.reads import Reader
from ..tables import rows as truth
from ..tables.disk import FileStore
from ..tables.file import FORMAT, PIECE, TableFile
from ..tables.journal import Journal, journal_path
from ..tables.rows import BLOCK, Encoding, RowFormat

Rows = tuple[np.ndarray, np.ndarray]  # ids [n] int64, ascending, and their records [n, stride] uint8
PLAIN: dict[str, Encoding] = {"F32": "fp32", "F16": "fp32", "BF16": "bf16", "F8_E4M3": "fp8_e8m0"}


@dataclass(frozen=True)
class Create:
    """Make an empty table file. It takes no disk space until rows are written; they read as zeros, or as N(0, std)."""

    path: Positional[Path]
    """File to make."""
    preset: str = ""
    """Preset or configuration file whose memory says how many rows there are and how wide."""
    tokenizer: str = ""
    """With --preset: tokenizer.json, a directory that holds one, or a hub name. Binds the table to the plan and vocabulary
    that follow from both. Default: a table that is bound to none."""
    rows: int = 0
    """Without --preset: number of rows."""
    dim: int = 0
    """Without --preset: numbers in a row."""
    encoding: Encoding = "fp32"
    """Of a row; all but fp32 are trained with stochastic rounding."""
    std: float = 0.0
    """Spread of rows that were never written."""
    seed: int = 0
    """Of those rows and of stochastic rounding."""
    serving: bool = False
    """Leave out the accumulators: rows can be written, but not trained."""

    def run(self, console: Console) -> int:
        """Create, print."""
        rows, dim, digest = self.rows, self.dim, ""
        if self.preset:
            if rows or dim:
                raise ConfigError("--preset says how many rows there are and how wide: leave out --rows and --dim.")
            rows, dim, digest = sizes_of(self.preset, self.tokenizer)
        elif self.tokenizer:
            raise ConfigError("--tokenizer binds a table to the plan of a --preset: name one.")
        form = RowFormat(dim, self.encoding, trainable=not self.serving, std=self.std, seed=self.seed)
        with TableFile.create(self.path, rows, form, digest=digest) as file:
            _say(console, description(file))
        return 0


@dataclass(frozen=True)
class Inspect:
    """Print what a table file says about itself, and what it takes on disk."""

    path: Positional[Path]
    """Table file."""

    def run(self, console: Console) -> int:
        """Open, print."""
        with TableFile.open(self.path) as file:
            _say(console, description(file))
        return 0


@dataclass(frozen=True)
class Verify:
    """Compare every block of rows with its checksum, and a journal with its own. Exit code 1 when anything is damaged."""

    path: Positional[Path]
    """Table file."""

    def run(self, console: Console) -> int:
        """Read everything, print each damaged block."""
        with TableFile.open(self.path) as file:
            with _bar(console, "verifying") as progressed:
                damaged = file.verify(progressed)
            for damage in damaged:
                _say(console, f"damaged: {damage}")
            some = f"{len(damaged):,} of " if damaged else "all "
            _say(console, f"{self.path}: {some}{file.num_blocks:,} blocks are {'damaged' if damaged else 'intact'}")
            if not damaged:
                Newest(file).close()  # a journal is checked when it is opened
        return 1 if damaged else 0


@dataclass(frozen=True)
class Convert:
    """Write a table in another encoding, or without its accumulators; or make one of plain rows in a safetensors file.

    Plain rows are one tensor of F32, BF16 or F16 [rows, dim], or DeepSeek-V4.1's two: NAME.weight F8_E4M3 [rows, dim] and
    NAME.scale F8_E8M0 [rows, dim / 32]. Rows are rounded to the nearest; in an encoding that they have already they keep every
    bit. The newest rows are taken, those in a journal included. TARGET appears when it is complete.
    """

    source: Positional[Path]
    """Table file, or safetensors file with plain rows."""
    target: Positional[Path]
    """Table file to make."""
    encoding: Encoding | None = None
    """Of the target. Default: that of the source; fp32 for F16."""
    serving: bool = False
    """Leave out the accumulators. Rows that were never written are written as what they read as."""
    tensor: str = ""
    """The rows, where a safetensors file has several tensors that could be."""
    digest: str = ""
    """Bind the target to this plan and vocabulary. Default: those of the source."""

    def run(self, console: Console) -> int:
        """Convert, print."""
        with ExitStack() as stack:
            source: Newest | Plain
            if _is_table(self.source):
                source = Newest(stack.enter_context(TableFile.open(self.source)))
                stack.callback(source.close)
            else:
                source = Plain(self.source, self.tensor)
            trainable = source.trainable and not self.serving
            form = RowFormat(
                source.form.dim,
                self.encoding or source.form.encoding,
                trainable,
                std=source.form.std if trainable else 0.0,
                seed=source.form.seed,
            )
            digest = self.digest or source.digest
            draft = TableFile.draft(self.target, source.num_rows, form, digest=digest, facts=source.facts)
            target = stack.enter_context(draft)
            with _bar(console, "converting") as progressed:
                convert(source, target, progressed)
            target.clock = source.clock
            _say(console, description(target.publish()))
        return 0


@dataclass(frozen=True)
class Compact:
    """Apply a journal to its table file, so that the file alone is the table. Checkpoints of the run that trained it then
    come back only to its last commit. Killed on the way, it goes on when the table is next opened for writing."""

    path: Positional[Path]
    """Table file."""

    def run(self, console: Console) -> int:
        """Apply, print."""
        with closing(FileStore(TableFile.open(self.path, write=True))) as store:
            _say(console, f"Applying {store.journal.nbytes / 1e9:.2f} GB of updates, up to clock {store.clock}")
            store.compact()
        with TableFile.open(self.path) as file:
            _say(console, description(file))
        return 0


@dataclass(frozen=True)
class Stats:
    """Print how many rows were ever written, how large they are, and how much they were trained."""

    path: Positional[Path]
    """Table file."""

    def run(self, console: Console) -> int:
        """Read the rows that were written, those in a journal included."""
        norms, moments = Spread(), Spread()
        with TableFile.open(self.path) as file, _bar(console, "reading") as progressed:
            source = Newest(file)
            for ids, records in source.written():
                known = _written(records)
                norms.add(np.linalg.norm(_decoded(file.form, ids[known], records[known]), axis=1))
                if file.form.trainable:
                    moments.add(records[known, file.form.row_bytes :].view(np.float32)[:, 0])
                progressed(int(ids[-1]) + 1, file.num_rows)
            source.close()
        written = norms.count + norms.broken
        _say(console, f"{written:,} of {file.num_rows:,} rows were written ({written / file.num_rows:.2%})")
        if norms.broken:
            _say(console, f"{norms.broken:,} of them hold NaN or infinity")
        if norms.count:
            grid = Grid("", "zeros", "mean", *(f"{share:.0%}" for share in Spread.SHARES), "largest")
            grid.add_row("norm", *norms.cells())
            if file.form.trainable:
                grid.add_row("accumulator", *moments.cells())
            console.print(grid)
        return 0


Command = Union[  # noqa: UP007  (tyro reads it)
    Annotated[Create, subcommand("create")],
    Annotated[Inspect, subcommand("inspect")],
    Annotated[Verify, subcommand("verify")],
    Annotated[Convert, subcommand("convert")],
    Annotated[Compact, subcommand("compact")],
    Annotated[Stats, subcommand("stats")],
]


@dataclass(frozen=True)
class Table:
    """Make, look into, check and convert table files."""

    command: Annotated[Command, arg(name="")]

    def run(self, console: Console) -> int:
        """Run what was chosen."""
        return self.command.run(console)


# --- rows to read ---------------------------------------------------------------------------------------------------


class Newest:
    """The rows of a table file as they are now: its own, and newer ones in the journal beside it."""

    def __init__(self, file: TableFile) -> None:
        self.file, self.num_rows, self.form, self.trainable = file, file.num_rows, file.form, file.form.trainable
        self.digest, self.facts, self.clock = file.digest, file.facts, file.clock
        self.reader, self.journal = Reader(), None
        self.changed, self.offsets = np.empty(0, np.int64), np.empty(0, np.int64)
        if journal_path(file).exists():
            self.journal = Journal(file, self.reader)
            self.clock = self.journal.clock
            self.changed, self.offsets = self.journal.newest(self.clock)

    def written(self, *, every: bool = False) -> Iterator[Rows]:
        """All rows that were ever written, and others in the same blocks; or every row. Raises DataError for damaged ones."""
        file = self.file
        in_file = [*file.written(), self.changed[:0]]
        numbers = np.union1d(np.concatenate(in_file), self.changed // file.block_rows)
        if every:
            numbers = np.arange(file.num_blocks)
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
            yield ids, records

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

    def written(self, *, every: bool = False) -> Iterator[Rows]:
        """Every row."""
        step = max(1, PIECE // self.form.stride)
        for first in range(0, self.num_rows, step):
            ids = np.arange(first, min(first + step, self.num_rows))
            parts = [part[first : first + len(ids)] for part in self.parts]
            data = [(part.float() if part.dtype == torch.float16 else part).view(torch.uint8).numpy() for part in parts]
            records = np.zeros((len(ids), self.form.stride), np.uint8)
            records[:, : sum(part.shape[1] for part in data)] = np.concatenate(data, axis=1)
            yield ids, records


def convert(source: Newest | Plain, target: TableFile, progressed: Callable[[int, int], None]) -> None:
    """Write the rows of `source` into `target`, in its format, rounded to the nearest."""
    old, new = source.form, target.form
    every = old.std > 0 and not new.trainable  # rows that were never written have numbers that only the source knows
    same = old.encoding == new.encoding
    for ids, records in source.written(every=every):
        written = _written(records)
        rounded = ~written & every if same else written | every
        out = np.zeros((len(ids), new.stride), np.uint8)
        if same:
            out[written, : new.row_bytes] = records[written, : old.row_bytes]
        out[rounded, : new.row_bytes] = _encoded(new, _decoded(old, ids[rounded], records[rounded]))
        if new.trainable and old.trainable:
            out[:, new.row_bytes :] = records[:, old.row_bytes :]
        edges = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
        for lo, hi in pairwise(edges):
            target.write(int(ids[lo]), out[lo:hi])
        progressed(int(ids[-1]) + 1, source.num_rows)


def _written(records: np.ndarray) -> np.ndarray:
    """[n] bool: whether rows were ever written."""
    return np.asarray((np.ascontiguousarray(records).view(np.uint32) != 0).any(1))


def _decoded(form: RowFormat, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Rows [n, dim] float32."""
    slots = np.arange(len(ids))
    if not compiled():
        return truth.read_rows(form, *map(torch.from_numpy, (records, slots, ids))).numpy()
    from ..kernels.rows import read_rows

    rows = np.empty((len(ids), form.dim), np.float32)
    read_rows(form, records, slots, ids, rows)
    return rows


def _encoded(form: RowFormat, rows: np.ndarray) -> np.ndarray:
    """Bytes [n, row_bytes] of rows [n, dim]."""
    if not compiled():
        return truth.encode(form, torch.from_numpy(rows)).numpy()
    from ..kernels.rows import encode

    data = np.empty((len(rows), form.row_bytes), np.uint8)
    encode(form, rows, data)
    return data


# --- what is printed ------------------------------------------------------------------------------------------------


class Spread:
    """Mean and quantiles of numbers from 0 that come in portions: a histogram with 64 bins an octave."""

    SHARES = (0.01, 0.1, 0.5, 0.9, 0.99)

    def __init__(self) -> None:
        self.count, self.zeros, self.broken, self.total, self.largest = 0, 0, 0, 0.0, 0.0
        self.bins = np.zeros(300 * 64, np.int64)  # 2^-150 to 2^150

    def add(self, numbers: np.ndarray) -> None:
        """Numbers [n]; those that are not finite are only counted."""
        finite = numbers[np.isfinite(numbers)].astype(np.float64)
        positive = finite[finite > 0]
        self.broken += len(numbers) - len(finite)
        self.count += len(finite)
        self.zeros += len(finite) - len(positive)
        self.total += float(positive.sum())
        self.largest = max(self.largest, float(positive.max(initial=0)))
        self.bins += np.bincount((64 * (np.log2(positive) + 150)).astype(np.int64), minlength=len(self.bins))

    def quantile(self, share: float) -> float:
        """The number that so many of the numbers are at most, 0.5 % off at most."""
        rank = share * self.count - self.zeros
        if rank <= 0:
            return 0.0
        return float(2 ** ((np.searchsorted(np.cumsum(self.bins), rank) + 0.5) / 64 - 150))

    def cells(self) -> list[str]:
        """Share of zeros, mean, quantiles, largest."""
        numbers = [self.total / self.count, *(self.quantile(share) for share in self.SHARES), self.largest]
        return [f"{self.zeros / self.count:.1%}", *(f"{number:.3g}" for number in numbers)]


def description(file: TableFile) -> str:
    """What a table file says about itself, and what it takes on disk."""
    form, journal = file.form, journal_path(file)
    status = file.path.stat()
    blocks = np.count_nonzero(file.checksums(0, file.num_blocks))
    lines = {
        "rows": f"{file.num_rows:,} of {form.dim} numbers, {form.encoding}, {form.stride} bytes each",
        "training": f"row-wise Adagrad, {file.clock:,} updates" if form.trainable else "none: no accumulators",
        "untouched rows": f"N(0, {form.std:g}), seed {form.seed}" if form.std else "zeros",
        "size": f"{_bytes(status.st_size)}, of which {_bytes(512 * status.st_blocks)} on disk",
        "blocks": f"{blocks:,} of {file.num_blocks:,} written, {file.block_rows} rows each",
        "plan": file.digest or "none: bound to no plan and vocabulary",
        "journal": f"{_bytes(journal.stat().st_size)}, with newer rows" if journal.exists() else "none",
        **file.facts,
    }
    return "\n".join([str(file.path), *(f"  {name:<15} {value}" for name, value in lines.items())])


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is gone at the end; it is told what is done, and all there is."""
    columns = TextColumn(what), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# --- what is asked for ----------------------------------------------------------------------------------------------


def sizes_of(preset: str, tokenizer: str) -> tuple[int, int, str]:
    """Rows, their width, and the digest of a preset's or configuration's memory; the digest is "" without a tokenizer.

    Raises ConfigError for one without a memory.
    """
    from ..hashing import HashPlan
    from ..model.lookup import address_digest, build_plan, build_vocabulary
    from ..train.tokenizer import load_tokenizer
    from . import load_config

    memory = load_config(preset).model.memory
    if memory is None:
        raise ConfigError(f"{preset} has no memory, so no rows to keep.")
    if tokenizer:
        vocabulary = build_vocabulary(memory.hash, load_tokenizer(tokenizer))
        plan = build_plan(memory.hash, vocabulary)
        return plan.num_rows, memory.engram.row_dim, address_digest(vocabulary, plan)
    plan = HashPlan.build(
        memory.hash, vocab_size=memory.hash.pad_id + 1, pad=memory.hash.pad_id
    )  # sizes know no vocabulary
    return plan.num_rows, memory.engram.row_dim, ""


def _is_table(path: Path) -> bool:
    """Whether to open a file as a table: also if it is damaged or no safetensors file at all, for the reason why."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("format", "").startswith(FORMAT.split("/")[0])
    except (SafetensorError, OSError):
        return True
