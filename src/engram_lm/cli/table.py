"""`engram-lm table`: make table files, look into them, check them, convert, import and export them; whatever their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Grid
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tyro.conf import Positional, arg, subcommand

from ..errors import CheckpointError, ConfigError, DataError, MismatchError
from ..hf.layouts import Layout, LayoutName, layout_of_model, layout_of_table, read_config
from ..hf.shards import Shards
from ..hf.stream import export_table, import_table, import_weights
from ..tables.codec import decoded
from ..tables.disk import FileStore
from ..tables.file import FORMAT, TableFile
from ..tables.journal import journal_path
from ..tables.records import Newest, Plain, convert, ever_written
from ..tables.rows import Encoding, RowFormat


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
            form = source.form.stored_as(self.encoding or source.form.encoding, trainable=trainable)
            digest = self.digest or source.digest
            draft = TableFile.draft(self.target, source.num_rows, form, digest=digest, facts=source.facts)
            target = stack.enter_context(draft)
            with _bar(console, "converting") as progressed:
                convert(source, target, progressed)
            target.clock = source.clock
            _say(console, description(target.publish()))
        return 0


@dataclass(frozen=True)
class Import:
    """Make a table file of the memory of a released model, bit for bit: DeepSeek-V4.1-Flash or Qwen3.8-Flash-Next.

    The release keeps no hash; it follows from config.json (and V4.1's tokenizer), and is compared with all that the config
    says besides: a wrong one would read the wrong row at every token. Of the shards only those with the memory need be
    there (V4.1: 47 and 48). Rows are read a piece at a time and never mapped; OUT appears when it is complete, with a
    checksum a block, as large as the rows of the release: V4.1's 203 GB. Then: engram-lm table verify OUT
    """

    source: Annotated[tuple[Path, ...], arg(name="from")]
    """The model's directory (config.json, model.safetensors.index.json or safetensors files), or safetensors files with a
    config.json beside them."""
    out: Path
    """Table file to make."""
    layout: LayoutName | None = None
    """Default: told by config.json."""
    tokenizer: str = ""
    """tokenizer.json, a directory that holds one, or a hub name. V4.1 hashes words as its tokenizer folds them. Default: the
    tokenizer.json in the model's directory."""
    memory: float = 0.25
    """GB of RAM for pieces on their way."""
    trainable: bool = False
    """Leave room for an accumulator behind each row, so that the table can be trained: 4 bytes a row more."""
    engram: Path | None = None
    """Also write the weights of the memory layers, in float32, as layers.BLOCK.NAME with NAME as in the state dict of an
    Engram. It takes the RAM of those weights (V4.1: 1.3 GB)."""

    def run(self, console: Console) -> int:
        """Compare, stream, print."""
        if self.engram and self.engram.exists():
            raise CheckpointError(f"{self.engram}: exists, and nothing is overwritten; remove it or name another.")
        with Shards(self.source) as shards:
            layout = read_config(shards.directory / "config.json", self.layout or "")
            vocabulary = layout.vocabulary(_tokenizer_of(self.tokenizer, shards.directory))
            layout = layout.found_in(shards)
            weights = import_weights(shards, layout) if self.engram else {}
            with _bar(console, "importing") as progressed:
                table = import_table(
                    shards,
                    layout,
                    vocabulary,
                    self.out,
                    memory=int(self.memory * 1e9),
                    trainable=self.trainable,
                    progress=progressed,
                )
        with table:
            if self.engram:
                save_file(weights, self.engram)
            _say(console, description(table))
        return 0


@dataclass(frozen=True)
class Export:
    """Write a table as a release has it: safetensors shards with its names and types, an index, and a config.json that says
    what the memory is. What was imported comes out bit for bit.

    Rows must be in the layout's encoding: `engram-lm table convert` puts them into it. The newest rows are taken, those
    in a journal included. OUT appears when it is complete.
    """

    path: Positional[Path]
    """Table file."""
    out: Path
    """Directory to make."""
    layout: LayoutName | None = None
    """Default: the layout that the table was imported from."""
    preset: str = ""
    """Of a table that was not imported: the preset or configuration file of its model, which says how it is addressed."""
    tokenizer: str = ""
    """With --preset: tokenizer.json, a directory that holds one, or a hub name. What follows from it is compared with the
    plan and vocabulary that the table is bound to."""
    engram: Path | None = None
    """Weights of the memory layers to go with the rows, as `import --engram` writes them. E4M3 blocks that did not change come
    out bit for bit; all else is rounded to the nearest."""

    def run(self, console: Console) -> int:
        """Compare, stream, print."""
        with TableFile.open(self.path) as table:
            layout = self._layout(table)
            weights = _weights(self.engram) if self.engram else None
            with _bar(console, "exporting") as progressed:
                export_table(table, layout, self.out, weights=weights, progress=progressed)
        files = sorted(path.name for path in self.out.iterdir())
        _say(console, f"{self.out}: layout {layout.name}, {table.num_rows:,} rows in {', '.join(files)}")
        return 0

    def _layout(self, table: TableFile) -> Layout:
        """What the table notes, or what follows from preset and tokenizer. Raises MismatchError when those are not the table's."""
        from ..model.lookup import address_digest, build_vocabulary
        from ..train.tokenizer import load_tokenizer
        from . import load_config

        if not self.preset:
            noted = layout_of_table(table, self.layout or "")
            if noted is None:
                raise ConfigError(
                    f"{self.path}: was not imported from a release, so how it is addressed must be said: name the --layout, the "
                    "model's --preset (or configuration file) and the --tokenizer."
                )
            return noted
        model = load_config(self.preset).model
        if not self.layout or not self.tokenizer or model.memory is None:
            raise ConfigError(
                "--preset must have a memory, and goes with --layout and --tokenizer: its plan follows from them."
            )
        vocabulary = build_vocabulary(model.memory.hash, load_tokenizer(self.tokenizer))
        layout = layout_of_model(self.layout, model, vocabulary)
        digest = address_digest(vocabulary, layout.plan(vocabulary))
        if digest != table.digest:
            raise MismatchError(
                f"{self.path}: belongs to the plan and vocabulary {table.digest or '(none)'}; of {self.preset} and "
                f"{self.tokenizer} follow {digest}: whoever loads the export would read every row from the wrong place."
            )
        return layout


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
                known = ever_written(records)
                norms.add(np.linalg.norm(decoded(file.form, ids[known], records[known]), axis=1))
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
    Annotated[Import, subcommand("import")],
    Annotated[Export, subcommand("export")],
    Annotated[Compact, subcommand("compact")],
    Annotated[Stats, subcommand("stats")],
]


@dataclass(frozen=True)
class Table:
    """Make, look into, check and convert table files; bring in released ones, and give them back."""

    command: Annotated[Command, arg(name="")]

    def run(self, console: Console) -> int:
        """Run what was chosen."""
        return self.command.run(console)


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
        **{name: fact if len(fact) <= 400 else f"{len(fact):,} characters" for name, fact in file.facts.items()},
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


def _tokenizer_of(name: str, directory: Path) -> Tokenizer | None:
    """The tokenizer of that name; without one, that of the model's directory, or none."""
    from ..train.tokenizer import load_tokenizer

    if not name and not (directory / "tokenizer.json").exists():
        return None
    return load_tokenizer(name or directory)


def _weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises DataError when it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: no weights can be read ({error}).") from None


def _is_table(path: Path) -> bool:
    """Whether to open a file as a table: also if it is damaged or no safetensors file at all, for the reason why."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("format", "").startswith(FORMAT.split("/")[0])
    except (SafetensorError, OSError):
        return True
