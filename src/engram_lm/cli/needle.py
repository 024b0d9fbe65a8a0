"""`engram-lm needle`: does a model find what is far away in its context?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Grid
from tyro.conf import Positional

from ..errors import ConfigError, DataError
from ..train.checkpoint import write_whole
from ..train.run import TrainedModel, load_run


@dataclass(frozen=True)
class Needle:
    """Test a trained model's long context: engram-lm needle runs/train --tasks niah_single_1 vt --lengths 512 1024

    The thirteen tasks have the structures of RULER and sentences of our own: niah_single_1 to 3, niah_multikey_1 to 3,
    niah_multivalue and niah_multiquery hide values and ask for them; vt follows a chain of variables; cwe and fwe count words;
    qa_1 and qa_2 ask about documents. Those that hide in text need --haystack, qa needs --questions; the others need nothing.
    Small models seldom write seven digits without a fault: --score preference asks instead whether they prefer the right ones.
    """

    directory: Positional[Path]
    """Run directory."""
    tasks: tuple[str, ...] = ("niah_single_1",)
    """Tasks, or `all` for every one that the given data allows."""
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of a sample with its answer. A length below a task's minimum is refused, with the minimum."""
    count: int = 20
    """Samples of each task and length. RULER takes 500."""
    haystack: str = ""
    """Text to hide in: .txt, .md, .py, .jsonl[.gz|.xz|.zst], .parquet, a directory of such, or hf:DATASET[:SPLIT]."""
    haystack_documents: int = 1000
    """Use so many documents of it."""
    questions: str = ""
    """Questions for qa_1 and qa_2: SQuAD's or XQuAD's JSON, or .jsonl lines of {"question", "answers", "context"}."""
    score: Literal["written", "preference"] = "written"
    """What counts: what the model writes, or whether the right answer is likelier than nine that are not in the text
    (needle tasks with one answer; guessing scores 0.1)."""
    depths: tuple[float, ...] = ()
    """With depths, such as 0 25 50 75 100: also a grid of a single needle by depth (percent) and length."""
    longppl: Path | None = None
    """Run directory of an evaluator: also the perplexity on those tokens of the haystack that, for it, a long context helps with.
    Documents are read to the greatest of the lengths; the short context is a quarter of the run's training length."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    out: Path | None = None
    """JSON file to write. Default: DIRECTORY/needle.json."""

    def run(self, console: Console) -> int:
        """Make samples, let the model answer, print the tables, write the JSON."""
        from ..evaluate.needle import grid, make_samples, prefer_task, read_questions, run_task
        from ..train.precision import autocast
        from ..train.sources import read_documents

        trained = load_run(self.directory, self.device)
        documents = islice(read_documents(self.haystack), self.haystack_documents) if self.haystack else ()
        corpus = [document.text for document in documents]
        questions = read_questions(self.questions) if self.questions else []
        run = run_task if self.score == "written" else prefer_task
        names = self.names(bool(corpus), bool(questions))
        model = (trained.model, trained.lookup, trained.tokenizer)
        samples = {
            (name, length): make_samples(name, trained.tokenizer, length, self.count, self.seed, corpus, questions)
            for name in names
            for length in self.lengths
        }  # all of them before the first answer: a length that is refused costs no time
        results: dict[str, Any] = {
            "run": str(self.directory),
            "step": trained.step,
            "seed": self.seed,
            "lengths": list(self.lengths),
        }
        total = self.count * (len(samples) + len(self.lengths) * len(self.depths))
        with autocast(trained.config.precision, trained.device), progress_bar(console, total) as advance:
            results["tasks"] = {name: {} for name in names}
            for (name, length), drawn in samples.items():
                results["tasks"][name][str(length)] = run(*model, drawn, progress=advance)
            if self.depths:
                results["grid"] = grid(
                    *model, self.lengths, self.depths, self.count, self.seed, corpus, run=run, progress=advance
                )
        if self.longppl:
            results["longppl"] = self.long_perplexity(trained, corpus)
        path = self.out or self.directory / "needle.json"
        write_whole(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print_results(results, console)
        console.print(f"Wrote {path}", soft_wrap=True)
        return 0

    def names(self, corpus: bool, questions: bool) -> list[str]:
        """The tasks that were asked for, each once."""
        from ..evaluate.needle import ONE_ANSWER, TASKS

        if self.tasks != ("all",):
            return list(dict.fromkeys(self.tasks))
        given = {"nothing": True, "corpus": corpus, "questions": questions}
        return [
            name
            for name, task in TASKS.items()
            if given[task.needs] and (self.score == "written" or name in ONE_ANSWER)
        ]

    def long_perplexity(self, trained: TrainedModel, corpus: list[str]) -> dict[str, Any]:
        """LongPPL on those documents of the haystack that are long enough."""
        from ..evaluate.longppl import longppl
        from ..train.precision import autocast
        from ..train.tokenizer import encode_texts

        assert self.longppl is not None
        if not corpus:
            raise ConfigError("--longppl reads the documents of --haystack: name one.")
        evaluator = load_run(self.longppl, self.device)
        short = max(1, trained.config.length // 4)
        sizes = [1 + len(ids) for ids in encode_texts(trained.tokenizer, corpus)]
        texts = [text for text, size in zip(corpus, sizes, strict=True) if size > 2 * short][: self.count]
        if not texts:
            raise DataError(f"--longppl: no document of {self.haystack} is longer than {2 * short} tokens.")
        with autocast(trained.config.precision, trained.device):
            return {"evaluator": str(self.longppl)} | longppl(
                trained, evaluator, texts, trunc_len=short, slide=max(1, short // 4), max_tokens=max(self.lengths)
            )


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """One bar over all samples."""
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def print_results(results: dict[str, Any], console: Console) -> None:
    """Scores with their intervals by task and length, the grid, LongPPL."""
    table = Grid(box=None, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for length in results["lengths"]:
        table.add_column(f"{length} tokens (95 %)", justify="right", no_wrap=True)
    for name, cells in results["tasks"].items():
        metric = next(iter(cells.values()))["metric"]
        table.add_row(name, metric, *(with_interval(cell["score"], cell["interval"]) for cell in cells.values()))
    console.print(table)
    if grid := results.get("grid"):
        console.print(f"\n{grid['task']} by length and depth ({grid['metric']})")
        table = Grid(box=None, pad_edge=False)
        table.add_column("tokens", justify="right")
        for depth in grid["depths"]:
            table.add_column(f"{depth:g} %", justify="right")
        for length, scores in zip(grid["lengths"], grid["scores"], strict=True):
            table.add_row(str(length), *(f"{score:.2f}" for score in scores))
        console.print(table)
    if found := results.get("longppl"):
        value = "none" if found["longppl"] is None else f"{found['longppl']:.4f}"
        console.print(
            f"\nLongPPL {value} on {found['n_key']:,} key tokens of {found['n_candidates']:,}; "
            f"perplexity {found['ppl']:.4f} on all {found['n_tokens']:,} of {found['texts']} documents",
            soft_wrap=True,
        )


def with_interval(score: float, interval: list[float]) -> str:
    """`0.850 (0.640 0.948)`."""
    return f"{score:.3f} ({interval[0]:.3f} {interval[1]:.3f})"
