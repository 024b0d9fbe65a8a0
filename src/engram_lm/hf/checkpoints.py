"""Memories in other people's checkpoints: rows and projections as they were, beside the files of the model.

    trainer = Trainer(model, args, ..., optimizers=(RowwiseAdamW(model), None), callbacks=[EngramCallback()])
    trainer.train(resume_from_checkpoint=True)

writes checkpoint-400/engram/NAME/step-000400/ with a table and weights, checksummed, and goes on from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError, ConfigError, MismatchError
from ..tables import Table
from ..train.checkpoint import Checkpoint, facts_of, latest, save
from .attach import Memory
from .rows import TrainedRows

DIRECTORY = "engram"  # in a checkpoint of Trainer's
OWN = "model"  # the name under which the rows of a model of ours are kept


class Kept(NamedTuple):
    """What is saved under one name."""

    name: str
    rows: TrainedRows
    table: Table | None  # if its rows train
    module: nn.Module  # whose weights are saved; empty for a model of ours, whose own files have them


def save_memories(model: nn.Module, directory: Path | str, *, step: int = 0, run: str = "") -> None:
    """Write a model's memories to directory/NAME/step-.../: projections, and tables with accumulators where rows train.

    Of a model of ours the table alone is written: the model's own files have the rest. A table of tier disk stays where it
    is, and commits its journal. run: whose checkpoint it is, kept with it.

    Raises CheckpointError when something cannot be written.
    """
    for name, rows, table, module in _kept(model):
        clock = table.clock if table else None
        save(
            Path(directory) / name,
            step,
            {"weights": module.state_dict()},
            {"digest": rows.lookup.digest, "clock": clock, "run": run},
            keep=1,
            also=table.save if table else None,
        )
        rows.kept = True


def load_memories(model: nn.Module, directory: Path | str) -> None:
    """Return to what `save_memories` wrote, exactly.

    Raises CheckpointError for files that are missing or damaged, MismatchError when they are another memory's.
    """
    for name, rows, table, module in _kept(model):
        path = latest(Path(directory) / name)
        if path is None:
            raise CheckpointError(f"{Path(directory) / name} holds no memory: its rows would have stayed as they are.")
        saved = Checkpoint(path)
        for what, found, own in (
            ("vocabulary and plan", saved.facts["digest"], rows.lookup.digest),
            ("rows that train", saved.facts["clock"] is not None, table is not None),
        ):
            if found != own:
                raise MismatchError(
                    f"{path}: {what}: {found}, but of the memory {name!r}: {own}. It would have read other rows."
                )
        module.load_state_dict(saved.part("weights"))
        if table is not None:
            table.load(path, saved.facts["clock"])
        rows.zero_grad()
        rows.kept, rows.fresh = True, False


class EngramCallback(TrainerCallback):
    """Keeps memories in Trainer's checkpoints: saved on save, restored on resume and for the best model at the end.

    resume_from: the checkpoint that `train(resume_from_checkpoint=...)` is given, if it lies outside of the output directory;
    Trainer does not tell callbacks. A checkpoint that is not the one that Trainer resumed from is refused.

    Trainer deletes old checkpoints before this one has written the newest: with `save_total_limit=1` a kill in between
    leaves no rows, so keep 2.
    """

    def __init__(self, resume_from: str | None = None) -> None:
        self.resume_from = resume_from

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the optimizer that rows are looked after."""
        for kept in _kept(kwargs["model"]):
            kept.rows.kept = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that everything will train, and return to the checkpoint that Trainer resumed from.

        Raises ConfigError when parameters are not in the optimizer, CheckpointError when the checkpoint has no rows, and
        MismatchError when a new run would have begun with what an earlier one left in a table's journal.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        _require_all(model, optimizer)
        self.on_init_end(args, state, control, model=model)
        if state.global_step:
            self._resume(args, state, model)
            for group in optimizer.param_groups:
                group.pop("clock", None)  # of a fresh optimizer, if the checkpoint has none
        for kept in _kept(model):
            if kept.table is not None and kept.rows.fresh:
                kept.table.begin()
        _callbacks(state)[EngramCallback.__name__] = {
            "args": {"resume_from": self.resume_from},
            "attributes": {"run": uuid4().hex},
        }

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the memories into the checkpoint that Trainer has just written."""
        directory = _checkpoint(args, state)
        if not directory.exists():
            raise CheckpointError(f"{directory} was not written by Trainer: rows would have been saved elsewhere.")
        save_memories(kwargs["model"], directory / DIRECTORY, step=state.global_step, run=_run(state))
        for name, _, table, _ in _kept(kwargs["model"]):
            if table is not None:
                table.settle(min(_clocks(directory.parent, name)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget rows' gradients when a GradScaler skipped the step: Trainer clears those of parameters alone."""
        for kept in _kept(kwargs["model"]):
            kept.rows.zero_grad()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Return to the rows of the best checkpoint, where Trainer has loaded its parameters."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_memories(kwargs["model"], Path(state.best_model_checkpoint) / DIRECTORY)

    def _resume(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        given = self.resume_from or args.resume_from_checkpoint
        directory = Path(given) if given else _checkpoint(args, state)
        run = _run(state)
        for kept in _kept(model):
            path = latest(directory / DIRECTORY / kept.name)
            if path is None or facts_of(path)["run"] != run or facts_of(path)["step"] != state.global_step:
                raise CheckpointError(
                    f"{directory} has no rows of {kept.name!r} for the step {state.global_step} that Trainer resumed from: "
                    "it was saved without EngramCallback, its writing was cut short, or it lies elsewhere; then name it: "
                    "EngramCallback(resume_from=...). Rows would have started anew."
                )
        load_memories(model, directory / DIRECTORY)


def _kept(model: nn.Module) -> Iterator[Kept]:
    seen: set[int] = set()
    for module in model.modules():
        rows = getattr(module, "rows", None)  # wrappers, such as peft's, pass on the attributes of what they wrap
        if not isinstance(rows, TrainedRows) or id(rows) in seen:
            continue
        seen.add(id(rows))
        table = rows.lookup.table if getattr(module, "train_rows", True) else None
        yield (
            Kept(module.name, rows, table, module)
            if isinstance(module, Memory)
            else Kept(OWN, rows, table, nn.Module())
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _run(state: TrainerState) -> str:
    """Whose checkpoint a state belongs to; "" for one that was saved without the callback."""
    return _callbacks(state).get(EngramCallback.__name__, {}).get("attributes", {}).get("run", "")


def _callbacks(state: TrainerState) -> dict[str, Any]:
    """What Trainer keeps of callbacks in a checkpoint, by class; `run` names the run that wrote it."""
    return state.stateful_callbacks  # type: ignore[return-value]  # it is declared as a list


def _clocks(output: Path, name: str) -> list[int]:
    """Of the tables in all checkpoints that are there."""
    steps = map(latest, output.glob(f"checkpoint-*/{DIRECTORY}/{name}"))
    clocks = [facts_of(step)["clock"] for step in steps if step is not None]
    return [clock for clock in clocks if clock is not None]


def _require_all(model: nn.Module, optimizer: Any) -> None:
    """Raise ConfigError unless the optimizer has every parameter that requires a gradient, and the rows that train."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if missing:
        raise ConfigError(
            f"the optimizer does not have {len(missing)} parameters that require gradients, {missing[0]} among them: they "
            "would never have been trained. Make it after the last change of the model (get_peft_model, attach)."
        )
    for name, rows, table, _ in _kept(model):
        if table is not None and not any(group["params"] is rows.leaves for group in optimizer.param_groups):
            raise ConfigError(
                f"the optimizer does not have the rows of {name!r}: they would never have been trained. Give the Trainer "
                "optimizers=(RowwiseAdamW(model), None), made after attach."
            )
