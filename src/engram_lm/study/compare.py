"""`engram-lm compare`: arms that differ in one thing, several seeds, the same batches, and what they are equal in.

OUT/
  study.json                        what all arms share
  tokenizer.json  shards/           the text
  arms/NAME/seed-S/                 a run each; measured.json when it is finished
  results.json                      everything that the report shows
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tyro.conf import arg

from .. import config as configs
from ..analysis.probes import compare_runs, probe, timed
from ..errors import ConfigError
from ..evaluate.controls import ARMS, DESCRIPTIONS, Arm, config_of_arm
from ..evaluate.loss import bytes_of_tokens, measure, measure_tokens
from ..evaluate.slices import Slicing, compare_slices, slice_losses, slicings
from ..model.count import Count, count
from ..model.lm import LanguageModel
from ..model.lookup import Lookup, build_vocabulary
from ..statistics import over_documents, over_seeds, ratio_interval
from ..train import checkpoint as checkpoints
from ..train.loader import Batch, Loader, windows
from ..train.loop import TrainConfig, Training
from ..train.precision import autocast
from ..train.run import fit_vocabulary, load_run, prepare_text
from ..train.shards import TokenData
from .runs import Job, document_losses, environment, keep_settings, run_jobs, step_ratio

Say = Callable[[str], None]
EVAL_BATCH = 32


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of arms of one model with a memory."""

    train: Annotated[TrainConfig, arg(name="")]
    """The engram arm's run; the other arms follow from it. """
    arms: tuple[Arm, ...] = ARMS
    """base and engram are always among them."""
    seeds: int = 3
    """How many, from `train.seed` on: of weights and of the order of batches."""
    eval_windows: int = 1024
    """Held-out windows that losses are measured on, spread evenly over the documents; 0 for all."""

    def __post_init__(self) -> None:
        if self.train.model.memory is None:
            raise ConfigError("compare starts from a model with a memory; this one has none to compare with.")
        if self.seeds < 1 or self.eval_windows < 0:
            raise ConfigError(f"seeds {self.seeds} must be at least 1 and eval_windows {self.eval_windows} at least 0.")
        missing = {"base", "engram"} - set(self.arms)
        if missing:
            raise ConfigError(f"arms {self.arms} lack {', '.join(sorted(missing))}: differences would have no origin.")

    @property
    def all_seeds(self) -> range:
        """The seeds that every arm is trained with."""
        return range(self.train.seed, self.train.seed + self.seeds)


@dataclass(frozen=True, eq=False)
class Text:
    """Shards, their tokenizer, and what an arm reads of them."""

    data: TokenData
    tokenizer: Tokenizer
    config: CompareConfig
    token_bytes: torch.Tensor = field(repr=False)

    def loader(self, seed: int) -> Loader:
        """Training batches of one seed."""
        train = self.config.train
        return Loader(self.data.train, train.batch_size, train.length, seed)

    def held_out(self, limit: int = 0) -> Iterator[Batch]:
        """Held-out batches; limit: of windows, 0 for as many as the comparison measures."""
        return windows(self.data.val, EVAL_BATCH, self.config.train.length, limit or self.config.eval_windows or None)

    @cache  # noqa: B019  (one text a study; counting takes seconds)
    def slicings(self, seed: int) -> dict[str, Slicing]:
        """Slices of the held-out text by what a run of this seed has read."""
        memory = self.config.train.model.memory
        assert memory is not None
        vocabulary = build_vocabulary(memory.hash, self.tokenizer)
        return slicings(
            self.held_out(),
            self.loader(seed).first(self.config.train.steps),
            self.tokenizer,
            vocabulary,
            memory.hash.orders,
        )


def compare(
    config: CompareConfig,
    data: str,
    out: Path,
    *,
    tokenizer: str = "",
    command: str = "",
    say: Say = print,
) -> dict[str, Any] | None:
    """Train and measure every arm in `out`; returns what results.json holds, or None after Ctrl-C.

    data, tokenizer: as `prepare_text` takes them. The same command goes on with an interrupted comparison; more arms and seeds
    may be asked for than before.

    Raises MismatchError when `out` holds a comparison of another configuration or text.
    """
    began = time.perf_counter()
    shards, made = prepare_text(data, out, tokenizer=tokenizer, vocab_size=config.train.model.vocab_size, say=say)
    config = replace(config, train=fit_vocabulary(config.train, made))
    text = Text(shards, made, config, bytes_of_tokens(made))
    runs, same = distinct_arms(config)
    shared = {"kind": "compare", "train": configs.to_dict(config.train), "eval_windows": config.eval_windows}
    keep_settings(out, shared)
    say(
        f"{len(runs)} arms x {config.seeds} seeds, {config.train.steps:,} steps of "
        f"{config.train.batch_size * config.train.length:,} tokens each, on identical batches of {shards.meta.source}"
    )
    groups = [
        [_job(arm, of_arm, seed, text, out / "arms" / arm / f"seed-{seed}") for arm, of_arm in runs.items()]
        for seed in config.all_seeds
    ]
    measured = run_jobs(groups)
    if measured is None:
        say(f"Stopped. The same command goes on from the checkpoints in {out}.")
        return None
    by_arm = {arm: [group[number] for group in measured] for number, arm in enumerate(runs)}
    say("Probing the first seed's memory ...")
    results = summarise(text, by_arm, same) | {
        "probes": probes(text, out),
        "command": command,
        "config": configs.to_dict(config),
        "environment": environment(),
        "minutes": sum(sum(one["step_seconds"]) + one["measured_seconds"] for group in measured for one in group) / 60,
        "wall_minutes": (time.perf_counter() - began) / 60,
        "seeds": list(config.all_seeds),
    }
    checkpoints.write_whole(out / "results.json", json.dumps(results, indent=1))
    return results


def distinct_arms(config: CompareConfig) -> tuple[dict[Arm, TrainConfig], dict[Arm, Arm]]:
    """Arms that are runs of their own with their configurations, and arms that came out as the same model as an earlier one."""
    runs: dict[Arm, TrainConfig] = {}
    same: dict[Arm, Arm] = {}
    for arm in ARMS:
        if arm in config.arms:
            of_arm = config_of_arm(config.train, arm)
            twin = next((earlier for earlier, known in runs.items() if known == of_arm), None)
            if twin:
                same[arm] = twin
            else:
                runs[arm] = of_arm
    return runs, same


def _job(arm: Arm, config: TrainConfig, seed: int, text: Text, directory: Path) -> Job:
    def quick(model: LanguageModel, lookup: Lookup | None) -> dict[str, float]:
        return {"val_loss": measure(model, lookup, text.held_out(64), text.token_bytes).mean}

    def measured(run: Training) -> dict[str, Any]:
        each = measure_tokens(run.model, run.lookup, text.held_out())
        losses = each.by_document(text.token_bytes)
        return {
            "documents": {
                "nats": losses.nats.tolist(),
                "tokens": losses.tokens.tolist(),
                "bytes": losses.bytes.tolist(),
            },
            "slices": {kind: slice_losses(each, slicing) for kind, slicing in text.slicings(seed).items()},
            "curve": [(line["tokens"], line["loss"]) for line in run.metrics.lines if "loss" in line],
            "val_curve": [(line["tokens"], line["val_loss"]) for line in run.metrics.lines if "val_loss" in line],
        }

    return Job(
        directory=directory,
        config=replace(config, seed=seed),
        batches=text.loader(seed),
        tokenizer=text.tokenizer,
        measure=measured,
        evaluate=quick,
        facts={"text": text.data.meta.train.tokens_crc32, "arm": arm, "eval_windows": text.config.eval_windows},
        keep=True,
    )


def summarise(text: Text, measured: dict[Arm, list[dict[str, Any]]], same: dict[Arm, Arm]) -> dict[str, Any]:
    """The part of results.json that follows from what was measured; measured: of each arm, seed by seed."""
    train, meta = text.config.train, text.data.meta
    sizes = {arm: count(config_of_arm(train, arm).model, context=train.length) for arm in measured}
    arms = {arm: _summary(arm, measured, sizes) for arm in measured}
    for arm, twin in same.items():
        arms[arm] = arms[twin] | {"description": DESCRIPTIONS[arm], "same_as": twin}
    return {
        "data": {
            "source": meta.source,
            "train_tokens": meta.train.tokens,
            "train_documents": meta.train.documents,
            "held_out_tokens": int(sum(measured["base"][0]["documents"]["tokens"])),
            "held_out_documents": len(measured["base"][0]["documents"]["tokens"]),
            "read_tokens": train.steps * train.batch_size * train.length,
        },
        "arms": {arm: arms[arm] for arm in ARMS if arm in arms},
        "slices": {
            kind: compare_slices({arm: [one["slices"][kind] for one in own] for arm, own in measured.items()})
            for kind in measured["base"][0]["slices"]
        },
    }


def probes(text: Text, out: Path) -> dict[str, Any]:
    """What the first seed's memory does (analysis/probes.py), and how its layers compare with those of base."""
    seed, train = text.config.train.seed, text.config.train
    base, engram = (load_run(out / "arms" / arm / f"seed-{seed}", train.device) for arm in ("base", "engram"))
    with torch.no_grad(), autocast(train.precision, engram.device):
        found = probe(
            engram.model,
            engram.lookup,
            text.data.val,
            text.loader(seed).first(train.steps),
            text.tokenizer,
            batch_size=EVAL_BATCH,
            length=train.length,
            tokens=train.steps * train.batch_size * train.length,
        )
        seconds = found["seconds"]
        with timed(seconds, "layers"):
            found |= compare_runs(engram, base, text.data.val, ("engram", "base"))
        seconds["ratio"] += seconds["layers"] / seconds["evaluation"]
    return found


def _summary(arm: Arm, measured: dict[Arm, list[dict[str, Any]]], sizes: dict[Arm, Count]) -> dict[str, Any]:
    """One arm in results.json."""
    own, size, first = measured[arm], sizes[arm], measured[arm][0]
    nats, tokens = document_losses(own)
    bits = nats.mean(0).sum() / np.log(2) / sum(first["documents"]["bytes"])
    against = _against(arm, measured, sizes)
    return {
        "description": DESCRIPTIONS[arm],
        "equal": _equal(against),
        "same_as": None,
        "against_engram": against,
        "parameters": {"total": size.total, "active": size.active, "tables": size.tables},
        "flops_per_token": size.training_flops,
        "bytes_per_token": size.table_bytes_per_token,
        "step_seconds": float(np.median(np.concatenate([one["step_seconds"] for one in own]))),
        "loss": float(nats.mean(0).sum() / tokens.sum()),
        "interval": ratio_interval(nats.mean(0), tokens),
        "seeds": [float(one.sum() / tokens.sum()) for one in nats],
        "bits_per_byte": float(bits),
        "less": {other: _less(own, measured[other]) for other in measured if other != arm},
        "curve": first["curve"],
        "val_curve": first["val_curve"],
    }


def _less(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's loss less another's: paired over documents, and over seeds."""
    (mine, tokens), (theirs, _) = document_losses(own), document_losses(other)
    change, interval = over_documents(mine, theirs, tokens)
    seeds = (mine - theirs).sum(1) / tokens.sum()
    spread = over_seeds(seeds)
    return {
        "difference": change,
        "interval": interval,
        "seeds": seeds.tolist(),
        "seed_interval": None if spread is None else spread[1:],
    }


def _against(arm: Arm, measured: dict[Arm, list[dict[str, Any]]], sizes: dict[Arm, Count]) -> dict[str, float]:
    """Sizes and step time as multiples of the engram arm's."""
    own, engram = sizes[arm], sizes["engram"]
    pairs = zip(measured[arm], measured["engram"], strict=True)
    return {
        "flops": own.training_flops / engram.training_flops,
        "active": own.active / engram.active,
        "total": own.total / engram.total,
        "seconds": float(np.median([step_ratio(one["step_seconds"], other["step_seconds"]) for one, other in pairs])),
    }


def _equal(against: dict[str, float]) -> str:
    """What an arm and the engram arm have in common, and what they do not."""
    names = {"flops": "FLOPs", "active": "active parameters", "total": "parameters in all", "seconds": "step time"}
    return ", ".join(["same tokens", *(f"{name} {against[key]:.3g} x" for key, name in names.items())])
