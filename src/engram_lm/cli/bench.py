"""`engram-lm bench WHAT`: ours and others' in one run; a table, JSON, a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar

from rich.console import Console
from tyro.conf import OmitArgPrefixes, subcommand

from ..bench import Results
from ..model.presets import get_preset
from ..train.loop import TrainConfig
from ..train.sources import standard_library

FEW = str(Path(standard_library()) / "asyncio")  # text enough for --quick


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What every benchmark is asked for. `smallest`: what --quick sets."""

    rounds: int = 25
    """Times that every contender is measured, in turn with the others."""
    quick: bool = False
    """Smallest sizes, to see that it runs; the figures mean nothing."""
    json: Path | None = None
    """Also write all figures to this file."""
    plot: Path | None = None
    """Also draw them, as .png or .svg."""
    smallest: ClassVar[dict[str, Any]] = {}

    def measure(self) -> Results:
        """Take the figures."""
        raise NotImplementedError

    def run(self, console: Console) -> int:
        """Measure, print, write."""
        chosen = replace(self, rounds=2, **self.smallest) if self.quick else self
        results = chosen.measure()
        console.print(results)
        if self.json:
            self.json.write_text(json.dumps(results.json(), indent=1) + "\n", encoding="utf-8")
        if self.plot:
            from ..report.plots import bench_bars

            bench_bars(results.json(), self.plot)
        return 0


@dataclass(frozen=True, kw_only=True)
class Hash(Measurement):
    """Tokens hashed a second: DeepSeek-V4.1's layout, 2 layers x 24 ids a token."""

    tokens: tuple[int, ...] = (16_384, 65_536)
    """Tokens a call."""
    smallest: ClassVar[dict[str, Any]] = {"tokens": (512,)}

    def measure(self) -> Results:
        """See `bench_hash`."""
        from ..bench.hash import bench_hash

        return bench_hash(tokens=self.tokens, rounds=self.rounds)


@dataclass(frozen=True, kw_only=True)
class Gather(Measurement):
    """Rows gathered a second: random rows of a table in RAM that no cache holds."""

    gigabytes: float = 6
    """Size of the table."""
    row_bytes: tuple[int, ...] = (264, 320)
    """Bytes of a row, multiples of 8."""
    rows: tuple[int, ...] = (8_192, 32_768, 131_072)
    """Rows a call."""
    smallest: ClassVar[dict[str, Any]] = {"gigabytes": 0.01, "row_bytes": (264,), "rows": (1024,)}

    def measure(self) -> Results:
        """See `bench_gather`."""
        from ..bench.gather import bench_gather

        return bench_gather(gigabytes=self.gigabytes, row_bytes=self.row_bytes, rows=self.rows, rounds=self.rounds)


@dataclass(frozen=True, kw_only=True)
class Update(Measurement):
    """Milliseconds to fetch rows, apply the optimizer and write them back, by size of the table."""

    table_rows: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    """Rows of the tables; those too large for this machine's RAM are left out."""
    rows: int = 20_000
    """Rows a step."""
    dim: int = 32
    """Floats a row."""
    smallest: ClassVar[dict[str, Any]] = {"table_rows": (2000, 4000), "rows": 100}

    def measure(self) -> Results:
        """See `bench_update`."""
        from ..bench.update import bench_update

        return bench_update(table_rows=self.table_rows, rows=self.rows, dim=self.dim, rounds=self.rounds)


@dataclass(frozen=True, kw_only=True)
class Step(Measurement):
    """Milliseconds of training steps: without memory, with it, with larger tables, and without prefetch."""

    rounds: int = 12
    """Times that every arm takes four steps, in turn with the others."""
    model: str = "tiny"
    """Preset."""
    data: str = ""
    """Text to train on. Default: the source of Python's standard library."""
    growth: tuple[int, ...] = (8, 64)
    """Further arms, with tables so many times as large."""
    batch_size: int = TrainConfig.batch_size
    """Sequences a step."""
    length: int = TrainConfig.length
    """Tokens a sequence."""
    smallest: ClassVar[dict[str, Any]] = {"data": FEW, "growth": (2,), "batch_size": 2, "length": 16}

    def measure(self) -> Results:
        """See `bench_step`."""
        from ..bench.step import bench_step

        config = TrainConfig(get_preset(self.model), batch_size=self.batch_size, length=self.length)
        with TemporaryDirectory() as scratch:
            return bench_step(
                config, self.data or standard_library(), Path(scratch), growth=self.growth, rounds=self.rounds
            )


@dataclass(frozen=True, kw_only=True)
class Decode(Measurement):
    """Tokens a second, one after the other, with the table in RAM and on disk."""

    rounds: int = 12
    """Times that every tier is measured, in turn with the others."""
    model: str = "tiny"
    """Preset."""
    data: str = ""
    """Text to read. Default: the source of Python's standard library."""
    gigabytes: float = 2
    """Size that the table is made."""
    cache: float = 0.25
    """GB of RAM in which a table on disk keeps hot rows."""
    tokens: int = 128
    """Tokens a measurement."""
    directory: Path | None = None
    """Where the table file is written, and so which disk is measured. Default: the system's directory for such files."""
    smallest: ClassVar[dict[str, Any]] = {"data": FEW, "gigabytes": 0.001, "cache": 0.0001, "tokens": 4}

    def measure(self) -> Results:
        """See `bench_decode`."""
        from ..bench.decode import bench_decode

        with TemporaryDirectory(dir=self.directory) as scratch:
            return bench_decode(
                get_preset(self.model),
                self.data or standard_library(),
                Path(scratch),
                gigabytes=self.gigabytes,
                cache=self.cache,
                tokens=self.tokens,
                rounds=self.rounds,
            )


@dataclass(frozen=True)
class Bench:
    """Measure what things cost here, beside what others' cost, in one run."""

    what: OmitArgPrefixes[
        Annotated[Hash, subcommand("hash", prefix_name=False)]
        | Annotated[Gather, subcommand("gather", prefix_name=False)]
        | Annotated[Update, subcommand("update", prefix_name=False)]
        | Annotated[Step, subcommand("step", prefix_name=False)]
        | Annotated[Decode, subcommand("decode", prefix_name=False)]
    ]

    def run(self, console: Console) -> int:
        """Of the one that was chosen."""
        return self.what.run(console)
