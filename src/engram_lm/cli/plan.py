"""`engram-lm plan`: what a table costs on many ranks, before there are any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid
from tyro.conf import Positional

from ..config import to_dict
from ..errors import ConfigError
from ..study.growth import Growth, Simulation, measure_growth, simulate
from ..study.plan import Machine, Placement, Prices, Tables, place
from ..tables.rows import Encoding
from ..train.sources import Document, read_documents, standard_library

if TYPE_CHECKING:
    from tokenizers import Tokenizer

V41 = "deepseek-v41"


@dataclass(frozen=True)
class Column:
    """One table on one number of ranks. found: by hashing, if that was asked for and the text suffices."""

    plan: Placement
    found: Simulation | None = None


@dataclass(frozen=True)
class Plan:
    """Scale on paper: engram-lm plan deepseek-v41 --data texts/ --ranks 8 64 --scale 1 10

    Bytes a token over the network and the bus, time at given bandwidths, memory a rank, and the price of HBM, DRAM and NVMe, for
    one table spread over the ranks. How many different rows a batch reads is counted in your text; beyond the text a power law
    goes on, and figures that rest on it are marked ~. Nothing overlaps in the times: what prefetch hides comes off.
    """

    model: Positional[str] = V41
    """deepseek-v41 (2 x 384 M rows), or a preset or configuration file with a memory."""
    rows: int | None = None
    """Rows of all layers together, such as 1_000_000_000. This and the next five change the model's tables."""
    dim: int | None = None
    """Numbers a row."""
    encoding: Encoding | None = None
    """Of a row. Default: fp8_e8m0 for deepseek-v41, fp32 for others."""
    orders: tuple[int, ...] | None = None
    """Of the n-grams."""
    heads: int | None = None
    """Hash functions an order."""
    layers: int | None = None
    """Memory layers."""
    scale: tuple[float, ...] = (1.0,)
    """So many times the rows of every head; a column each."""
    serving: bool = False
    """Rows are only read: no gradients, no accumulators, nothing is written."""

    ranks: tuple[int, ...] = (8, 64)
    """Processes that the table is spread over; a column each."""
    tokens: int = 8192
    """Tokens of a rank's batch."""
    length: int = 4096
    """Tokens of a sequence."""
    cached: float = 0.0
    """Of a table on NVMe: share of a step's rows that are in RAM already. benchmarks/cache_curve.py measures it."""

    data: str = ""
    """Text like what will be read, a source as in train.
    Default: the source of Python's standard library, which repeats itself more than prose."""
    characters: int = 32_000_000
    """Read so many characters of it at most."""
    tokenizer: str = ""
    """tokenizer.json, a directory that holds one, or a hub name. Default: train a byte-level BPE of the model's size on the text."""
    draws: int = 8
    """Batches that are counted of each size."""
    simulate: bool = False
    """Also hash a real batch for every rank, and say how far the figures are off."""
    seed: int = 0
    """Of the places in the text that batches are taken from."""

    machine: Machine = field(default_factory=Machine)
    prices: Prices = field(default_factory=Prices)
    json: Path | None = None
    """Also write all figures to this file."""

    def run(self, console: Console) -> int:
        """Count, calculate, print, write."""
        from ..model.lookup import build_vocabulary
        from ..train.shards import split_in_memory

        tables = self.tables()
        wanted = list(product([tables.scaled(factor) for factor in self.scale], self.ranks))
        for ranks in self.ranks:
            self.machine.ranks_a_node(ranks)  # refused now rather than after the counting
        tokenizer, source = self.text(tables, console)
        asked: dict[str, Any] = {"batch": self.tokens, "length": self.length, "seed": self.seed}
        with console.status(f"Counting n-grams of {source}"):
            split = split_in_memory(first_documents(source, self.characters), tokenizer)
            vocabulary = build_vocabulary(tables.hash, tokenizer)
            largest = [self.tokens * ranks for ranks in self.ranks]
            growth = measure_growth(split, vocabulary, tables.hash, largest=largest, draws=self.draws, **asked)
        columns = [Column(self.place(scaled, growth, ranks)) for scaled, ranks in wanted]
        if self.simulate:
            with console.status("Hashing a batch for every rank"):
                columns = [
                    replace(column, found=simulate(split, vocabulary, scaled.hash, ranks=ranks, **asked))
                    if growth.reaches(self.tokens * ranks)
                    else column
                    for column, (scaled, ranks) in zip(columns, wanted, strict=True)
                ]
        console.print(
            f"{source}: {growth.text_tokens:,} tokens of a vocabulary of {tokenizer.get_vocab_size():,}, "
            f"{vocabulary.size:,} as the memory sees it",
            soft_wrap=True,
            highlight=False,
        )
        print_growth(growth, console)
        print_columns(columns, console)
        if self.simulate:
            print_simulations(columns, console)
        if self.json:
            facts = {"growth": growth, "machine": self.machine, "prices": self.prices, "columns": columns}
            plain = {"text": source} | {name: to_dict(fact) for name, fact in facts.items()}
            self.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        return 0

    def place(self, tables: Tables, growth: Growth, ranks: int) -> Placement:
        """One column's figures."""
        return place(
            tables,
            growth,
            ranks=ranks,
            tokens=self.tokens,
            machine=self.machine,
            prices=self.prices,
            cached=self.cached,
        )

    def tables(self) -> Tables:
        """What is asked about, at scale 1."""
        from . import load_config

        base = Tables.deepseek_v41() if self.model == V41 else Tables.of(self.model, load_config(self.model).model)
        shape: dict[str, Any] = {"orders": self.orders, "heads": self.heads}
        if self.layers is not None:
            shape["layers"] = tuple(range(self.layers))
        if self.orders is not None:
            shape["rows_per_head"] = base.hash.rows_by_order[0]
        hashing = replace(base.hash, **_given(shape))
        if self.rows is not None:
            hashing = hashing.sized(rows=self.rows)
        form = replace(base.form, **_given({"dim": self.dim, "encoding": self.encoding}), trainable=not self.serving)
        changed = hashing != base.hash or (form.dim, form.encoding) != (base.form.dim, base.form.encoding)
        return replace(base, name=f"like {base.name}" if changed else base.name, hash=hashing, form=form)

    def text(self, tables: Tables, console: Console) -> tuple[Tokenizer, str]:
        """The tokenizer and the source."""
        from ..train.tokenizer import load_tokenizer, train_tokenizer

        source = self.data or standard_library()
        if self.characters < 1:
            raise ConfigError(f"no text would be read of --characters {self.characters}.")
        if self.tokenizer:
            return load_tokenizer(self.tokenizer), source
        with console.status(f"Training a tokenizer of {tables.vocab_size:,} tokens on {source}"):
            texts = (document.text for document in first_documents(source, self.characters))
            return train_tokenizer(texts, tables.vocab_size), source


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def first_documents(source: str, characters: int) -> Iterator[Document]:
    """Documents of a source until they have so many characters; the last one is cut."""
    for document in read_documents(source):
        yield replace(document, text=document.text[:characters])
        characters -= len(document.text)
        if characters <= 0:
            return


# --- what is printed ------------------------------------------------------------------------------------------------


def print_growth(growth: Growth, console: Console) -> None:
    """Distinct n-grams by the batch's tokens and the n-gram's order."""
    grid = Grid(box=None, pad_edge=False)
    grid.add_column("tokens", justify="right")
    for order in growth.orders:
        grid.add_column(f"{order}-grams", justify="right")
    for tokens, mean, spread in zip(growth.tokens, growth.mean, growth.spread, strict=True):
        cells = (f"{m / 1e3:,.2f} ± {s / 1e3:.2f} ({m / tokens:.0%})" for m, s in zip(mean, spread, strict=True))
        grid.add_row(f"{tokens:,}", *cells)
    grid.add_row("beyond", *(f"tokens^{exponent:.3f}" for exponent in growth.exponents))
    console.print(
        f"\nDistinct n-grams of a batch, in thousands: mean of {growth.draws} batches ± standard deviation, share of tokens"
    )
    console.print(grid)


def print_columns(columns: list[Column], console: Console) -> None:
    """A column for each table and number of ranks."""
    plans = [column.plan for column in columns]
    grid = Grid(box=None, pad_edge=False)
    grid.add_column("a rank and step, unless said otherwise")
    for plan in plans:
        grid.add_column(f"{plan.name}\n{plan.ranks} ranks", justify="right")
    for line in zip(*map(lines, plans), strict=True):
        grid.add_row(line[0][0], *(value for _, value in line))
    console.print()
    console.print(grid)
    if any(plan.everywhere_extrapolated for plan in plans):
        console.print("~ rests on larger batches than half of the text: rather too much")
    console.print("$ at assumed prices, see --help; nothing overlaps in the times", highlight=False)


def lines(plan: Placement) -> list[tuple[str, str]]:
    """Label and value of each line; empty ones part the sections."""
    own, all_ = "~" * plan.distinct_extrapolated, "~" * plan.everywhere_extrapolated
    sent, tokens = plan.sent, plan.tokens
    dense = "not known" if plan.dense_bytes is None else size(plan.dense_bytes)
    times = plan.tiers[-1].seconds
    return [
        ("rows of the table", f"{plan.num_rows:,}"),
        ("size of the table", size(plan.table_bytes)),
        ("  of it on a rank", size(plan.rank_bytes)),
        ("  a step's rows in float32, and gradients", own + size(plan.step_bytes)),
        ("", ""),
        ("rows read by tokens", f"{plan.reads:,}"),
        ("distinct rows", f"{own}{plan.distinct:,.0f} ({plan.distinct / plan.reads:.0%})"),
        ("distinct rows of all ranks together", f"{all_}{plan.everywhere:,.0f}"),
        ("rows asked of the busiest owner, over the mean", f"{own}{plan.busiest:.3f}"),
        ("", ""),
        ("sent to other ranks", own + size(sent.total)),
        ("  numbers of rows", own + size(sent.ids)),
        ("  rows", own + size(sent.rows)),
        ("  gradients", own + size(sent.grads)),
        ("sent if each read were sent for itself", size(plan.sent_undeduplicated.total)),
        ("sent to sum the dense gradients", dense),
        ("bytes a token to other ranks", f"{own}{sent.total / tokens:,.0f}"),
        ("bytes a token over the network", f"{own}{plan.network_bytes / tokens:,.0f}"),
        ("bytes a token over the bus, from DRAM or NVMe", f"{own}{plan.bus_bytes / tokens:,.0f}"),
        ("rows read from NVMe", f"{all_}{plan.disk_reads:,.0f}"),
        ("", ""),
        ("time: network", own + milliseconds(times.network)),
        ("time: within the node", own + milliseconds(times.inside)),
        ("time: bus", own + milliseconds(times.bus)),
        ("time: DRAM", all_ + milliseconds(times.ram)),
        ("time: NVMe", all_ + milliseconds(times.disk)),
        *(
            (
                f"{tier.name}: price of the table, time a step",
                f"{dollars(tier.price)}, {milliseconds(tier.seconds.total)}",
            )
            for tier in plan.tiers
        ),
    ]


def print_simulations(columns: list[Column], console: Console) -> None:
    """What real batches ask for, and how far the plan is from it."""
    for plan, found in ((column.plan, column.found) for column in columns):
        said = "the text is too short to hash a batch for each"
        if found is not None:
            said = (
                f"hashed {found.distinct:,.0f} distinct rows a rank (the plan is {plan.distinct / found.distinct - 1:+.2%} off), "
                f"{found.everywhere:,} of all ranks ({plan.everywhere / found.everywhere - 1:+.2%}), "
                f"busiest owner {found.busiest:.3f}"
            )
        console.print(f"{plan.name}, {plan.ranks} ranks: {said}", soft_wrap=True, highlight=False)


def size(count: float) -> str:
    """`205.8 GB`: four digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def dollars(price: float) -> str:
    """`$ 41,166`, `$ 0.02`."""
    return f"$ {price:,.0f}" if price >= 100 else f"$ {price:.2f}"


def milliseconds(seconds: float) -> str:
    """`12.3 ms`."""
    return f"{1e3 * seconds:,.3g} ms"
