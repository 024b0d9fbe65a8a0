"""The runs of a study: each trained, measured once, and never mixed with those of another configuration.

OUT/study.json     what all of them share
DIRECTORY/         one job
  config.json  metrics.jsonl  checkpoints/     as any run has them
  measured.json                                written last: what was asked for, and what was measured
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, TaskID
from tokenizers import Tokenizer

from .. import __version__
from .. import config as configs
from ..errors import CheckpointError, MismatchError
from ..train import checkpoint as checkpoints
from ..train.loader import Batches
from ..train.loop import Evaluate, TrainConfig, Training, differences, interruptible, progress_bar
from ..train.precision import autocast
from ..train.run import build_lookup
from ..train.tokenizer import tokenizer_digest

Measure = Callable[[Training], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One model to train, and what to measure of it.

    measure: called with the finished run, in evaluation mode, without gradients, in the run's precision; its plain JSON values
    are kept. evaluate: called on the way, see Training. facts: what else decides the result (a digest of the text, say); kept,
    and compared when the job is met again. keep: leave the checkpoint once it is measured.
    """

    directory: Path
    config: TrainConfig
    batches: Batches
    tokenizer: Tokenizer
    measure: Measure
    evaluate: Evaluate | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    keep: bool = False

    @property
    def label(self) -> str:
        """What a progress bar calls it: the last two parts of its directory."""
        return "/".join(self.directory.parts[-2:])

    def identity(self) -> dict[str, Any]:
        """What must be equal for the job to be the same, as JSON gives it back."""
        known = {"config": configs.to_dict(self.config), "tokenizer_digest": tokenizer_digest(self.tokenizer)}
        return json.loads(json.dumps(known | self.facts))

    def found(self) -> dict[str, Any] | None:
        """What was measured earlier. Raises MismatchError when the directory holds another job's."""
        path = self.directory / "measured.json"
        if not path.exists():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            asked, measured = saved["asked"], saved["measured"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not what a study leaves ({error}); remove it to measure again.") from None
        changed = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(asked, self.identity())]
        if changed:
            raise MismatchError(
                f"{self.directory} holds a run with another configuration ({'; '.join(changed)}): the two would have been "
                "compared as one. Choose another --out."
            )
        return measured

    def begin(self) -> Training:
        """The run, begun or gone on with."""
        lookup = build_lookup(self.config, self.tokenizer, self.directory)
        facts = {"tokenizer_digest": tokenizer_digest(self.tokenizer), **self.facts}
        return Training(
            self.config, self.directory, self.batches, lookup, evaluate=self.evaluate, facts=facts, resume=True
        )

    def finish(self, run: Training) -> dict[str, Any]:
        """Measure the finished run, and keep what was measured."""
        began = time.perf_counter()
        run.model.eval()
        with torch.no_grad(), autocast(run.config.precision, run.device):
            measured = self.measure(run)
        seconds = [line["seconds"] for line in run.metrics.lines if "seconds" in line]
        measured |= {
            "step_seconds": seconds,
            "measured_seconds": time.perf_counter() - began,
        }
        text = json.dumps({"asked": self.identity(), "measured": measured})
        checkpoints.write_whole(self.directory / "measured.json", text)
        if not self.keep:
            for checkpoint in checkpoints.checkpoints(self.directory / "checkpoints"):
                checkpoints.discard(checkpoint)
        return measured


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write down in OUT/study.json what all runs of a study share. Raises MismatchError when that was something else before."""
    given, path = json.loads(json.dumps(settings)), out / "study.json"
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(saved, given)]
        if changed:
            raise MismatchError(
                f"{out} holds another study ({'; '.join(changed)}): runs of two configurations would have been compared as one. "
                "Choose another --out."
            )
    checkpoints.write_whole(path, json.dumps(given, indent=1, sort_keys=True))


def run_jobs(groups: Sequence[Sequence[Job]]) -> list[list[dict[str, Any]]] | None:
    """Train and measure every job; what was measured, group by group, or None after Ctrl-C.

    Jobs of a group train side by side, a step of each in turn, so that they share whatever else the machine is doing; groups
    follow one another. Finished jobs are not run again, and an interrupted one goes on from its checkpoint.

    Raises MismatchError, before anything is trained, when a directory holds a job of another configuration.
    """
    results = [[job.found() for job in group] for group in groups]
    with interruptible() as stopped, progress_bar() as progress:
        total = sum(job.config.steps for group in groups for job in group)
        every = progress.add_task("all", total=total, loss=float("nan"), speed=0.0)
        for group, found in zip(groups, results, strict=True):
            done = sum(job.config.steps for job, result in zip(group, found, strict=True) if result is not None)
            progress.advance(every, done)
            left = [number for number, result in enumerate(found) if result is None]
            if not _side_by_side([group[number] for number in left], stopped, progress, every):
                return None
            for number in left:
                found[number] = group[number].found()
    return [[result for result in found if result is not None] for found in results]


def _side_by_side(jobs: Sequence[Job], stopped: Callable[[], bool], progress: Progress, every: TaskID) -> bool:
    """Train and measure unfinished jobs, a step of each in turn; False when interrupted."""
    with ExitStack() as stack:
        runs: list[tuple[Job, Training, TaskID]] = []
        for job in jobs:
            run = job.begin()
            stack.callback(run.close)
            if run.lookup:
                stack.callback(run.lookup.table.close)
            bar = progress.add_task(
                job.label, total=job.config.steps, completed=run.done_steps, loss=run.metrics.last_loss, speed=0.0
            )
            stack.callback(progress.remove_task, bar)
            progress.advance(every, run.done_steps)
            runs.append((job, run, bar))
        while active := [entry for entry in runs if not entry[1].done]:
            for _, run, bar in active:
                line = run.step()
                speed = line["tokens"] / line["step"] / line["seconds"]
                progress.update(bar, completed=line["step"], loss=line["loss"], speed=speed)
                progress.update(every, advance=1, loss=line["loss"], speed=speed)
            if stopped():
                for _, run, _ in runs:
                    run.save()
                return False
        for job, run, bar in runs:
            if stopped():
                return False
            progress.update(bar, description=f"{job.label}: measuring")
            job.finish(run)
    return True


def document_losses(measured: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Nats [S, D] and tokens [D] by document, of what each seed's measurement left as "documents"."""
    documents = [one["documents"] for one in measured]
    return np.array([one["nats"] for one in documents]), np.array(documents[0]["tokens"], np.float64)


def step_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over steps of the time against another run's at the same moment: runs of a group take turns."""
    return float(np.median(np.array(seconds) / np.array(base)))


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    on_gpu = torch.cuda.is_available()
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "engram_lm": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
