"""Whatever happens to one rank of the real command, all stop and say why, and the run ends bit-identical to one undisturbed."""

import errno
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from agent import launch, outcome
from tiny import EVERYTHING, assert_same, config, write_texts
from torch.distributed.checkpoint.filesystem import FileSystem

from engram_lm import config as configs
from engram_lm.evaluate import loss as evaluation
from engram_lm.model import LanguageModel
from engram_lm.model.lm import Block
from engram_lm.tables.sharded import Exchange, ShardedTable
from engram_lm.train import checkpoint
from engram_lm.train.loop import Metrics
from engram_lm.train.parallel import Parallel, ParallelConfig
from engram_lm.train.run import prepare_text

SETTINGS = config(
    replace(EVERYTHING, vocab_size=300),
    checkpoint_every=2,
    eval_every=2,
    batch_size=8,
    length=12,
    parallel=ParallelConfig(shard=True, experts=2, timeout=20),
)
GONE = r"rank {} \(process \d+ on \S+\) was last seen (in step \d+|before its first step) and is gone without a word: killed"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which nothing but the text is prepared."""
    place = tmp_path_factory.mktemp("text")
    texts = write_texts(place / "texts", files=24)
    prepare_text(str(texts), place / "run", vocab_size=300, say=lambda text: None)
    return place


def begin(text: Path, place: Path, **changes: Any) -> tuple[Path, list[str]]:
    """A directory of a run of these settings, and the command that begins it."""
    run = place / "run"
    (run / "shards").mkdir(parents=True)
    for path in [text / "run" / "tokenizer.json", *(text / "run" / "shards").iterdir()]:
        os.link(path, run / path.relative_to(text / "run"))
    (place / "settings.json").write_text(configs.to_json(replace(SETTINGS, **changes)))
    return run, ["train", str(place / "settings.json"), "--data", str(text / "texts"), "--out", str(run)]


# --- what can happen ----------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
PLACES: dict[str, tuple[int, Callable[..., None]]] = {
    "before the first step": (0, partial(at_call, LanguageModel, "build", 1)),
    "while ids travel": (1, partial(in_exchange, "ids", 3)),
    "while rows travel": (0, partial(in_exchange, "rows", 3)),
    "while gradients travel": (1, partial(in_exchange, "grads", 3)),
    "in backward": (0, partial(in_backward, 2 * SETTINGS.model.layers + 1)),
    "before gradients are summed": (1, partial(at_call, Parallel, "sum_gradients", 3)),
    "between weights and rows": (0, partial(at_call, ShardedTable, "apply", 3)),
    "before the metrics are written": (0, partial(at_call, Metrics, "add", 4)),
    "before an evaluation": (1, partial(at_call, evaluation, "measure", 2)),
    "before its part of a model is written": (1, partial(at_call, checkpoint, "write_divided", 3)),
    "before its part of an optimizer is written": (0, partial(at_call, checkpoint, "write_divided", 4)),
    "before its part of a table is written": (1, partial(at_call, ShardedTable, "save", 2)),
    "before files are made durable": (1, partial(at_call, checkpoint, "_settle", 2)),
    "before a checkpoint gets its name": (0, partial(at_call, checkpoint, "_publish", 2)),
    "after a checkpoint got its name": (0, partial(at_call, checkpoint, "_prune", 2)),
}


def happen(place: str, what: Callable[[], None], rank: int) -> None:
    """In a rank before it begins: prepare it for what shall happen there, if it is the one."""
    chosen, fault = PLACES[place]
    if rank == chosen:
        fault(what)


def test_killed_anywhere_again_and_again_a_run_ends_the_same(processes: ForkServerContext, text: Path, tmp_path: Path):
    """One run is killed in each place, and started again each time as torchrun does; each start takes at least two steps."""
    steps = 2 * len(PLACES) + 2
    whole, command = begin(text, tmp_path / "whole", steps=steps)
    assert [rank.status for rank in launch(processes, tmp_path, command)] == [0, 0]
    run, command = begin(text, tmp_path / "killed", steps=steps)
    for start, (place, (rank, _)) in enumerate(PLACES.items()):
        ended = launch(processes, tmp_path, command, befall=partial(happen, place, die), restarts=[start, start])
        assert ended[rank].status == -signal.SIGKILL, place
        other = ended[1 - rank]
        assert other.status == 1, (place, other)
        assert re.match(rf"Error: {GONE.format(rank)}", other.errors), (place, other.errors)
        assert "Traceback" not in other.errors, other.errors
    assert [rank.status for rank in launch(processes, tmp_path, command, restarts=[99, 99])] == [0, 0]
    assert_same(outcome(run), outcome(whole))


# --- a full disk --------------------------------------------------------------------------------------------

FULL = "[Errno 28] No space left on device"
FAILING: dict[str, tuple[int, Callable[..., None], str]] = {
    "a table": (1, partial(at_call, ShardedTable, "save", 2), r"\S+step-0000\d\d: cannot be written \(rank 1: {}\)"),
    "a model": (1, partial(at_call, FileSystem, "create_stream", 4), r"\S+: cannot be written \(rank 1: {}\)"),
    "facts": (0, partial(at_call, checkpoint, "_conclude", 2), r"\S+: cannot be written \(rank 0: {}\)"),
}
