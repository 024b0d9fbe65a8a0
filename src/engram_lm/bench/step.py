"""A training step: what a memory adds to it, by the size of its table, and with rows fetched ahead or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..train.allocator import keep_freed_memory
from ..train.loader import Loader
from ..train.loop import TrainConfig, Training
from ..train.run import build_lookup, fit_vocabulary, prepare_text
from .measure import Contender, Meter
from .results import Results

STEPS = 4  # in a row, so that what a step does ahead for the next is paid by its own arm


def bench_step(
    config: TrainConfig, data: str, directory: Path, *, growth: Sequence[int] = (8, 64), rounds: int = 12
) -> Results:
    """Time of training steps with and without the memory of `config`, on the same batches of the text `data`.

    growth: tables so many times as large, as further arms. The runs are made in `directory`.
    """
    keep_freed_memory()
    meter = Meter("step", rounds)
    text, tokenizer = prepare_text(data, directory, vocab_size=config.model.vocab_size, say=lambda _: None)
    config = replace(fit_vocabulary(config, tokenizer), steps=STEPS * (rounds + 3), eval_every=0, checkpoint_every=0)
    batches = Loader(text.train, config.batch_size, config.length, config.seed)
    with ExitStack() as running:
        contenders = []
        for name, arm in arms(config, growth).items():
            lookup = build_lookup(arm, tokenizer, directory / name)
            if lookup:
                running.callback(lookup.table.close)
            training = Training(arm, directory / name, batches, lookup)
            running.callback(training.close)
            note = f"{lookup.table.num_rows:,} rows" if lookup else ""
            contenders.append(Contender(name, partial(take_steps, training), math.isfinite, note=note))
        meter.measure(
            f"a step of {config.batch_size} x {config.length} tokens, {STEPS} in a row", contenders, work=STEPS
        )
    return meter.results()


def arms(config: TrainConfig, growth: Sequence[int]) -> dict[str, TrainConfig]:
    """What is compared; ratios are over the first."""
    memory = config.model.memory
    if memory is None:
        raise ConfigError("bench step measures what a memory costs; this model has none.")

    def hashed(**changes: Any) -> TrainConfig:
        return replace(
            config, model=replace(config.model, memory=replace(memory, hash=replace(memory.hash, **changes)))
        )

    rows = memory.hash.rows_by_order
    return {
        "base": replace(config, model=replace(config.model, memory=None)),
        "capacity 1": hashed(scheme="capacity_1"),
        "engram": config,
        "engram, no prefetch": replace(config, prefetch=False),
        **{f"engram, table x {times}": hashed(rows_per_head=tuple(times * size for size in rows)) for times in growth},
    }


def take_steps(training: Training) -> float:
    """Some steps, and what the last of them began to prepare; its loss."""
    for _ in range(STEPS):
        loss = training.step()["loss"]
    if training.ahead:
        training.ahead.result()
    return loss
