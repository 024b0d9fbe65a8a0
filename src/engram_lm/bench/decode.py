"""Decoding one token at a time, with the memory's rows in RAM and on disk. Text is replayed, so all arms read the same rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..generate import DecodeState, advance
from ..model.lm import LanguageModel, ModelConfig
from ..model.lookup import Lookup, build_plan, build_vocabulary
from ..tables import DiskTable, HostTable, RowFormat, Table
from ..train.allocator import keep_freed_memory
from ..train.run import prepare_text
from ..train.shards import Split
from .measure import Contender, Meter
from .results import Results

PROMPT = 32  # tokens that are read before the clock starts
WARM = 100_000  # tokens whose rows were used before a table counts as warm
CHUNK = 1 << 18  # rows or tokens at a time


def bench_decode(
    model: ModelConfig,
    data: str,
    directory: Path,
    *,
    gigabytes: float = 2,
    cache: float = 0.25,
    tokens: int = 128,
    rounds: int = 12,
) -> Results:
    """Tokens a second, one sequence, `tokens` at a time, of a fresh `model` whose table is made as large as `gigabytes`.

    The rows are random; the text they are read for is `data`. cache: GB of RAM in which a table on disk keeps hot rows.
    Table and text are written to `directory`, whose disk is what is measured.
    """
    keep_freed_memory()
    meter = Meter("decode", rounds)
    text, tokenizer = prepare_text(data, directory, vocab_size=model.vocab_size, say=lambda _: None)
    if model.memory is None:
        raise ConfigError("bench decode measures where the rows of a memory are best kept; this model has none.")
    form = RowFormat(model.memory.engram.row_dim)
    hashing = model.memory.hash.sized(rows=int(gigabytes * 1e9) // form.stride)
    model = replace(model, memory=replace(model.memory, hash=hashing))
    vocabulary = build_vocabulary(hashing, tokenizer)
    plan = build_plan(hashing, vocabulary)
    network = LanguageModel.build(model).eval()

    with ExitStack() as opened, ExitStack() as last:

        def lookup(table: Table, stack: ExitStack = opened) -> Lookup:
            stack.callback(table.close)
            return Lookup(vocabulary, plan, table)

        def on_disk(memory: float, stack: ExitStack = opened) -> Lookup:
            return lookup(DiskTable(directory / "table.safetensors", memory=int(memory * 1e9)), stack)

        ram = lookup(random_table(plan.num_rows, form))
        ram.table.save(directory)
        warm, bare = on_disk(cache), on_disk(0)
        use(warm, text.train)

        def arm(name: str, lookup: Callable[[], Lookup], note: str = "") -> Contender:
            passages = replay(text.val, tokens)

            def prepare() -> tuple[Lookup, Tensor, DecodeState]:
                chosen, passage = lookup(), next(passages)
                return chosen, passage[:, PROMPT:], advance(network, chosen, passage[:, :PROMPT])[1]

            def right(logits: Tensor, _: Lookup, passage: Tensor, state: DecodeState) -> bool:
                return torch.equal(logits, read(network, ram, passage, state))

            return Contender(name, lambda *given: read(network, *given), right, prepare, note)

        def cold() -> Lookup:
            last.close()
            forget(directory / "table.safetensors")
            return on_disk(cache, last)

        size = f"{plan.num_rows:,} rows, {ram.table.nbytes / 1e9:.1f} GB"
        contenders = [
            arm("in RAM", lambda: ram, size),
            arm("on disk, warm", lambda: warm, f"{cache:g} GB of hot rows in RAM, after {WARM:,} tokens"),
            arm("on disk, cold", cold, "nothing in RAM but the prompt's rows"),
            arm(
                "on disk, no cache",
                lambda: bare,
                "every row read from the file, which the system may have in its page cache",
            ),
        ]
        meter.measure(f"{tokens} tokens, one at a time", contenders, unit="tokens", work=tokens)
    return meter.results()


def read(network: LanguageModel, lookup: Lookup, passage: Tensor, state: DecodeState) -> Tensor:
    """Token by token; the logits after the last."""
    for token in passage.split(1, dim=1):
        logits, state = advance(network, lookup, token, state)
    return logits


def replay(split: Split, tokens: int) -> Iterator[Tensor]:
    """Passages of the text [1, PROMPT + tokens], again from its start when it ends."""
    length = PROMPT + tokens
    for number in count():
        first = number * length % max(1, len(split.tokens) - length)
        yield torch.from_numpy(split.tokens[first : first + length].astype("int64"))[None]


def use(lookup: Lookup, split: Split) -> None:
    """Read the rows of some text."""
    lookup.rows(torch.from_numpy(split.tokens[:WARM].astype("int64"))[None])


def random_table(num_rows: int, form: RowFormat) -> HostTable:
    """All rows written."""
    table = HostTable(num_rows, form)
    for ids in torch.arange(num_rows).split(CHUNK):
        table.write(ids, torch.randn(len(ids), form.dim) * 0.02)
    return table


def forget(path: Path) -> None:
    """Have the system drop a file from its page cache."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
