"""`engram-lm sweep`: what more rows buy, and how sparse parameters are best split between experts and memory.

memory        one backbone, the same batches, tables of many sizes: loss against log10(rows)       (paper 3.2, figure 3 right)
allocation    equal parameters and equal FLOPs at every point: loss against the experts' share     (paper 3.1, figure 3 left)

OUT/
  study.json                        what all points share
  tokenizer.json  shards/           the text
  points/NAME/seed-S/               a run each; measured.json when it is finished
  results.json                      points, fits, and the paper's curves under the same fits
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from tokenizers import Tokenizer

from .. import config as configs
from ..errors import ConfigError
from ..evaluate.controls import config_of_arm
from ..evaluate.loss import bytes_of_tokens, measure
from ..hashing import HashConfig, HashPlan
from ..memory import EngramConfig
from ..model.attention import AttentionConfig
from ..model.count import Count, count
from ..model.ffn import MoEConfig
from ..model.lm import MemoryConfig, ModelConfig
from ..model.presets import get_preset
from ..statistics import over_documents, over_seeds, ratio_interval
from ..train import checkpoint as checkpoints
from ..train.loader import Loader, windows
from ..train.loop import TrainConfig, Training
from ..train.run import fit_vocabulary, prepare_text
from ..train.shards import TokenData
from . import paper
from .fits import log_linear, u_curve
from .runs import Job, document_losses, environment, keep_settings, run_jobs

Say = Callable[[str], None]
EVAL_BATCH = 32
TOTAL_TOLERANCE, FLOPS_TOLERANCE = 0.01, 0.02  # of equality between the points of an allocation sweep


@dataclass(frozen=True)
class Point:
    """One model of a sweep. rho: share of the sparse parameters that routed experts keep."""

    name: str
    arm: Literal["base", "engram", "bigram", "moe"]
    config: TrainConfig
    rho: float | None = None


@dataclass(frozen=True)
class MemorySweep:
    """Tables of many sizes in one model; without a memory, too, and against an additive bigram table if asked for."""

    kind: ClassVar[str] = "memory"
    train: TrainConfig
    """Its model has the memory whose rows vary."""
    rows_per_head: tuple[int, ...]
    bigram: bool = False
    """Also fit a hashed bigram embedding, added at the input, of as many table parameters at each size."""
    eval_windows: int = 512
    """Held-out windows, spread evenly over the documents; 0 for all."""

    def __post_init__(self) -> None:
        if self.train.model.memory is None:
            raise ConfigError(
                "a memory sweep starts from a model with a memory; this one has none whose rows could vary."
            )
        if len(set(self.rows_per_head)) < 4:
            raise ConfigError(
                f"rows_per_head {self.rows_per_head}: fewer than 4 sizes fit any parabola, and the check for curvature would "
                "mean nothing."
            )

    def points(self, train: TrainConfig) -> list[Point]:
        """Every model to train, the one without a memory first. train: with the text's vocabulary."""
        sized = {rows: replace(train, model=with_rows(train.model, rows)) for rows in self.rows_per_head}
        points = [Point("base", "base", config_of_arm(train, "base"))]
        points += [Point(f"engram-{rows}", "engram", config) for rows, config in sized.items()]
        if self.bigram:
            points += [Point(f"bigram-{rows}", "bigram", config_of_arm(c, "bigram")) for rows, c in sized.items()]
        return points

    def conclude(self, points: list[dict[str, Any]]) -> dict[str, Any]:
        """Fits of the measured points, and of the paper's, for results.json."""

        def fit(points: list[dict[str, Any]]) -> dict[str, Any]:
            rows, losses = (np.array([point[key] for point in points], np.float64) for key in ("rows", "seeds"))
            return log_linear(rows, losses)

        engram, bigram = ([point for point in points if point["arm"] == arm] for arm in ("engram", "bigram"))
        return {
            "points": engram,
            "base": points[0],
            "fit": fit(engram),
            "bigram": {"points": bigram, "fit": fit(bigram)} if bigram else None,
            "paper": _paper(paper.MEMORY, log_linear) | {"base": paper.MEMORY_BASE},
            "paper_also": [_paper(paper.OVERENCODING, log_linear)],
        }


@dataclass(frozen=True)
class AllocationSweep:
    """A mixture of experts that gives up some of its idle experts for a memory, at equal parameters and FLOPs."""

    kind: ClassVar[str] = "allocation"
    train: TrainConfig
    """Its model has the experts of the pure mixture, and the memory's layout; rows follow from the shares."""
    shares: tuple[float, ...]
    """Of the idle experts' parameters that stay with the experts; 1 is the pure mixture."""
    eval_windows: int = 512
    """Held-out windows, spread evenly over the documents; 0 for all."""

    def __post_init__(self) -> None:
        model = self.train.model
        if model.moe is None or model.memory is None or not model.moe.dense_layers:
            raise ConfigError(
                "an allocation sweep starts from a model with experts, with a memory, and with a leading dense block, whose "
                "width makes up for the branch's FLOPs."
            )
        if 1.0 not in self.shares or not all(0 <= share <= 1 for share in self.shares) or len(set(self.shares)) < 4:
            raise ConfigError(f"shares {self.shares} must be 4 or more between 0 and 1, with 1 among them.")

    def points(self, train: TrainConfig) -> list[Point]:
        """Every model to train, the pure mixture first. train: with the text's vocabulary.

        Raises ConfigError when they cannot be made equal in parameters and FLOPs.
        """
        points, pure = [], replace(train.model, memory=None)
        for share in sorted(self.shares, reverse=True):
            model, rho = reallocated(train.model, share)
            require_equal(model, pure, train.length, f"{share:.0%} of the sparse parameters in experts")
            arm: Literal["moe", "engram"] = "engram" if model.memory else "moe"
            points.append(Point(f"experts-{100 * share:g}", arm, replace(train, model=model), rho))
        return points

    def conclude(self, points: list[dict[str, Any]]) -> dict[str, Any]:
        """Fits of the measured points, and of the paper's, for results.json."""
        rho, losses = (np.array([point[key] for point in points], np.float64) for key in ("rho", "seeds"))
        return {
            "points": points,
            "base": None,
            "fit": u_curve(rho, losses),
            "paper": _paper(paper.ALLOCATION, u_curve),
            "paper_also": [_paper(paper.ALLOCATION_SMALLER, u_curve)],
        }


Sweep = MemorySweep | AllocationSweep


def _paper(curve: paper.Curve, fit: Callable[[np.ndarray, np.ndarray], dict[str, Any]]) -> dict[str, Any]:
    return asdict(curve) | {"fit": fit(np.array(curve.x), curve.losses)}


# --- points ---------------------------------------------------------------------------------------------------------


size_of = functools.cache(count)  # on the meta device, but of many models that differ little


def with_rows(model: ModelConfig, rows_per_head: int) -> ModelConfig:
    """The model with tables of another size."""
    assert model.memory is not None
    return replace(model, memory=replace(model.memory, hash=replace(model.memory.hash, rows_per_head=rows_per_head)))


def reallocated(model: ModelConfig, share: float) -> tuple[ModelConfig, float]:
    """`share` of the idle experts kept, the rest of their parameters turned into a table; and the share that came out.

    As in the paper, rho counts the experts that a token does not pass: (experts - active) / (those of the pure mixture).
    The memory's branch costs FLOPs and fewer experts save some of the router's: the leading dense FFN is narrowed (in eights)
    until a token costs what it costs in the pure mixture. Then the table gets every parameter that is left.
    """
    assert model.moe is not None
    assert model.memory is not None
    pure = replace(model, memory=None)
    experts = model.moe.active + round(share * (model.moe.experts - model.moe.active))
    rho = (experts - model.moe.active) / (model.moe.experts - model.moe.active)
    if experts == model.moe.experts:
        return pure, rho
    target = size_of(pure)
    fewer = replace(model, moe=replace(model.moe, experts=experts))
    extra = size_of(fewer).training_flops - target.training_flops
    an_eight = size_of(replace(fewer, ffn_width=fewer.ffn_width + 8)).training_flops - size_of(fewer).training_flops
    width = model.ffn_width - 8 * round(extra / an_eight)
    if width < 8:
        raise ConfigError(
            f"the memory's branch costs {extra:,} FLOPs a token, more than the leading dense FFN of width {model.ffn_width} "
            "could give up: the points would not be equal in FLOPs. Widen ffn_width, or narrow the rows."
        )
    narrowed = replace(fewer, ffn_width=width)
    without = size_of(narrowed)
    rows = (target.total - (without.total - without.tables)) // model.memory.engram.row_dim
    memory = replace(model.memory, hash=model.memory.hash.sized(rows=rows))
    return replace(narrowed, memory=memory), rho


def require_equal(model: ModelConfig, pure: ModelConfig, length: int, what: str) -> None:
    """Raise ConfigError for a model that differs from the pure mixture, in sequences of `length`, by more than is tolerated."""
    ratios = size_ratios(size_of(model, context=length), size_of(pure, context=length))
    for key, tolerance in (("total", TOTAL_TOLERANCE), ("flops", FLOPS_TOLERANCE)):
        if abs(ratios[key] - 1) > tolerance:
            raise ConfigError(
                f"{what}: {ratios[key]:.4f} times the {key} of the pure mixture, more than {tolerance:.0%} away, so its loss "
                "would differ for that reason, too. Choose more or smaller experts, or a wider leading FFN."
            )


# --- running --------------------------------------------------------------------------------------------------------


def sweep(
    asked: Sweep,
    data: str,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    command: str = "",
    say: Say = print,
) -> dict[str, Any] | None:
    """Train and measure every point in `out`; returns what results.json holds, or None after Ctrl-C.

    data: as `prepare_text` takes it. The same call goes on with an interrupted sweep, and may ask for more seeds and points.

    Raises MismatchError when `out` holds a sweep of another configuration, DataError when it holds another text.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {tuple(seeds)} must be one or more different numbers.")
    shards, tokenizer = prepare_text(data, out, vocab_size=asked.train.model.vocab_size, say=say)
    shared = {"kind": asked.kind, "train": configs.to_dict(asked.train), "eval_windows": asked.eval_windows}
    keep_settings(out, shared)
    train = fit_vocabulary(asked.train, tokenizer)
    points = asked.points(train)
    sizes = [size_of(point.config.model, context=train.length) for point in points]
    say(
        f"{len(points)} points x {len(seeds)} seeds, {train.steps:,} steps of {train.batch_size * train.length:,} tokens each, "
        f"on identical batches of {shards.meta.source}"
    )
    # a group each: nothing is compared in time, and one table after the other needs the memory of the largest
    jobs = [_job(point, seed, shards, tokenizer, asked.eval_windows, out) for seed in seeds for point in points]
    measured = run_jobs([[job] for job in jobs])
    if measured is None:
        say(f"Stopped. The same command goes on from the checkpoints in {out}.")
        return None
    by_point = [[one for (one,) in measured[number :: len(points)]] for number in range(len(points))]  # over seeds
    summaries = [_summary(*each, sizes[0], by_point[0]) for each in zip(points, sizes, by_point, strict=True)]
    results = {
        "kind": asked.kind,
        **asked.conclude(summaries),
        "data": _data(shards, train, by_point[0][0]),
        "config": configs.to_dict(replace(asked, train=train)),
        "command": command,
        "environment": environment(),
        "minutes": sum(sum(one["step_seconds"]) + one["measured_seconds"] for (one,) in measured) / 60,
        "seeds": list(seeds),
    }
    checkpoints.write_whole(out / "results.json", json.dumps(results, indent=1))
    return results


def _job(point: Point, seed: int, data: TokenData, tokenizer: Tokenizer, eval_windows: int, out: Path) -> Job:
    config = replace(
        point.config,
        seed=seed,
        eval_every=0,
        checkpoint_every=max(1, point.config.steps // 3),
        keep_checkpoints=1,
    )
    token_bytes = bytes_of_tokens(tokenizer)

    def measured(run: Training) -> dict[str, Any]:
        held_out = windows(data.val, EVAL_BATCH, config.length, eval_windows or None)
        losses = measure(run.model, run.lookup, held_out, token_bytes)
        return {"documents": {name: values.tolist() for name, values in vars(losses).items()}}

    return Job(
        directory=out / "points" / point.name / f"seed-{seed}",
        config=config,
        batches=Loader(data.train, config.batch_size, config.length, seed),
        tokenizer=tokenizer,
        measure=measured,
        facts={
            "text": data.meta.train.tokens_crc32,
            "held_out": data.meta.val.tokens_crc32,
            "eval_windows": eval_windows,
        },
    )


# --- results --------------------------------------------------------------------------------------------------------


def _data(shards: TokenData, train: TrainConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """What was read, and what was measured on."""
    return {
        "source": shards.meta.source,
        "train_tokens": shards.meta.train.tokens,
        "train_documents": shards.meta.train.documents,
        "held_out_tokens": int(sum(measured["documents"]["tokens"])),
        "held_out_documents": len(measured["documents"]["tokens"]),
        "read_tokens": train.steps * train.batch_size * train.length,
    }


def size_ratios(size: Count, base: Count) -> dict[str, float]:
    """Size and cost as multiples of another model's."""
    return {
        "total": size.total / base.total,
        "active": size.active / base.active,
        "flops": size.training_flops / base.training_flops,
    }


def _summary(
    point: Point, size: Count, measured: list[dict[str, Any]], base_size: Count, base: list[dict[str, Any]]
) -> dict[str, Any]:
    """One point in results.json. less: its loss less that of the first point, over documents and over seeds."""
    (nats, tokens), (base_nats, _) = document_losses(measured), document_losses(base)
    difference, interval = over_documents(nats, base_nats, tokens)
    less = (nats - base_nats).sum(1) / tokens.sum()
    spread = over_seeds(less)
    model = point.config.model
    return {
        "name": point.name,
        "arm": point.arm,
        "rows": rows_of(model),
        "table_parameters": size.tables,
        "total": size.total,
        "active": size.active,
        "branch": size.memory,
        "experts": model.moe.experts if model.moe else None,
        "ffn_width": model.ffn_width,
        "flops_per_token": size.training_flops,
        "bytes_per_token": size.table_bytes_per_token,
        "rho": point.rho,
        "ratios": size_ratios(size, base_size),
        "seeds": (nats.sum(1) / tokens.sum()).tolist(),
        "loss": float(nats.mean(0).sum() / tokens.sum()),
        "interval": ratio_interval(nats.mean(0), tokens),
        "bits_per_byte": float(nats.mean(0).sum() / np.log(2) / sum(measured[0]["documents"]["bytes"])),
        "less": {
            "difference": difference,
            "interval": interval,
            "seeds": less.tolist(),
            "seed_interval": spread[1:] if spread else None,
        },
        "step_seconds": float(np.median(np.concatenate([one["step_seconds"] for one in measured]))),
    }


def rows_of(model: ModelConfig) -> int:
    """Rows of all tables together."""
    return HashPlan.build(model.memory.hash, vocab_size=model.vocab_size, pad=0).num_rows if model.memory else 0


# --- budgets --------------------------------------------------------------------------------------------------------

Budget = Literal["quick", "cpu", "gpu"]


def log_spaced(first: int, last: int, sizes: int = 7) -> tuple[int, ...]:
    """Sizes at equal ratios."""
    return tuple(round(size) for size in np.geomspace(first, last, sizes).tolist())


def quick(model: ModelConfig) -> TrainConfig:
    """A few small steps: to see that all runs."""
    return TrainConfig(model, steps=3, batch_size=4, length=64)


def on_one_gpu(model: ModelConfig) -> TrainConfig:
    """Ten million tokens in large steps."""
    return TrainConfig(model, steps=300, batch_size=64, length=512, device="cuda", precision="bfloat16")


SHARES = (1.0, 0.95, 0.85, 0.75, 0.65, 0.55, 0.4)
TINY = get_preset("tiny")
TINY_MIXTURE = replace(TINY, ffn_width=512, moe=MoEConfig(experts=122, active=2, shared=1, width=64))
WIDE = ModelConfig(  # for one GPU
    vocab_size=8192,
    dim=512,
    layers=8,
    attention=AttentionConfig("gqa", heads=8, kv_heads=8, head_dim=64),
    ffn_width=1536,
    memory=MemoryConfig(
        HashConfig(orders=(2, 3), heads=8, rows_per_head=100_000, layers=(1, 4), pad_id=0), EngramConfig(row_dim=32)
    ),
)
WIDE_MIXTURE = replace(WIDE, ffn_width=2048, moe=MoEConfig(experts=82, active=2, shared=1, width=256))


MEMORY: dict[Budget, MemorySweep] = {
    "quick": MemorySweep(quick(TINY), log_spaced(100, 31_600), eval_windows=32),
    "cpu": MemorySweep(TrainConfig(TINY, steps=240), log_spaced(1000, 400_000)),
    "gpu": MemorySweep(on_one_gpu(WIDE), log_spaced(2000, 632_000), eval_windows=1024),
}
ALLOCATION: dict[Budget, AllocationSweep] = {
    "quick": AllocationSweep(quick(TINY_MIXTURE), SHARES, eval_windows=32),
    "cpu": AllocationSweep(TrainConfig(TINY_MIXTURE, steps=180), SHARES),
    "gpu": AllocationSweep(on_one_gpu(WIDE_MIXTURE), SHARES, eval_windows=1024),
}
