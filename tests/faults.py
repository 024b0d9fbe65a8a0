"""What can happen to one rank of a run, and where: prepared in its process before it begins."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from engram_lm.evaluate import loss as evaluation
from engram_lm.model import LanguageModel
from engram_lm.model.lm import Block
from engram_lm.tables.sharded import Exchange, ShardedTable
from engram_lm.train import alike, checkpoint
from engram_lm.train.loader import Loader
from engram_lm.train.loop import Metrics
from engram_lm.train.optim import Optimizer
from engram_lm.train.parallel import Parallel

# --- what ---------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """As a scheduler does that warns torchrun and its ranks, to which torchrun passes it on."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def stop_launcher() -> None:
    """Whoever started this rank gets the signal, and time to pass it on."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(2)


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stick() -> None:
    time.sleep(60)


# --- where --------------------------------------------------------------------------------------------------


def at_call(
    owner: Any, name: str, number: int, what: Callable[[], None], *, of: Callable[..., bool] = lambda *_: True
) -> None:
    """Let it happen when a function begins for the `number`-th time with arguments `of` this kind."""
    function, calls = getattr(owner, name), count(1)

    def called(*arguments: Any, **options: Any) -> Any:
        if of(*arguments) and next(calls) == number:
            what()
        return function(*arguments, **options)

    setattr(owner, name, called)


def in_backward(number: int, what: Callable[[], None]) -> None:
    """Where the gradient of a block's output is known, and that of what came before is not."""
    calls = count(1)

    def watch(module: torch.nn.Module, arguments: Any, result: Any) -> None:
        if isinstance(module, Block) and torch.is_grad_enabled() and next(calls) == number:
            result[0].register_hook(lambda grad: what())

    torch.nn.modules.module.register_module_forward_hook(watch)


def in_exchange(lane: str, number: int, what: Callable[[], None]) -> None:
    """While ids, rows or gradients travel."""

    def start() -> None:
        collective = dist.all_to_all_single

        def begun(*arguments: Any, **options: Any) -> None:
            collective(*arguments, async_op=True, **options)
            what()

        dist.all_to_all_single = begun

    at_call(Exchange, "_exchange", number, start, of=lambda _, which, *rest: which == lane)


# Each in the third step that a start takes or, of what is done at checkpoints, in the second checkpoint.
KILLS: dict[str, tuple[int, Callable[..., None]]] = {
    "before the first step": (0, partial(at_call, LanguageModel, "build", 1)),
    "while ids travel": (1, partial(in_exchange, "ids", 3)),
    "while rows travel": (0, partial(in_exchange, "rows", 3)),
    "in backward": (1, partial(in_backward, 5)),  # of a model of two blocks
    "between weights and rows": (0, partial(at_call, ShardedTable, "apply", 3)),
    "before its part of a model is written": (1, partial(at_call, checkpoint, "write_divided", 3)),
    "before its part of a table is written": (1, partial(at_call, ShardedTable, "save", 2)),
    "after a checkpoint got its name": (0, partial(at_call, checkpoint, "_prune", 2)),
    # the first eight are met by default
    "while gradients travel": (1, partial(in_exchange, "grads", 3)),
    "before gradients are summed": (1, partial(at_call, Parallel, "sum_gradients", 3)),
    "before the metrics are written": (0, partial(at_call, Metrics, "add", 4)),
    "before an evaluation": (1, partial(at_call, evaluation, "measure", 2)),
    "before its part of an optimizer is written": (0, partial(at_call, checkpoint, "write_divided", 4)),
    "before files are made durable": (1, partial(at_call, checkpoint, "_settle", 2)),
    "before a checkpoint gets its name": (0, partial(at_call, checkpoint, "_publish", 2)),
}
WRITES: dict[str, tuple[int, Callable[..., None]]] = {
    "a model": (1, partial(at_call, FileSystem, "create_stream", 3)),
    "a table": (1, partial(at_call, ShardedTable, "save", 2)),
    "facts": (0, partial(at_call, checkpoint, "_conclude", 2)),
    "metrics": (0, partial(at_call, Path, "open", 5, of=lambda path, *_: path.name == "metrics.jsonl")),
}
STOPS: dict[str, tuple[int, Callable[..., None]]] = {
    "one rank": (1, partial(at_call, Optimizer, "step", 4)),
    "a step": (1, partial(at_call, Optimizer, "step", 3)),
    "loading": (0, partial(at_call, Loader, "next", 3)),
}
PLACES = KILLS | WRITES | STOPS


def happen(place: str, what: Callable[[], None], rank: int) -> None:
    """Prepare a rank for what shall happen in a place, if it is the one it happens to."""
    chosen, fault = PLACES[place]
    if rank == chosen:
        fault(what)


def happen_to_all(place: str, what: Callable[[], None], rank: int) -> None:
    """The same on every rank."""
    PLACES[place][1](what)


# --- ranks that are not alike -------------------------------------------------------------------------------


def other_settings(rank: int) -> None:
    if rank == 1:
        sys.argv += ["--optim.lr", "0.125"]


def other_code(rank: int) -> None:
    if rank == 1:
        alike.source_digest = lambda: "another"


def other_place(folder: Path, rank: int) -> None:
    os.chdir(folder / str(rank))
