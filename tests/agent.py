"""Runs of the real command in several ranks, and what torchrun's agent does for them, but forked: in a fraction of a second.

The agent keeps the store where they meet and gives them torchrun's environment. Unlike torchrun it ends none of them: each
has to find out by itself that another failed.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import EVERYTHING, config

from engram_lm import config as configs
from engram_lm.train.checkpoint import Checkpoint, latest
from engram_lm.train.loop import read_metrics
from engram_lm.train.parallel import ParallelConfig
from engram_lm.train.run import prepare_text
from engram_lm.train.watch import Watch

SETTINGS = config(
    replace(EVERYTHING, vocab_size=300),
    steps=32,
    checkpoint_every=2,
    eval_every=2,
    batch_size=8,
    length=12,
    parallel=ParallelConfig(shard=True, experts=2, timeout=30),
)


def prepare(texts: Path, run: Path) -> None:
    """Leave the text, and nothing else, in the directory of a run."""
    prepare_text(str(texts), run, vocab_size=SETTINGS.model.vocab_size, say=lambda line: None)


def begin(text: Path, place: Path, **changes: Any) -> tuple[Path, list[str]]:
    """The directory of a run with these settings, its text prepared as in `text`, and the command that begins it."""
    run = place / "run"
    shutil.copytree(text / "run", run)
    (place / "settings.json").write_text(configs.to_json(replace(SETTINGS, **changes)))
    return run, ["train", str(place / "settings.json"), "--data", str(text / "texts"), "--out", str(run)]


class Ended(NamedTuple):
    """One rank of a start: its exit status, minus the signal's number if one killed it, and what it printed."""

    status: int | None
    output: str
    errors: str


def launch(
    processes: ForkServerContext,
    folder: Path,
    command: list[str],
    *,
    world: int = 2,
    befall: Callable[[int], None] | None = None,
    restarts: list[int] | None = None,
    patience: float = 1.0,
    seconds: float = 60,
) -> list[Ended]:
    """Run `engram-lm COMMAND` once in `world` ranks, in the order of ranks.

    befall: called with the rank in each before it begins, to prepare what shall happen to it. restarts: what each rank is told
    of how often it was started before. patience: of its Watch, or each test of a rank that is gone would wait for five seconds.
    Raises AssertionError when one still runs after `seconds`, and kills them.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        processes.Process(
            target=run_rank,
            args=(folder, command, rank, world, store.port, (restarts or [0] * world)[rank], befall, patience),
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    running, until = {process.sentinel: rank for rank, process in enumerate(ranks)}, time.monotonic() + seconds
    try:
        while running:
            ended = multiprocessing.connection.wait(list(running), max(0.0, until - time.monotonic()))
            assert ended, f"ranks {sorted(running.values())} still run: {[said(folder, rank) for rank in range(world)]}"
            for sentinel in ended:
                del running[sentinel]  # type: ignore[arg-type]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [Ended(process.exitcode, *said(folder, rank)) for rank, process in enumerate(ranks)]


def statuses(ranks: list[Ended]) -> list[int | None]:
    """The exit statuses."""
    return [rank.status for rank in ranks]


def said(folder: Path, rank: int) -> tuple[str, str]:
    """What a rank printed to stdout and stderr."""
    return (folder / f"stdout-{rank}").read_text(), (folder / f"stderr-{rank}").read_text()


def run_rank(
    folder: Path,
    command: list[str],
    rank: int,
    world: int,
    port: int,
    restart: int,
    befall: Callable[[int], None] | None,
    patience: float,
) -> None:
    """One of them, to be started in a process of its own."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), descriptor)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=str(restart),
    )
    os.fsync = lambda descriptor: None  # as in tests: of no use against a kill
    torch.set_num_threads(1)
    Watch.__init__.__kwdefaults__.update(interval=0.1, patience=patience)
    from engram_lm.cli import main

    sys.argv = ["engram-lm", *command]
    if befall:
        befall(rank)
    main()


def outcome(directory: Path) -> dict[str, Any]:
    """All that a run of several ranks leaves behind, except for how long it took; `tiny.outcome` is one process's."""
    newest = latest(directory / "checkpoints")
    assert newest is not None
    saved = Checkpoint(newest)
    parts = {name: saved.part(name) for name in ("model", "optimizer")}
    parts |= {path.parent.name: load_file(path) for path in newest.glob("table-*-of-*/table.safetensors")}
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(directory / "metrics.jsonl")]
    return {"parts": parts, "loader": saved.facts["loader"], "step": saved.facts["step"], "metrics": lines}
