"""What torchrun's agent does, for ranks of the real command that are forked and start in a fraction of a second.

It keeps the store where they meet and gives them torchrun's environment. Unlike torchrun it ends none of them: each has to
find out by itself that another failed.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from engram_lm.train.checkpoint import Checkpoint, latest
from engram_lm.train.loop import read_metrics
from engram_lm.train.watch import Watch


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
    seconds: float = 60,
) -> list[Ended]:
    """Run `engram-lm COMMAND` once in `world` ranks, in the order of ranks.

    befall: called with the rank in each before it begins, to prepare what shall happen to it. restarts: what each rank is told
    of how often it was started before. Raises AssertionError when one still runs after `seconds`, and kills them.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        processes.Process(
            target=run_rank,
            args=(folder, command, rank, world, store.port, (restarts or [0] * world)[rank], befall),
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
) -> None:
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
    # a rank that is gone is given up sooner, or each such test would wait for five seconds
    Watch.__init__.__kwdefaults__.update(interval=0.1, patience=1.0)  # type: ignore[union-attr]
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
