"""Loss on real text: base, additive bigram, capacity-1 and engram, three seeds, in as many steps as there is time for."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from engram_lm.evaluate.controls import Arm, config_of_arm
from engram_lm.evaluate.loss import Losses, bytes_of_tokens, measure
from engram_lm.model import ModelConfig, get_preset
from engram_lm.statistics import over_documents, over_seeds
from engram_lm.tables import TableConfig
from engram_lm.train.loader import Loader, windows
from engram_lm.train.loop import TrainConfig, Training
from engram_lm.train.precision import autocast
from engram_lm.train.run import build_lookup, fit_vocabulary, prepare_text
from engram_lm.train.sources import standard_library

from .bench import Bench, without_kernels

ARMS: tuple[Arm, ...] = ("base", "bigram", "capacity_1", "engram")
SEEDS = 3
STEPS = 3000  # at most
WINDOWS = 1024  # of held-out text
RESERVE = 0.75  # of the time that is left when training begins; evaluation and the rest take some


def run(bench: Bench) -> None:
    """A seed after the other; the arms of a seed see the same batches, a step of each in turn."""
    with TemporaryDirectory() as directory, without_kernels() if bench.dry else nullcontext():
        out = Path(directory)
        source, config = bench.data or standard_library(), start(bench)
        text, tokenizer = prepare_text(source, out, vocab_size=config.model.vocab_size, say=bench.note)
        config = fit_vocabulary(config, tokenizer)
        sizes = bytes_of_tokens(tokenizer)

        def begin(arm: Arm, seed: int, steps: int, name: str) -> Training:
            of_arm = replace(config_of_arm(config, arm), seed=seed, steps=steps)
            place = out / name / arm
            place.mkdir(parents=True)
            batches = Loader(text.train, config.batch_size, config.length, seed)
            return Training(of_arm, place, batches, build_lookup(of_arm, tokenizer, place))

        def losses(run: Training) -> Losses:
            run.model.eval()
            with torch.no_grad(), autocast(run.config.precision, run.device):
                held_out = windows(text.val, 32, config.length, bench.size(WINDOWS, 4))
                return measure(run.model, run.lookup, held_out, sizes)

        each = seconds_of_a_step({arm: begin(arm, 0, STEPS, "trial") for arm in ARMS}, bench.size(10, 1))
        steps = bench.size(max(20, min(STEPS, int(RESERVE * bench.left / SEEDS / each))), 2)
        read = steps * config.batch_size * config.length
        bench.note(
            f"{steps} steps of {config.batch_size * config.length} tokens an arm and seed ({read / 1e6:.1f} M), of {len(text.train.tokens) / 1e6:.1f} M in {Path(source).name}"
        )
        found: dict[Arm, list[Losses]] = {arm: [] for arm in ARMS}
        for seed in range(bench.size(SEEDS, 2)):
            group = {
                arm: begin(arm, seed, steps + 1, f"seed-{seed}") for arm in ARMS
            }  # the last step would leave a checkpoint
            take_turns(group, steps)
            for arm, run in group.items():
                found[arm].append(losses(run))
                close(run)
    report(bench, found)


def start(bench: Bench) -> TrainConfig:
    """The engram arm: the small preset, narrower, so that minutes are enough for it to learn something."""
    small = get_preset("small")
    assert small.memory is not None
    narrow: ModelConfig = replace(
        small,
        vocab_size=8192,
        dim=512,
        layers=8,
        attention=replace(small.attention, heads=8, kv_heads=8),
        ffn_width=1536,
        memory=replace(small.memory, hash=replace(small.memory.hash, rows_per_head=100_000, layers=(1, 4))),
    )
    tiny = replace(get_preset("tiny"), vocab_size=300, dim=32, layers=2)
    tiny_hash = replace(tiny.memory.hash, rows_per_head=97) if tiny.memory else None
    tiny = replace(tiny, memory=replace(tiny.memory, hash=tiny_hash)) if tiny.memory else tiny
    batch_size, length = bench.size((32, 256), (2, 16))
    return TrainConfig(
        model=bench.size(narrow, tiny),
        table=TableConfig(tier="device"),
        batch_size=batch_size,
        length=length,
        eval_every=0,
        checkpoint_every=0,
        precision=bench.size("bfloat16", "float32"),
        device=str(bench.device),
        prefetch=not bench.dry,  # Triton's interpreter takes one thread
    )


def seconds_of_a_step(group: dict[Arm, Training], steps: int) -> float:
    """Of one of each arm, once everything is compiled."""
    take_turns(group, steps)
    began = time.monotonic()
    take_turns(group, steps)
    seconds = (time.monotonic() - began) / steps
    for run in group.values():
        close(run)
    return seconds


def take_turns(group: dict[Arm, Training], steps: int) -> None:
    for _ in range(steps):
        for run in group.values():
            run.step()


def close(run: Training) -> None:
    run.close()
    if run.lookup:
        run.lookup.table.close()


def report(bench: Bench, found: dict[Arm, list[Losses]]) -> None:
    """Losses, and differences to engram: paired over documents, and over seeds."""
    tokens = found["base"][0].tokens
    nats: dict[Arm, np.ndarray[Any, Any]] = {arm: np.stack([one.nats for one in own]) for arm, own in found.items()}
    for arm, own in nats.items():
        seeds = own.sum(1) / tokens.sum()
        bench.value(
            f"loss of {arm}", float(seeds.mean()), (seeds.min(), seeds.max()), "lowest and highest seed", "nats"
        )
    for arm in ARMS[:-1]:
        change, interval = over_documents(nats["engram"], nats[arm], tokens)
        bench.value(f"engram less {arm}", change, interval, "95 % over documents", "nats")
        spread = over_seeds((nats["engram"] - nats[arm]).sum(1) / tokens.sum())
        if spread:
            bench.value(f"engram less {arm}", spread[0], spread[1:], "95 % over seeds", "nats")
