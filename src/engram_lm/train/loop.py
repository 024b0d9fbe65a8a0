"""Training: address, fetch, fuse; backward; update each tensor by its rule and each row where it lives.

Everything that the next step depends on is either in a checkpoint or a function of the configuration and the step number,
so a run that is killed at any moment and resumed ends bit-identical to one that was not.
"""

from __future__ import annotations

import json
import math
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from .. import __version__, config as configs
from ..errors import CheckpointError, ConfigError, MismatchError, TrainingError
from ..model.lm import LanguageModel, ModelConfig
from ..model.lookup import Leaf, Lookup
from . import checkpoint as checkpoints
from .loader import Batch, LoaderState
from .optim import OptimConfig, Optimizer, schedule
from .precision import Precision, autocast, resolve


@dataclass(frozen=True)
class TrainConfig:
    """One run, with everything needed to run it again.

    batch_size: sequences a step; length: tokens a sequence; accumulate: parts that a step's batch is computed in;
    eval_every and checkpoint_every: steps between them, 0 for only at the end.
    """

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 400
    batch_size: int = 16
    length: int = 256
    accumulate: int = 1
    seed: int = 0
    precision: Precision = "auto"
    compile: bool = False
    device: str = "auto"
    eval_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    threads: int = 0  # of the CPU; 0 leaves torch's choice

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "accumulate", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} cannot be computed in {self.accumulate} equal parts.")


class Batches(Protocol):
    """Where batches come from. The state is a value: the same state always gives the same batch."""

    def next(self, state: LoaderState) -> tuple[Batch, LoaderState]:
        """The batch at `state`, and the state after it."""


Evaluate = Callable[[LanguageModel, Lookup | None], dict[str, float]]


@dataclass
class Run:
    """What training leaves: the model, its memory, and the lines of metrics.jsonl."""

    model: LanguageModel
    lookup: Lookup | None
    metrics: list[dict[str, Any]]
    interrupted: bool = False


def train(
    config: TrainConfig,
    directory: Path,
    batches: Batches,
    lookup: Lookup | None,
    *,
    evaluate: Evaluate | None = None,
    facts: dict[str, Any] | None = None,
    resume: bool = False,
    label: str = "train",
    progress: Progress | None = None,
) -> Run:
    """Train into `directory`, or go on from its newest checkpoint with `resume`.

    lookup: the memory's vocabulary, plan and table; None for a model without one. evaluate: called every
    `eval_every` steps and at the end; what it returns joins the metrics. facts: names and digests kept in every
    checkpoint and compared on resume (the tokenizer's digest, say).

    Raises CheckpointError (directory in use, or holding a run already; disk full; corrupt checkpoint), MismatchError
    (resuming with another configuration, tokenizer or plan) and TrainingError (a loss that is not finite).
    """
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    with checkpoints.claimed(directory), interruptible() as interrupted:
        model = LanguageModel.build(config.model, seed=config.seed, device=device)
        optimizer = Optimizer(model, config.optim)
        identity = {
            "config": configs.to_dict(config),
            "address_digest": lookup.digest if lookup else None,
            **(facts or {}),
        }
        step, loader_state = 0, LoaderState()
        if resume and (directory / "config.json").exists():
            step, loader_state = restore(directory, model, optimizer, lookup, identity)
        else:
            start_directory(directory, config)
        metrics = Metrics(directory / "metrics.jsonl", after=step)

        def save() -> None:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state()}
            if lookup:
                parts["table"] = lookup.table.state()
            state = {**identity, "loader": asdict(loader_state), "environment": environment(config, device)}
            checkpoints.save(directory / "checkpoints", step, parts, state, config.keep_checkpoints)

        loss_of = torch.compile(model.loss) if config.compile else model.loss
        with shown(progress, label, config.steps, step) as show:
            while step < config.steps:
                began = time.perf_counter()
                batch, loader_state = batches.next(loader_state)
                multiple = schedule(config.optim, step, config.steps)
                model.train()
                loss, norm = train_step(loss_of, model, optimizer, lookup, on(batch, device), config, multiple)
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise TrainingError(not_finite(directory, step, loss, norm))
                step += 1
                seconds = time.perf_counter() - began
                metrics.add(step=step, tokens=step * batch.tokens.numel(), loss=loss, norm=norm, lr=multiple, seconds=seconds)
                show(step, loss, batch.tokens.numel() / seconds)

                last = step == config.steps or interrupted()
                if evaluate and (last or (config.eval_every and step % config.eval_every == 0)) and not interrupted():
                    model.eval()
                    with torch.no_grad(), autocast(config.precision, device):
                        metrics.add(step=step, tokens=step * batch.tokens.numel(), **evaluate(model, lookup))
                if last or (config.checkpoint_every and step % config.checkpoint_every == 0):
                    save()
                if interrupted():
                    break
        model.eval()
        return Run(model, lookup, metrics.lines, interrupted=interrupted() and step < config.steps)


def train_step(
    loss_of: Callable[..., Tensor],
    model: LanguageModel,
    optimizer: Optimizer,
    lookup: Lookup | None,
    batch: Batch,
    config: TrainConfig,
    multiple: float,
) -> tuple[float, float]:
    """One step; returns the loss (nats a token) and the gradients' norm. Nothing is updated unless both are finite."""
    leaf: Leaf | None = lookup.leaf(batch.tokens, batch.segments) if lookup else None
    count = (batch.targets >= 0).sum().clamp_min(1)
    part = config.batch_size // config.accumulate
    total = torch.zeros((), device=batch.tokens.device)
    for first in range(0, len(batch.tokens), part):
        few = slice(first, first + part)
        with autocast(config.precision, batch.tokens.device):
            rows = leaf.expand(first, first + part) if leaf else None
            losses = loss_of(
                batch.tokens[few], batch.targets[few], rows, segments=_few(batch.segments, few), reduction="none"
            ).sum()
        (losses / count).backward()
        total += losses.detach()
    norm = optimizer.clip([leaf.rows] if leaf else [])
    loss = float(total / count)
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step(multiple)
        if leaf and lookup and leaf.rows.grad is not None:
            lookup.table.update(leaf.unique, leaf.rows.grad, config.optim.lr * config.optim.table_lr * multiple)
        model.balance()
    return loss, norm


def on(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device that computes."""
    return Batch(*(None if tensor is None else tensor.to(device) for tensor in vars(batch).values()))


def _few(segments: Tensor | None, few: slice) -> Tensor | None:
    return None if segments is None else segments[few]


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def environment(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What decides the last bits of a result besides the configuration."""
    return {
        "engram_lm": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": resolve(config.precision, device),
    }


# --- run directory --------------------------------------------------------------------------------------------------


def start_directory(directory: Path, config: TrainConfig) -> None:
    """Write config.json into a directory that holds no run yet."""
    if (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory} already holds a run, which would be overwritten. Add --resume to go on with it, or choose another "
            "directory with --out."
        )
    (directory / "config.json").write_text(configs.to_json(config), encoding="utf-8")


def restore(
    directory: Path, model: LanguageModel, optimizer: Optimizer, lookup: Lookup | None, identity: dict[str, Any]
) -> tuple[int, LoaderState]:
    """Load the newest checkpoint into model, optimizer and table; the step it was taken after, and the loader's state."""
    newest = checkpoints.latest(directory / "checkpoints")
    if newest is None:  # killed before its first checkpoint: nothing is lost by starting again
        return 0, LoaderState()
    saved = checkpoints.Checkpoint(newest)
    for name, value in identity.items():
        if saved.facts.get(name) != value:
            raise MismatchError(f"{newest}: {explain_mismatch(name, saved.facts.get(name), value)}")
    model.load_state_dict(saved.part("model"))
    optimizer.load_state(saved.part("optimizer"))
    if lookup:
        lookup.table.load_state(saved.part("table"))
    return int(saved.facts["step"]), LoaderState(**saved.facts["loader"])


def explain_mismatch(name: str, saved: Any, given: Any) -> str:
    """Say which setting differs and what would have happened."""
    if name == "config":
        changed = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(saved, given)]
        return f"was trained with another configuration ({'; '.join(changed)}). The run would not be the one it continues."
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


def not_finite(directory: Path, step: int, loss: float, norm: float) -> str:
    """The message for a run that stops because of a NaN or infinity."""
    kept = checkpoints.latest(directory / "checkpoints")
    return (
        f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}; nothing was updated with them. "
        + (f"The last good checkpoint is {kept}." if kept else "There is no checkpoint yet.")
        + " Lower --optim.lr or --optim.table-lr, or try --precision float32."
    )


class Metrics:
    """metrics.jsonl: a line a step or evaluation. On resume, lines after the checkpoint are dropped; they come again."""

    def __init__(self, path: Path, after: int) -> None:
        self.lines = [line for line in read_metrics(path) if line["step"] <= after]
        kept = path.with_suffix(".partial")  # renamed into place, so that a kill here loses no line
        kept.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        kept.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        """Append a line and hand it to the operating system."""
        self.lines.append(values)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last one cut short by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# --- comfort --------------------------------------------------------------------------------------------------------


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that the step ends and a checkpoint is saved; the second kills."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

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


@contextmanager
def shown(progress: Progress | None, label: str, steps: int, done: int) -> Iterator[Callable[[int, float, float], None]]:
    """A progress bar: step, loss, tokens a second and time left. Give `progress` to join one that is shown already."""
    if progress is None:
        with progress_bar() as progress, shown(progress, label, steps, done) as show:
            yield show
        return
    task = progress.add_task(label, total=steps, completed=done, loss=math.nan, speed=0.0)
    yield lambda step, loss, speed: progress.update(task, completed=step, loss=loss, speed=speed)


def progress_bar() -> Progress:
    """The columns of a training run."""
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tok/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
