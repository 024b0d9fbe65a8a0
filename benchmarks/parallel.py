"""A training step of the tiny preset on several processes: what a memory adds to it, and what dividing it costs.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/parallel.py [--data SOURCE] [--json FILE]

Every process has 16 sequences of 256 tokens of real text, one thread, and the same steps:

    base            no memory
    capacity 1      the memory's branch, but every n-gram reads the same rows
    engram          the memory, its rows divided among the processes
    engram, FSDP2   and the backbone too
    alone           the process of rank 0 by itself, with a table of its own, while the others sleep: base and engram

Contenders take four steps in turn, round after round; a step lasts as long as its slowest process. Its communication is the time in
which the main thread of rank 0 waits in collectives and for rows, and so holds waiting for a slower process too. The ids' exchange, which a thread makes
ahead, is not in it, nor are FSDP2's own collectives. The bytes that the table sends are
compared with those that `engram-lm plan` foresees from the held-out text.
"""

import argparse
import json
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from rich.console import Console

from engram_lm.bench.measure import fixed_work, timed
from engram_lm.bench.results import Case, Entry, Results
from engram_lm.machine import describe_machine
from engram_lm.model.presets import get_preset
from engram_lm.study.growth import measure_growth
from engram_lm.study.plan import Tables, place
from engram_lm.tables.sharded import Exchange
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.loader import Loader
from engram_lm.train.loop import TrainConfig, Training
from engram_lm.train.parallel import ParallelConfig, start_ranks
from engram_lm.train.ranks import Ranks
from engram_lm.train.run import build_lookup, fit_vocabulary, prepare_text
from engram_lm.train.shards import TokenData
from engram_lm.train.sources import standard_library

STEPS = 4  # in a row, so that what a step does ahead for the next is paid by its own contender
SEQUENCES, LENGTH = 16, 256  # of a process


class Clock:
    """Seconds that the main thread spends in what is `watched`."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timing(*arguments: Any, **options: Any) -> Any:
            if self.inside or threading.current_thread() is not threading.main_thread():
                return call(*arguments, **options)
            self.inside, began = True, time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.inside = False
                self.seconds += time.perf_counter() - began

        return timing


@contextmanager
def watching(clock: Clock) -> Iterator[None]:
    """All that a step of ours waits for."""
    for name in ("all_reduce", "all_to_all_single"):
        setattr(dist, name, clock.watched(getattr(dist, name)))
    Exchange.rows = clock.watched(Exchange.rows)  # type: ignore[method-assign]
    Exchange.give = clock.watched(Exchange.give)  # type: ignore[method-assign]
    yield


def contenders(
    config: TrainConfig, tokenizer: Any, batches: Loader, few: Loader, out: Path, ranks: Ranks
) -> dict[str, Any]:
    """Trainings by name; None for those of rank 0 alone on the other ranks."""
    memory = config.model.memory
    base = replace(config, model=replace(config.model, memory=None))
    one_row = replace(
        config, model=replace(config.model, memory=replace(memory, hash=replace(memory.hash, scheme="capacity_1")))
    )
    sharded = replace(config, parallel=ParallelConfig(shard=True))
    found: dict[str, Any] = {}
    if ranks.size > 1:
        for name, arm in {"base": base, "capacity 1": one_row, "engram": config, "engram, FSDP2": sharded}.items():
            lookup = build_lookup(arm, tokenizer, out / name, ranks=ranks)
            found[name] = Training(arm, out / name, batches, lookup, ranks=ranks)
    for name, arm in {"base, alone": base, "engram, alone": config}.items():
        single = replace(arm, batch_size=SEQUENCES)
        found[name] = None
        if ranks.rank == 0:
            found[name] = Training(single, out / name, few, build_lookup(single, tokenizer, out / name))
    return found


def take_steps(training: Training | None) -> None:
    if training:
        for _ in range(STEPS):
            training.step()
        if training.ahead:
            training.ahead.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=standard_library())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    ranks = start_ranks(300, "cpu")
    console = Console(quiet=ranks.rank > 0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as own, watching(clock):
        out = Path(ranks.everyones(own)[0])
        text, tokenizer = prepare_text(options.data, out, say=console.print, ranks=ranks)
        config = fit_vocabulary(
            TrainConfig(get_preset("tiny"), batch_size=SEQUENCES * ranks.size, length=LENGTH, threads=1, device="cpu",
                        steps=STEPS * (options.rounds + 2), eval_every=0, checkpoint_every=10**6),
            tokenizer,
        )  # fmt: skip
        batches, few = (Loader(text.train, size, LENGTH) for size in (config.batch_size, SEQUENCES))
        found = contenders(config, tokenizer, batches, few, out, ranks)
        seconds: dict[str, list[float]] = {name: [] for name in found}
        waiting: dict[str, list[float]] = {name: [] for name in found}
        calibration = []
        names = list(found)
        for number in range(options.rounds + 1):
            calibration.append(timed(fixed_work))
            for position in range(len(names)):
                name = names[(number + position) % len(names)]
                ranks.everyones(None)
                clock.seconds = 0.0
                took = timed(take_steps, found[name])
                waited = clock.seconds
                seconds[name].append(max(ranks.everyones(took)) / STEPS)
                waiting[name].append(waited / took if found[name] else 0.0)
        entries = []
        for name in names:
            share = float(np.median(waiting[name][1:]))
            entries.append(Entry(name, tuple(seconds[name][1:]), f"{100 * share:.0f} % communication"))
        case = Case(
            f"a step of {SEQUENCES} x {LENGTH} tokens a process, {STEPS} in a row, {ranks.size} processes",
            tuple(entries),
        )
        machine = describe_machine() | {"processes": ranks.size}
        results = Results("parallel", (case,), Entry("a matrix product", tuple(calibration)), {}, machine)
        console.print(results)
        for over, under in (("engram", "base"), ("engram", "capacity 1"), ("engram, alone", "base, alone"),
                            ("base", "base, alone"), ("engram", "engram, alone")):  # fmt: skip
            if over in seconds and under in seconds:
                ratios = np.array(seconds[over][1:]) / np.array(seconds[under][1:])
                low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
                console.print(f"{over} over {under}: {middle:.3f} ({low:.3f} to {high:.3f})")
        sent = {}
        if ranks.size > 1:
            sent = bytes_sent(found["engram"], ranks, text)
            console.print(
                "bytes that a rank sends to others in a step: {counted:,.0f}, planned {planned:,.0f}".format(**sent)
            )
        if options.json and ranks.rank == 0:
            extra = {"communication": waiting, "bytes": sent}
            options.json.write_text(json.dumps({**results.json(), **extra}, indent=1) + "\n")
        for training in found.values():
            if training:
                training.close()
        ranks.everyones(None)
    dist.destroy_process_group()


def bytes_sent(training: Training, ranks: Ranks, text: TokenData) -> dict[str, float]:
    """A rank's bytes a step to others: as the table counted, and as the plan foresees them from the held-out text."""
    table, config = training.lookup.table, training.config
    counted = float(np.mean(ranks.everyones(table.sent.total))) / training.done_steps
    hashing, tokens = config.model.memory.hash, SEQUENCES * LENGTH
    growth = measure_growth(text.val, training.lookup.vocabulary, hashing, batch=tokens, length=LENGTH)
    planned = place(Tables.of("tiny", config.model), growth, ranks=ranks.size, tokens=tokens).sent.total
    return {"counted": counted, "planned": planned}


if __name__ == "__main__":
    main()
