"""The smallest models, texts and runs that still have every part."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.hashing import HashConfig
from engram_lm.memory import EngramConfig
from engram_lm.model import AttentionConfig, LanguageModel, MemoryConfig, ModelConfig, MoEConfig
from engram_lm.model.lookup import Lookup, address_digest, build_plan
from engram_lm.tables import DeviceTable, DiskTable, TableConfig, build_table
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.checkpoint import Checkpoint, latest
from engram_lm.train.loader import Loader
from engram_lm.train.loop import TrainConfig, Training, read_metrics
from engram_lm.train.shards import Split

VOCABULARY = 48
BASE = ModelConfig(VOCABULARY, dim=16, layers=2, attention=AttentionConfig("gqa", 2, 1, 8), ffn_width=24)
HASH = HashConfig(orders=(2, 3), heads=2, rows_per_head=97, layers=(1,), pad_id=0)
ENGRAM = replace(BASE, memory=MemoryConfig(HASH, EngramConfig(row_dim=4, conv_dilation=3)))
EVERYTHING = replace(
    ENGRAM,
    attention=AttentionConfig("mla", heads=2, nope_dim=4, rope_dim=4, value_dim=6, q_rank=8, kv_rank=6),
    moe=MoEConfig(experts=4, active=2, shared=1, width=8),
    streams=4,
    memory=MemoryConfig(replace(HASH, orders=(2, 3, 4), layers=(0, 1)), EngramConfig(row_dim=4)),
)
PANGRAM = "the quick brown fox jumps over the lazy dog while memory looks up what it has seen"
WORDS = PANGRAM.split()
MODELS = {"base": BASE, "engram": ENGRAM, "everything": EVERYTHING}


def split(documents: int = 12, seed: int = 0) -> Split:
    """Documents that repeat a few phrases: a memory of n-grams has something to remember."""
    rng = np.random.default_rng(seed)
    phrases = rng.integers(1, VOCABULARY, (6, 5))
    texts = [np.concatenate([[0], phrases[rng.integers(6, size=rng.integers(4, 9))].ravel()]) for _ in range(documents)]
    starts = np.cumsum([0, *map(len, texts[:-1])])
    return Split(np.concatenate(texts).astype(np.uint16), starts, np.array([len(text) - 1 for text in texts]))


def write_texts(directory: Path, files: int = 8, words: int = 200) -> Path:
    """Text files of a few words in random order."""
    directory.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(files):
        (directory / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, words)), encoding="utf-8")
    return directory


def config(model: ModelConfig = ENGRAM, **changes: Any) -> TrainConfig:
    """Six steps of four windows, a checkpoint at every second."""
    settings = {"steps": 6, "batch_size": 4, "length": 10, "checkpoint_every": 2, "threads": 1} | changes
    return TrainConfig(model=model, precision="float32", device="cpu", **settings)


def lookup_of(model: ModelConfig, tier: str = "device", directory: Path | None = None, **options: Any) -> Lookup | None:
    """An empty table behind the identity vocabulary; None for a model without a memory."""
    if model.memory is None:
        return None
    vocabulary = CanonicalVocabulary.identity(model.vocab_size)
    plan = build_plan(model.memory.hash, vocabulary)
    dim, digest = model.memory.engram.row_dim, address_digest(vocabulary, plan)
    placed = TableConfig(**{"tier": tier, **options})
    return Lookup(
        vocabulary, plan, build_table(placed, plan.num_rows, dim, digest=digest, directory=directory or Path())
    )


def training(directory: Path, config: TrainConfig, **options: Any) -> Training:
    """A run on the phrases."""
    batches = options.pop("batches", None) or Loader(split(), config.batch_size, config.length, config.seed)
    placed = asdict(config.table) | {"tier": "device" if config.table.tier == "auto" else config.table.tier}
    return Training(config, directory, batches, lookup_of(config.model, directory=directory, **placed), **options)


def finish(run: Training, steps: int | None = None) -> Training:
    """Take steps, all that are left unless told how many, and release the directory."""
    while not run.done and steps != 0:
        run.step()
        steps = None if steps is None else steps - 1
    run.close()
    if run.lookup and isinstance(run.lookup.table, DiskTable):
        run.lookup.table.close()
    return run


def outcome(directory: Path) -> dict[str, Any]:
    """All that a run leaves behind, except for how long it took."""
    newest = latest(directory / "checkpoints")
    assert newest is not None
    saved = Checkpoint(newest)
    parts = {path.stem: saved.part(path.stem) for path in newest.glob("*.safetensors")}
    if (directory / "table.safetensors").exists():
        table = DiskTable(directory / "table.safetensors")
        table.load(newest, saved.facts["table_clock"])
        held = table.store.hold(np.arange(table.num_rows))
        parts["table"] = {"records": torch.from_numpy(held.records[held.slots])}
        table.close()
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(directory / "metrics.jsonl")]
    return {"parts": parts, "loader": saved.facts["loader"], "step": saved.facts["step"], "metrics": lines}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two outcomes are equal bit for bit."""
    assert one["parts"].keys() == other["parts"].keys()
    for part, tensors in one["parts"].items():
        assert tensors.keys() == other["parts"][part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other["parts"][part][name]), f"{part}: {name}"
    assert {**one, "parts": None} == {**other, "parts": None}


# --- processes that are killed ------------------------------------------------------------------------------

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # of Python's audit events
WRITES = ("pwrite", "pwritev", "ftruncate")  # of module os: of these no event tells


def watch_file_operations(note: Callable[[], None]) -> None:
    """Have `note` called before each operation of this process that alters files or opens one."""

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            note()
            return function(*arguments)

        return noted

    for name in WRITES:
        setattr(os, name, noting(getattr(os, name)))
    sys.addaudithook(lambda event, _: note() if event in FILE_OPERATIONS else None)


def run_in_process(directory: str, settings: TrainConfig) -> None:
    """Begin a run or go on with it."""
    torch.set_num_threads(1)
    finish(training(Path(directory), settings, resume=True))


def killed_at(number: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function and die just before its `number`-th operation on a file."""
    left = number

    def note() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda descriptor: None  # of no use against a kill
    watch_file_operations(note)
    function(*arguments)
    os._exit(0)  # what happens at the end of a process is not the function's


def exit_code(processes: Any, function: Callable[..., Any], *arguments: Any) -> int | None:
    """Of a process that calls a function."""
    process = processes.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def live(model: ModelConfig, seed: int = 0) -> tuple[LanguageModel, Lookup | None]:
    """A model in which every parameter and row does something: at their start most of them are silent."""
    built = LanguageModel.build(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    lookup = lookup_of(model)
    if lookup:
        assert isinstance(lookup.table, DeviceTable)
        lookup.table.rows.normal_(generator=generator)
    return built.eval(), lookup


def text(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random tokens [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def copy(source: Path, target: Path) -> Path:
    """A run directory to damage."""
    return Path(shutil.copytree(source, target))
