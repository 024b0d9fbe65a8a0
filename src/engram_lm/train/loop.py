"""Training: address, fetch, fuse; backward; update each tensor by its rule and each row where it lives.

Everything that the next step depends on is either in a checkpoint or a function of the configuration and the step number,
so a run that is killed at any moment and resumed ends bit-identical to one that was not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from .. import config as configs
from ..errors import CheckpointError, ConfigError, MismatchError, TrainingError
from ..model.lm import LanguageModel, ModelConfig
from ..model.lookup import Lookup, Upcoming
from ..tables import Fetch, TableConfig
from ..tables.pieces import load_table
from ..tables.pinned import PinnedTable
from ..tables.sharded import ShardedTable
from ..tables.streams import SideStream
from . import checkpoint as checkpoints
from .hot import hottest
from .loader import Batch, Batches, LoaderState
from .optim import OptimConfig, Optimizer, schedule
from .parallel import Parallel, ParallelConfig
from .precision import Precision, autocast, resolve
from .ranks import Ranks
from .watch import Watch

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class TrainConfig:
    """One run, with everything needed to run it again."""

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step."""
    length: int = 256
    """Tokens a sequence."""
    accumulate: int = 1
    """Parts that a step's batch is computed in, to save memory."""
    seed: int = 0
    """Of weights and of the order of batches."""
    precision: Precision = "auto"
    """Of matrix products; auto is bfloat16 where the hardware multiplies it."""
    compile: bool = False
    """Run the model through torch.compile (wants a C++ compiler on a CPU)."""
    deterministic: bool = False
    """On a GPU take only operations that give the same bits every time, which is slower; a CPU's all do."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU where there is one."""
    eval_every: int = 100
    """Steps between evaluations; 0 for only at the end."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 for only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    prefetch: bool = True
    """Load the next batch and fetch its rows while this one computes; the result is the same to the bit."""
    table: TableConfig = field(default_factory=TableConfig)
    """Where the memory's rows live, and how they are encoded."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How several ranks share the run; see torchrun."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "accumulate", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("seed", "eval_every", "checkpoint_every", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} cannot be computed in {self.accumulate} equal parts.")


class Prepared(NamedTuple):
    """A batch whose rows are on their way."""

    batch: Batch
    rows: Upcoming | None
    after: LoaderState


Evaluate = Callable[[LanguageModel, Lookup | None], dict[str, float]]


class Training:
    """A run in progress: `step()` until `done`, then `close()`; or `train`, which does so with a progress bar.

    lookup: the memory's vocabulary, plan and table; None for a model without one. evaluate: called every `eval_every`
    steps and at the end; what it returns joins the metrics. facts: names and digests kept in every checkpoint and
    compared on resume (the tokenizer's digest, say). resume: go on from the newest checkpoint, if there is one.
    tensorboard: write event files too, where TensorBoard is installed. ranks: all processes of the run, each of which builds and
    steps this; rank 0 alone writes metrics, and all see one file system.

    Raises CheckpointError (directory in use, or holding a run already; disk full; corrupt checkpoint), MismatchError
    (resuming with another configuration, tokenizer or plan) and TrainingError (a loss that is not finite).
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: Path,
        batches: Batches,
        lookup: Lookup | None,
        *,
        evaluate: Evaluate | None = None,
        facts: dict[str, Any] | None = None,
        resume: bool = False,
        tensorboard: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.directory, self.batches, self.lookup = config, directory, batches, lookup
        self.evaluate, self.ranks = evaluate, ranks or Ranks()
        self.interrupted: Callable[[], bool] = lambda: False
        """Asked in every step: whether this rank has to stop. Any rank stops all."""
        self.stop = False
        """Whether the run shall stop after this step: the same on every rank."""
        self.device = choose_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            be_deterministic()
        self.parallel = Parallel(config, self.ranks, self.device)
        settings = configs.to_dict(config)
        del settings["parallel"]  # a run may go on with another number of ranks
        self.identity = {
            "config": settings,
            "address_digest": lookup.digest if lookup else None,
            **(facts or {}),
        }
        self.done_steps, self.loader_state, self.saved_step = 0, LoaderState(), 0
        self.claim = self.ranks.first(lambda: checkpoints.claim(directory))
        try:
            self.model = LanguageModel.build(config.model, seed=config.seed, device=self.device)
            self.parallel.divide(self.model)
            self.optimizer = Optimizer(self.model, config.optim, self.ranks)
            newest = self.ranks.everyones(checkpoints.latest(directory / "checkpoints"))[0]
            if resume and newest:
                self._restore(newest)
            else:  # a run killed before its first checkpoint begins again
                self.ranks.first(lambda: start_directory(directory, config, again=resume))
                if lookup:
                    lookup.table.begin(again=resume)
            if lookup and isinstance(lookup.table, PinnedTable) and config.table.device_memory:
                lookup.table.keep(hottest(lookup, batches), int(config.table.device_memory * 1e9))
            writes = self.ranks.rank == 0
            self.metrics = Metrics(
                directory / "metrics.jsonl" if writes else None, after=self.done_steps, tensorboard=tensorboard
            )
        except BaseException:
            if self.claim:
                self.claim.close()
            raise
        aside = SideStream(self.device)  # on a GPU addresses are found beside the step, too
        self.worker = ThreadPoolExecutor(1, "engram-batch", aside.adopt) if config.prefetch else None
        self.ahead: Future[Prepared] | None = None
        self.loss_of = torch.compile(self.model.loss) if config.compile else self.model.loss

    @property
    def done(self) -> bool:
        """Whether every step is taken."""
        return self.done_steps >= self.config.steps

    def step(self) -> dict[str, float]:
        """One optimizer step, and the evaluation and checkpoint that are due after it; the step's metrics."""
        began = time.perf_counter()
        batch, rows, loader_state = self._arrived()
        self.model.train()
        loss, norm, multiple = self._update(batch, rows)
        self.loader_state = loader_state
        self.done_steps += 1
        at = {"step": self.done_steps, "tokens": self.done_steps * batch.tokens.numel()}
        measured = {"loss": loss, "norm": norm, "lr": multiple, "seconds": time.perf_counter() - began}
        self.metrics.add(**at, **measured)
        if self.evaluate and self._due(self.config.eval_every):
            if self.ahead:
                self.ahead.result()  # ranks fetch in the same order: first the next batch, then what is evaluated
            self.model.eval()
            with torch.no_grad(), autocast(self.config.precision, self.device):
                self.metrics.add(**at, **self.evaluate(self.model, self.lookup))
        if self._due(self.config.checkpoint_every):
            self.save()
        return {**at, **measured}

    def _arrived(self) -> tuple[Batch, Upcoming | None, LoaderState]:
        """The batch that is due and its rows; while it computes, the one after it is prepared."""
        due = self.ahead.result() if self.ahead else self._prepare(self.loader_state)
        if due.rows:
            due.rows.fetch.begin()
        last = self.done_steps + 1 == self.config.steps
        self.ahead = None if last or not self.worker else self.worker.submit(self._prepare, due.after)
        return due.batch, due.rows, due.after

    def _prepare(self, state: LoaderState) -> Prepared:
        """Load, address, and start to fetch the batch at `state`."""
        batch, after = self.batches.next(state)
        return Prepared(
            batch, self.lookup.upcoming(self.parallel.ids(self.lookup, batch)) if self.lookup else None, after
        )

    def _update(self, batch: Batch, upcoming: Upcoming | None) -> tuple[float, float, float]:
        """Backward through the batch in `accumulate` parts, then update; loss (nats a token), gradient norm, lr multiple."""
        count = (batch.targets >= 0).sum().clamp_min(1).to(self.device)
        total = torch.zeros((), device=self.device)
        ours = self.parallel.part(batch)
        size = len(ours.tokens) // self.config.accumulate
        self.model.neighbours = self.parallel.neighbours()
        for first in range(0, len(ours.tokens), size):
            part = on(ours, self.device, slice(first, first + size))
            with autocast(self.config.precision, self.device):
                rows: Fetch | Tensor | None = upcoming.part(first, first + size) if upcoming else None
                if self.config.compile and upcoming:
                    rows = upcoming.leaf.expand(first, first + size)  # to be waited for outside of the graph
                losses = self.loss_of(part.tokens, part.targets, rows, segments=part.segments, reduction="none")
            loss = losses.sum() / count
            loss.backward()
            total += loss.detach()
        self.model.neighbours = None

        ids, grads = upcoming.collect() if upcoming else (None, None)
        self.parallel.sum_gradients(self.model)
        norm = self.optimizer.clip([] if grads is None else [grads])
        nats, stop = self.parallel.sum(float(total), self.interrupted())
        self.stop = stop > 0
        if not (math.isfinite(nats) and math.isfinite(norm)):
            raise TrainingError(self._not_finite(nats, norm))
        multiple = schedule(self.config.optim, self.done_steps, self.config.steps)
        self.optimizer.step(multiple)
        if self.lookup and ids is not None and grads is not None:
            self.lookup.table.apply(ids, grads, self.config.optim.peak_table_lr * multiple)
        self.parallel.balance(self.model)
        return nats, norm, multiple

    def _due(self, every: int) -> bool:
        return self.done or (every > 0 and self.done_steps % every == 0)

    def save(self) -> None:
        """Write a checkpoint of this moment, unless there is one."""
        if self.saved_step == self.done_steps:
            return
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state()}
        table = self.lookup.table if self.lookup else None
        facts = {
            **self.identity,
            "loader": asdict(self.loader_state),
            "table_clock": table.clock if table else None,
            "environment": environment(self.config, self.device, self.ranks),
        }
        directory = self.directory / "checkpoints"
        checkpoints.save(
            directory,
            self.done_steps,
            parts,
            facts,
            keep=self.config.keep_checkpoints,
            also=table.save if table else None,
            ranks=self.ranks,
        )
        self.saved_step = self.done_steps
        if table:
            table.settle(checkpoints.facts_of(checkpoints.checkpoints(directory)[0])["table_clock"])

    def _restore(self, newest: Path) -> None:
        """Take over a checkpoint of the same run."""
        saved = checkpoints.Checkpoint(newest, self.ranks)
        for name, value in self.identity.items():
            found = saved.facts.get(name)
            if isinstance(found, dict):
                found = {key: setting for key, setting in found.items() if key != "parallel"}
            if found != value:
                raise MismatchError(f"{newest}: {explain_mismatch(name, found, value)}")
        for name, value in environment(self.config, self.device, self.ranks).items():
            then = saved.facts["environment"].get(name, 1 if name == "ranks" else None)
            if then != value and self.ranks.rank == 0:
                warnings.warn(
                    f"{newest} was written with {name} = {then}, this run has {value}: "
                    "it goes on, but the last bits may differ from an uninterrupted run's.",
                    stacklevel=2,
                )
        saved.load_into("model", self.model.state_dict())
        saved.load_into("optimizer", self.optimizer.state())
        if self.lookup:
            table, clock = self.lookup.table, saved.facts["table_clock"]
            if isinstance(table, ShardedTable):
                table.load(newest, clock)
            else:
                load_table(table, newest, clock)
        self.done_steps = self.saved_step = int(saved.facts["step"])
        self.loader_state = LoaderState(**saved.facts["loader"])

    def close(self) -> None:
        """Release the directory and leave the model ready to be used."""
        self.model.eval()
        if self.worker:
            self.worker.shutdown()
        if self.metrics.board:
            self.metrics.board.close()
        if self.claim:
            self.claim.close()

    def _not_finite(self, loss: float, norm: float) -> str:
        kept = checkpoints.latest(self.directory / "checkpoints")
        return (
            f"{self.directory}, step {self.done_steps + 1}: the loss is {loss} and the gradient's norm {norm}; nothing was "
            f"updated with them. {f'The last good checkpoint is {kept}.' if kept else 'There is no checkpoint yet.'} "
            "Lower --optim.lr or --optim.table-lr, or try --precision float32."
        )


def train(training: Training, label: str = "train") -> bool:
    """Run to the end with a progress bar. On Ctrl-C or SIGTERM, save a checkpoint after the step and return False."""
    return train_together({label: training})


def train_together(trainings: dict[str, Training]) -> bool:
    """Run several to their ends, a step of each in turn, so that they share whatever else the machine is doing."""
    ranks = next(iter(trainings.values())).ranks
    with interruptible() as stopped, progress_bar(hidden=ranks.rank > 0) as progress:
        bars = {
            label: progress.add_task(
                label, total=run.config.steps, completed=run.done_steps, loss=run.metrics.last_loss, speed=0.0
            )
            for label, run in trainings.items()
        }
        speed: dict[str, float] = {}
        for run in trainings.values():
            run.interrupted = stopped
        try:
            with Watch(ranks) as watch:
                while not (any(run.stop for run in trainings.values()) or all(run.done for run in trainings.values())):
                    for label, run in trainings.items():
                        if not run.done:
                            watch.step = run.done_steps + 1
                            line = run.step()
                            now = line["tokens"] / line["step"] / line["seconds"]
                            speed[label] = 0.9 * speed.get(label, now) + 0.1 * now
                            progress.update(bars[label], completed=line["step"], loss=line["loss"], speed=speed[label])
                if not all(run.done for run in trainings.values()):
                    for run in trainings.values():
                        run.save()
        finally:
            for run in trainings.values():
                run.close()
    return all(run.done for run in trainings.values())


def on(batch: Batch, device: torch.device, part: slice = slice(None)) -> Batch:
    """A batch, or some of its sequences, on the device that computes."""
    segments = None if batch.segments is None else batch.segments[part].to(device)
    return Batch(batch.tokens[part].to(device), batch.targets[part].to(device), segments)


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's, for a name and for a build without CUDA
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def be_deterministic() -> None:
    """From now on, in this process: operations that have no deterministic form raise RuntimeError. Those of this package always do."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
    torch.use_deterministic_algorithms(True)


def environment(config: TrainConfig, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """What decides the last bits of a result besides the configuration."""
    return {
        "engram_lm": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": resolve(config.precision, device),
        "ranks": ranks.size,
    }


# --- run directory --------------------------------------------------------------------------------------------------


def start_directory(directory: Path, config: TrainConfig, again: bool = False) -> None:
    """Write config.json into a directory that holds no run yet, or one that shall begin `again`."""
    if not again and ((directory / "config.json").exists() or (directory / "checkpoints").exists()):
        raise CheckpointError(
            f"{directory} already holds a run, which would be overwritten. Add --resume to go on with it, or choose another "
            "directory with --out."
        )
    checkpoints.write_whole(directory / "config.json", configs.to_json(config))


def explain_mismatch(name: str, saved: Any, given: Any) -> str:
    """Say which setting differs and what would have happened."""
    if name == "config":
        changed = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(saved, given)]
        return (
            f"was trained with another configuration ({'; '.join(changed)}). The run would not be the one it continues."
        )
    if "digest" in name:
        return (
            f"its {name.replace('_', ' ')} is {saved}, this run's is {given}: with another tokenizer or plan every token would "
            "mean another word and every memory row would be read from the wrong place."
        )
    return f"its {name} was {saved!r}, now it is {given!r}."


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


class Metrics:
    """metrics.jsonl: a line a step or evaluation. On resume, lines after the checkpoint are dropped; they come again.

    path: None for a rank that only remembers them.
    """

    def __init__(self, path: Path | None, after: int, tensorboard: bool = False) -> None:
        self.path, self.board = path, None
        self.lines: list[dict[str, Any]] = []
        if path:
            self.board = summary_writer(path.parent / "tensorboard", after) if tensorboard else None
            self.lines = [line for line in read_metrics(path) if line["step"] <= after]
            checkpoints.write_whole(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    @property
    def last_loss(self) -> float:
        """Training loss of the newest step, NaN before the first."""
        return next((line["loss"] for line in reversed(self.lines) if "loss" in line), math.nan)

    def add(self, **values: Any) -> None:
        """Append a line and hand it to the operating system. Raises CheckpointError when the disk is full."""
        self.lines.append(values)
        if not self.path:
            return
        if self.board:
            for name in values.keys() - {"step", "tokens"}:
                self.board.add_scalar(name, values[name], values["step"])
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error}). Checkpoints are intact; make room and go on with --resume."
            ) from None


def summary_writer(directory: Path, after: int) -> Any:
    """TensorBoard's writer, which drops what came after step `after`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(directory, purge_step=after + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last one cut short by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# --- comfort --------------------------------------------------------------------------------------------------------


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that the step ends and a checkpoint is saved; a second Ctrl-C kills.

    A second SIGTERM does not: schedulers send it to torchrun and to its ranks, and torchrun passes it on to them.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def progress_bar(hidden: bool = False) -> Progress:
    """The columns of a training run; `hidden` for ranks whose progress another shows."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tok/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=hidden,
    )
