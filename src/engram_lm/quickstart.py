"""The quickstart: what a memory does to a small language model, in two acts and one report, without a download.

Act one, language: three arms train side by side on the same batches of text and are compared on held-out files.
Act two, facts: the backbone learns made-up people with and without a memory.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Grid
from tokenizers import Tokenizer

from . import __version__
from .analysis.capture import capture_gates
from .analysis.gates import GateView, gate_view
from .errors import CheckpointError
from .evaluate import facts
from .evaluate import loss as losses
from .evaluate.controls import DESCRIPTIONS, Arm, config_of_arm
from .generate import generate
from .model.count import count
from .model.lm import LanguageModel, ModelConfig
from .model.lookup import Lookup
from .model.presets import get_preset
from .report import quickstart as page
from .tables import TableConfig
from .tokens import piece_bytes
from .train.loader import Batches, Loader, windows
from .train.loop import Evaluate, TrainConfig, Training, train_together
from .train.ngrams import count_ngrams
from .train.precision import autocast
from .train.run import build_lookup, prepare_text
from .train.sources import standard_library
from .train.tokenizer import tokenizer_digest

ARMS: tuple[Arm, ...] = ("base", "capacity_1", "engram")


@dataclass(frozen=True)
class Budget:
    """How much of each act is run."""

    steps: int  # of language
    people: int
    exposures: int


BUDGETS = {
    "short": Budget(steps=30, people=1024, exposures=4),
    "standard": Budget(steps=180, people=20_480, exposures=8),
    "long": Budget(steps=2000, people=65_536, exposures=10),
}


@dataclass(frozen=True)
class Settings:
    """What both acts share."""

    budget: Budget
    seed: int = 0
    table: TableConfig = field(default_factory=TableConfig)


def quickstart(data: str, settings: Settings, out: Path, console: Console) -> Path | None:
    """Run both acts into `out` and write its report.html; returns its path, or None after Ctrl-C.

    data: a text source as `read_documents` takes it, or "" for Python's standard library. An interrupted quickstart
    goes on where it stopped.
    """
    if (out / "report.html").exists():
        raise CheckpointError(f"{out} holds a finished quickstart, which would be overwritten. Choose another --out.")
    began = time.perf_counter()
    language = Language(data, get_preset("tiny"), settings, out / "language", console)
    people = Facts(get_preset("tiny"), settings, out / "facts")
    acts: tuple[Act, ...] = (language, people)
    for act in acts:
        console.print(act.title)
        if not act.train():
            console.print(f"Stopped. The same command goes on from the checkpoints in {out}.")
            return None
    console.print("Measuring on held-out files and writing the report ...")
    report = page.Report(
        title="What a memory does to a small language model",
        language=language.result(),
        facts=people.result(),
        run=run_info(settings.seed, time.perf_counter() - began),
        next_steps=next_steps(out),
    )
    page.write_report(out / "report.html", report)
    print_summary(report, console)
    return out / "report.html"


class Act:
    """Arms that train side by side on the same batches."""

    title: str  # what is about to happen, for the terminal
    runs: dict[Arm, Training]

    def train(self) -> bool:
        """Train the arms, a step of each in turn; False when interrupted."""
        return train_together({str(arm): run for arm, run in self.runs.items()})


class Language(Act):
    """Act one: base, capacity-1 control and engram on identical batches of text."""

    length, batch_size, eval_windows = 256, 16, 64

    def __init__(self, data: str, model: ModelConfig, settings: Settings, directory: Path, console: Console) -> None:
        source, budget, self.seed = data or standard_library(), settings.budget, settings.seed
        self.name = "the source of Python's standard library" if source == standard_library() else source
        self.data, self.tokenizer = prepare_text(source, directory, vocab_size=model.vocab_size, say=console.print)
        self.token_bytes = losses.bytes_of_tokens(self.tokenizer)
        self.title = (
            f"Act one, language: {', '.join(ARMS)} on identical batches of {self.name} "
            f"({len(self.data.train.tokens):,} tokens, {len(self.data.val.starts)} files held out)"
        )
        config = TrainConfig(
            model=model,
            steps=budget.steps,
            batch_size=self.batch_size,
            length=self.length,
            seed=self.seed,
            eval_every=max(1, budget.steps // 5),
            checkpoint_every=max(1, budget.steps // 3),
            keep_checkpoints=1,
            table=settings.table,
        )
        batches = Loader(self.data.train, self.batch_size, self.length, self.seed)
        facts = {"data": self.data.meta.train.tokens_crc32}
        self.runs = trainings(ARMS, config, directory, batches, self.tokenizer, self._quick_loss, facts)

    def _quick_loss(self, model: LanguageModel, lookup: Lookup | None) -> dict[str, float]:
        batches = windows(self.data.val, 32, self.length, self.eval_windows)
        return {"val_loss": losses.measure(model, lookup, batches, self.token_bytes).mean}

    def result(self) -> page.LanguageAct:
        """Measure every arm on all held-out text."""
        measured = {}
        for arm, run in self.runs.items():
            with autocast(run.config.precision, run.device):
                batches = windows(self.data.val, 32, self.length)
                measured[arm] = losses.measure(run.model, run.lookup, batches, self.token_bytes)
        arms = {arm: self._arm(arm, measured[arm], measured["base"]) for arm in ARMS}
        text, start = self._held_out_snippet()
        return page.LanguageAct(
            data=f"{self.name} ({len(self.data.train.tokens):,} tokens to draw from)",
            base=arms["base"],
            capacity_1=arms["capacity_1"],
            engram=arms["engram"],
            sample=self._sample(text[:32]),
            gates=self._gates(text, start),
        )

    def _arm(self, arm: Arm, measured: losses.Losses, base: losses.Losses) -> page.Arm:
        run = self.runs[arm]
        size = count(run.config.model, context=self.length)
        steps = [line for line in run.metrics.lines if "loss" in line]
        seconds, base_seconds = step_seconds(run), step_seconds(self.runs["base"])
        delta, delta_interval = losses.difference(measured, base) if arm != "base" else (None, None)
        return page.Arm(
            name=arm.replace("_", "-"),
            description=DESCRIPTIONS[arm],
            parameters=size.total,
            active_parameters=size.active,
            table_parameters=size.tables,
            flops_per_token=size.training_flops,
            bytes_per_token=size.table_bytes_per_token,
            curve=tuple((line["tokens"], line["loss"]) for line in steps),
            val_curve=tuple((line["tokens"], line["val_loss"]) for line in run.metrics.lines if "val_loss" in line),
            val_loss=measured.mean,
            val_interval=measured.interval,
            bits_per_byte=measured.bits_per_byte,
            tokens_per_second=self.batch_size * self.length / float(np.median(seconds)),
            step_ratio=float(np.median(seconds / base_seconds)),  # of the same moment: arms take turns
            delta=delta,
            delta_interval=delta_interval,
        )

    def _held_out_snippet(self, tokens: int = 240) -> tuple[torch.Tensor, str]:
        """Token ids from the middle of the held-out document of median length, from a line's start on, and their place."""
        val = self.data.val
        lengths = np.diff(np.append(val.starts, len(val.tokens)))
        document = int(np.argsort(lengths)[len(lengths) // 2])
        first, last = int(val.starts[document]), int(val.starts[document] + lengths[document])
        newlines = [
            token for token in set(val.tokens[first:last].tolist()) if self.tokenizer.decode([token]).endswith("\n")
        ]
        starts = first + 1 + np.flatnonzero(np.isin(val.tokens[first : last - 1], newlines))
        middle = starts[starts <= max(first + int(lengths[document]) // 2, last - tokens)]
        start = int(middle[-1]) if len(middle) else first
        ids = val.tokens[start : min(start + tokens, last)].astype(np.int64)
        return torch.from_numpy(ids), f"from held-out document {document + 1} of {len(lengths)}"

    def _sample(self, prompt: torch.Tensor) -> page.Sample:
        run = self.runs["engram"]
        written = generate(
            run.model, run.lookup, prompt[None].to(run.device), 160, temperature=0.8, top_k=40, seed=self.seed
        )[0]
        return page.Sample(
            prompt=self.tokenizer.decode(prompt.tolist()),
            continuation=self.tokenizer.decode(written[len(prompt) :].tolist()),
            settings="temperature 0.8, top 40, with the key-value cache",
        )

    def _gates(self, tokens: torch.Tensor, source: str) -> GateView:
        run = self.runs["engram"]
        assert run.lookup is not None
        assert run.config.model.memory is not None
        memory = run.config.model.memory.hash
        canonical = run.lookup.vocabulary(torch.from_numpy(self.data.train.tokens.astype(np.int64)))
        return gate_view(
            [piece_bytes(self.tokenizer.id_to_token(token) or "") for token in tokens.tolist()],
            capture_gates(run.model, run.lookup, tokens.to(run.device)),
            layers=memory.layers,
            orders=memory.orders,
            source=source,
            seen=count_ngrams(canonical.numpy(), run.lookup.vocabulary(tokens).numpy(), memory.orders),
        )


class Facts(Act):
    """Act two: made-up people, learned with and without a memory in equally many exposures."""

    steps_per_exposure = 32

    def __init__(self, model: ModelConfig, settings: Settings, directory: Path) -> None:
        budget = settings.budget
        self.people = facts.People.invent(budget.people, settings.seed)
        self.title = f"Act two, facts: {len(self.people):,} made-up people, {4 * len(self.people):,} facts"
        batches = facts.Exposures(self.people, budget.people // self.steps_per_exposure, settings.seed)
        asked = self.people.first(2048)  # for the curve; the final figure asks about everyone
        config = TrainConfig(
            model=replace(model, vocab_size=len(self.people.words)),
            steps=self.steps_per_exposure * budget.exposures,
            batch_size=batches.batch_size,
            length=facts.SENTENCE - 1,
            seed=settings.seed,
            eval_every=self.steps_per_exposure,
            checkpoint_every=self.steps_per_exposure * 2,
            keep_checkpoints=1,
            table=settings.table,
        )
        recall = lambda model, lookup: facts.recall(model, lookup, asked)  # noqa: E731
        self.runs = trainings(("base", "engram"), config, directory, batches, self.people.tokenizer(), recall)

    def result(self, shown: int = 6) -> page.FactsAct:
        """Recall over exposures, and some questions with both models' answers."""
        chosen = torch.arange(shown)
        attributes = chosen % len(facts.ATTRIBUTES)
        questions = torch.cat(
            [self.people.questions(int(a))[i : i + 1] for i, a in zip(chosen, attributes, strict=True)]
        )
        said = {arm: facts.answers(run.model, run.lookup, questions) for arm, run in self.runs.items()}
        words = self.people.words
        examples = tuple(
            page.FactExample(
                question=self.people.text(questions[i, 1:]) + " ...",
                answer=words[int(self.people.values[i, attributes[i]])],
                base_answer=words[int(said["base"][i])],
                engram_answer=words[int(said["engram"][i])],
            )
            for i in range(shown)
        )
        sizes = [len(values.unique()) for values in self.people.values.unbind(1)]
        return page.FactsAct(
            people=len(self.people),
            questions=self.people.values.numel(),
            chance=sum(1 / size for size in sizes) / len(sizes),
            base=self._arm("base"),
            engram=self._arm("engram"),
            examples=examples,
        )

    def _arm(self, arm: Arm) -> page.FactsArm:
        run = self.runs[arm]
        size = count(run.config.model)
        curve = [
            (line["step"] / self.steps_per_exposure, line["recall"]) for line in run.metrics.lines if "recall" in line
        ]
        with autocast(run.config.precision, run.device):  # as the curve was measured
            final = facts.recall(run.model, run.lookup, self.people)
        return page.FactsArm(
            name=arm,
            parameters=size.total,
            table_parameters=size.tables,
            recall=(*curve[:-1], (curve[-1][0], final["recall"])),
            by_attribute=tuple(page.AttributeRecall(name, final[name]) for name in facts.ATTRIBUTES),
        )


# --- shared by both acts --------------------------------------------------------------------------------------------


def trainings(
    arms: Sequence[Arm],
    config: TrainConfig,
    directory: Path,
    batches: Batches,
    tokenizer: Tokenizer,
    evaluate: Evaluate,
    facts: dict[str, Any] | None = None,
) -> dict[Arm, Training]:
    """A run of each arm in a directory of its own, begun or gone on with."""
    facts = {"tokenizer_digest": tokenizer_digest(tokenizer), **(facts or {})}
    runs = {}
    for arm in arms:
        of_arm = config_of_arm(config, arm)
        lookup = build_lookup(of_arm, tokenizer, directory / arm)
        runs[arm] = Training(of_arm, directory / arm, batches, lookup, evaluate=evaluate, facts=facts, resume=True)
    return runs


def step_seconds(run: Training) -> np.ndarray:
    """Time of each step [steps]."""
    return np.array([line["seconds"] for line in run.metrics.lines if "seconds" in line])


def run_info(seed: int, wall_seconds: float) -> page.RunInfo:
    """Where the figures come from."""
    device = (
        "GPU " + torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, {os.cpu_count()} cores"
    )
    return page.RunInfo(
        command=" ".join(["engram-lm", *sys.argv[1:]]),
        seed=seed,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        wall_seconds=wall_seconds,
        machine=f"{device}, {platform.system()} {platform.machine()}",
        versions=(f"engram-lm {__version__}", f"torch {torch.__version__}", f"Python {platform.python_version()}"),
        uncertainty=(
            "Intervals are 95 % intervals over the held-out files (a ratio estimator with files as the unit; differences are "
            "paired file by file). They say how the figures would move with other held-out text; another seed may move "
            "them as well."
        ),
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def next_steps(out: Path) -> tuple[page.Command, ...]:
    """Commands to go on with."""
    return (
        page.Command("engram-lm quickstart --data my_texts/ --out runs/mine", "the same on your own text"),
        page.Command("engram-lm quickstart --budget long --out runs/long", "more training: does the gain last?"),
        page.Command(f"engram-lm generate {out}/language/engram --prompt 'def '", "let the model with memory write"),
        page.Command("engram-lm train tiny --data my_texts/ --out runs/tiny", "train one model, every setting yours"),
        page.Command("engram-lm count engram-27b", "what the paper's 27B model is made of"),
    )


def print_summary(report: page.Report, console: Console) -> None:
    """A short table for the terminal."""
    language = Grid("language", "val loss", "over base", "bits a byte", "step time", box=None, pad_edge=False)
    for arm in report.language.arms:
        over = "" if arm.delta is None else f"{arm.delta:+.3f} ± {arm.delta_interval:.3f}"
        loss = f"{arm.val_loss:.3f} ± {arm.val_interval:.3f}"
        language.add_row(arm.name, loss, over, f"{arm.bits_per_byte:.3f}", f"{arm.step_ratio:.2f} x")
    console.print(language)
    if report.facts:
        recalls = Grid("facts", "exposures", "recall", box=None, pad_edge=False)
        for one in (report.facts.base, report.facts.engram):
            recalls.add_row(one.name, f"{one.recall[-1][0]:.0f}", f"{one.final:.1%}")
        console.print(recalls)
