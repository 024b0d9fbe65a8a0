"""`engram-lm facts`: how many facts does a model hold, with and without a memory?

curve    made-up people at growing numbers, each fact told equally often: recall, bits stored a parameter
hard     the same number of facts in every form of sentence (evaluate/biographies.py): which can a memory hold?
real     real facts at growing numbers: names and answers of several tokens, a phrasing that is only asked

The base of the comparison does as much arithmetic as the model with the memory (iso_flop). All sizes have the same models, and as
many steps as exposures x `steps_per_epoch`: batches grow with the facts, except for the smallest sizes, whose batches would be
smaller than `min_batch` and which get fewer steps.

OUT/
  curve/exposures-10/facts-1000/ARM/seed-0    a run each; measured.json when it is finished
  hard/FORM/ARM/seed-0    real/exposures-10/facts-1000/ARM/seed-0
  results.json
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from .. import config as configs
from ..analysis.flip import Pair, flips
from ..errors import ConfigError
from ..evaluate.biographies import FORMS, Biographies, Form, invent
from ..evaluate.capacity import answer, bits_stored
from ..evaluate.controls import config_of_arm
from ..evaluate.exposures import ABSENT, Exposures, FactSet
from ..evaluate.real_facts import collect, encode, own_tokenizer, real_facts
from ..hashing import HashConfig, prime_sizes
from ..memory import EngramConfig
from ..model.attention import AttentionConfig
from ..model.count import count
from ..model.lm import MemoryConfig, ModelConfig
from ..statistics import wilson
from ..train import checkpoint as checkpoints
from ..train.loop import TrainConfig, Training
from ..train.optim import OptimConfig
from ..train.precision import Precision
from ..train.run import fit_vocabulary
from .runs import Job, environment, keep_settings, run_jobs

FactsArm = Literal["base", "iso_flop", "engram", "no_convolution", "second_layer", "capacity_1"]
ARMS: tuple[FactsArm, ...] = get_args(FactsArm)
DESCRIPTIONS: dict[FactsArm, str] = {
    "base": "the backbone alone",
    "iso_flop": "the backbone with a wider feed-forward layer, which does as much arithmetic as the memory's branch",
    "engram": "the backbone with its memory",
    "no_convolution": "the memory without its short convolution",
    "second_layer": "the memory's rows shared out over two layers (the second branch costs FLOPs and parameters of its own)",
    "capacity_1": "the same branch, but every n-gram reads the same rows, one a head",
}
FLIPPED = 64  # pairs of people whose rows are exchanged
HOLDS = 0.9  # recall at which a model is said to hold facts

# --- the defaults of all facts studies ------------------------------------------------------------------------------

MODEL = ModelConfig(
    vocab_size=1,  # the facts' tokenizer decides
    dim=32,
    layers=2,
    attention=AttentionConfig("gqa", heads=1, kv_heads=1, head_dim=32),
    ffn_width=64,
    memory=MemoryConfig(
        HashConfig(orders=(2, 3), heads=4, rows_per_head=400_000, layers=(0,), pad_id=0), EngramConfig(row_dim=16)
    ),
)


@dataclass(frozen=True)
class FactsConfig:
    """A facts study."""

    curve: bool = True
    """Grow made-up facts until they are not held."""
    hard: bool = False
    """Tell the same facts in every form of sentence."""
    real: str = ""
    """Grow real facts of this source too: a .jsonl, a directory of relations, or geonames."""
    counts: tuple[int, ...] = (125, 500, 2000, 4000, 8000, 16_000, 64_000, 256_000)
    """Facts to grow through; of real ones, those there are, and then all."""
    exposures: tuple[int, ...] = (10, 30, 100)
    """Times that each fact is told; a curve each."""
    arms: tuple[FactsArm, ...] = ("iso_flop", "engram")
    """Models of the curves."""
    form: Form = "single"
    """Sentences of the curve."""
    attributes: int = 1
    """Facts of each person in the curve."""
    hard_facts: int = 16_000
    """Facts in each hard case."""
    hard_attributes: int = 4
    """Of each person."""
    hard_exposures: int = 30
    """Times that each fact is told."""
    hard_arms: tuple[FactsArm, ...] = ARMS[1:]
    """Models of the hard cases."""
    values: int = 500
    """Values that each attribute may have."""
    names: tuple[int, ...] = (100, 100, 100)
    """First, middle and last names."""
    seeds: int = 1
    """Of people, weights and the order of sentences: 0, 1, ..."""
    steps_per_epoch: int = 64
    """Steps in which every sentence comes once."""
    min_batch: int = 16
    """Smallest batch; sizes whose batches would be smaller have fewer steps."""
    max_asked: int = 16_384
    """Facts that are asked about at most, of each kind of question."""
    give_up: float = 0.5
    """Larger sizes are not run once recall is below."""
    real_vocab: int = 4096
    """Tokens of the real facts' own tokenizer."""
    model: ModelConfig = field(default_factory=lambda: MODEL)
    """The engram arm; the others follow from it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Of all arms."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU where there is one."""
    precision: Precision = "auto"
    """Of matrix products."""

    def __post_init__(self) -> None:
        if self.model.memory is None:
            raise ConfigError("a facts study starts from a model with a memory; this one has none to compare with.")
        if not (self.curve or self.hard or self.real):
            raise ConfigError("neither the curve nor hard cases nor real facts are asked for: nothing would be run.")
        for name in ("counts", "exposures", "arms", "hard_arms"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"{name} {given} must be one or more different ones.")
        for name in ("seeds", "steps_per_epoch", "min_batch", "max_asked", "hard_exposures"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if min(self.counts) < self.attributes or self.hard_facts < self.hard_attributes or min(self.exposures) < 1:
            raise ConfigError(
                f"counts {self.counts}, hard_facts {self.hard_facts} and exposures {self.exposures} must hold at least one "
                "person's facts, told at least once."
            )


Budget = Literal["quick", "cpu", "gpu"]
BUDGETS: dict[Budget, FactsConfig] = {
    "quick": FactsConfig(counts=(128, 256), exposures=(2, 4), hard_facts=256, hard_exposures=2, steps_per_epoch=4),
    "cpu": FactsConfig(),
    "gpu": FactsConfig(
        counts=tuple(1000 * 2**power for power in range(11)),
        names=(200, 200, 400),
        seeds=3,
        device="cuda",
        model=replace(
            MODEL,
            dim=256,
            attention=AttentionConfig("gqa", heads=4, kv_heads=4, head_dim=64),
            ffn_width=512,
            memory=MemoryConfig(
                HashConfig(orders=(2, 3), heads=8, rows_per_head=1_000_000, layers=(0,), pad_id=0),
                EngramConfig(row_dim=32),
            ),
        ),
    ),
}


# --- the study ------------------------------------------------------------------------------------------------------


def facts_study(
    config: FactsConfig, out: Path, *, command: str = "", say: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Train and measure all that `config` asks for in `out`; returns what results.json holds, or None after Ctrl-C.

    {"curve": {exposures: {arm: [point]}}, "holds_90": {exposures: {arm: see `holds`}}, "ratio": {exposures: see `ratio`},
    "ratio_at_least", "not_run": {exposures: {arm: [facts]}}, "parameters": {arm: sizes}, "hard": {form: {arm: {kind: recall}}},
    "hard_intervals", "real": {"source", "facts", "skipped", "relations", and what a curve has}}, with what was asked for. The
    same command goes on with an interrupted study.

    Raises MismatchError when `out` holds runs of another configuration.
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    keep_settings(out, {"kind": "facts"})  # its runs know the rest, and curves and forms may join later
    results: dict[str, Any] = {"arms": DESCRIPTIONS}
    parts: list[tuple[bool, Callable[[], dict[str, Any] | None]]] = [
        (config.curve, lambda: growing(config, out / "curve", made_up(config), config.counts, say)),
        (config.hard, lambda: hard_cases(config, out / "hard", say)),
        (bool(config.real), lambda: growing_real(config, out / "real", say)),
    ]
    for wanted, part in parts:
        if wanted:
            found = part()
            if found is None:
                say(f"Stopped. The same command goes on from what is finished in {out}.")
                return None
            results |= found
    results |= {
        "config": configs.to_dict(config),
        "command": command,
        "environment": environment(),
        "seeds": list(range(config.seeds)),
        "wall_minutes": (time.perf_counter() - began) / 60,
    }
    checkpoints.write_whole(out / "results.json", json.dumps(results, indent=1))
    return results


Make = Callable[[int, int], FactSet]  # facts, seed -> as many facts


def made_up(config: FactsConfig) -> Make:
    """The people of the curve."""

    def make(facts: int, seed: int) -> FactSet:
        return invent(
            config.form,
            facts // config.attributes,
            attributes=config.attributes,
            values=config.values,
            names=config.names,
            seed=seed,
        )

    return make


def growing(
    config: FactsConfig, directory: Path, make: Make, counts: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Every arm at growing numbers of facts, as long as it recalls some: the curve and what follows; None after Ctrl-C."""
    curve: dict[str, dict[str, list[dict[str, Any]]]] = {}
    not_run: dict[str, dict[str, list[int]]] = {}
    for exposures in config.exposures:
        points = curve[str(exposures)] = {arm: [] for arm in config.arms}
        given_up = not_run[str(exposures)] = {arm: [] for arm in config.arms}
        for facts in sorted(counts):
            arms = [arm for arm in config.arms if not hopeless(points[arm], config, exposures)]
            for arm in set(config.arms) - set(arms):
                given_up[arm].append(facts)
            if not arms:
                continue
            say(f"{facts:,} facts, {exposures} exposures: {', '.join(arms)}")
            where = directory / f"exposures-{exposures}" / f"facts-{facts}"
            sets = [make(facts, seed) for seed in range(config.seeds)]
            groups = [
                [job(config, arm, one, exposures, seed, where / arm / f"seed-{seed}") for arm in arms]
                for seed, one in enumerate(sets)
            ]
            measured = run_jobs(groups)
            if measured is None:
                return None
            for number, arm in enumerate(arms):
                points[arm].append(point(groups[0][number], sets[0], [group[number] for group in measured]))
    held = {exposures: {arm: holds(points) for arm, points in arms.items()} for exposures, arms in curve.items()}
    base = next((arm for arm in ("iso_flop", "base") if arm in config.arms), None)
    ratios = {}
    if base and "engram" in config.arms:
        ratios = {exposures: ratio(arms["engram"], arms[base], min(counts)) for exposures, arms in held.items()}
    return {
        "curve": curve,
        "not_run": not_run,
        "holds_90": held,
        "ratio": {exposures: one[0] for exposures, one in ratios.items()},
        "ratio_at_least": {exposures: one[1] for exposures, one in ratios.items()},
        "parameters": {arm: sizes(config, arm, make(min(counts), 0)) for arm in config.arms},
    }


def hard_cases(config: FactsConfig, directory: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """As many facts in every form of sentence: recall of every arm and kind of question; None after Ctrl-C."""
    say(f"Hard cases: {config.hard_facts:,} facts, {config.hard_exposures} exposures: {', '.join(FORMS)}")
    groups, people = [], config.hard_facts // config.hard_attributes
    for form in FORMS:
        for seed in range(config.seeds):
            facts = invent(
                form, people, attributes=config.hard_attributes, values=config.values, names=config.names, seed=seed
            )
            where = directory / form
            groups.append(
                [
                    job(config, arm, facts, config.hard_exposures, seed, where / arm / f"seed-{seed}")
                    for arm in config.hard_arms
                ]
            )
    measured = run_jobs(groups)
    if measured is None:
        return None
    recalls: dict[str, dict[str, dict[str, float]]] = {}
    intervals: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for number, form in enumerate(FORMS):
        seeds = measured[number * config.seeds : (number + 1) * config.seeds]
        by_arm = {arm: pooled([group[place] for group in seeds]) for place, arm in enumerate(config.hard_arms)}
        recalls[form] = {arm: {kind: one["recall"] for kind, one in kinds.items()} for arm, kinds in by_arm.items()}
        intervals[form] = {arm: {kind: one["interval"] for kind, one in kinds.items()} for arm, kinds in by_arm.items()}
    flips_of = {
        form: {arm: measured[number * config.seeds][place]["flips"] for place, arm in enumerate(config.hard_arms)}
        for number, form in enumerate(FORMS)
    }
    return {"hard": recalls, "hard_intervals": intervals, "hard_flips": flips_of}


def growing_real(config: FactsConfig, directory: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Real facts at growing numbers, drawn from all that can be asked; None after Ctrl-C."""
    say(f"Reading facts of {config.real}")
    collected = collect(config.real)
    tokenizer = own_tokenizer(collected.facts, config.real_vocab)
    encoded, too_long = encode(collected.facts, tokenizer)
    order = np.random.default_rng(0).permutation(len(encoded))

    def make(facts: int, seed: int) -> FactSet:
        return real_facts([encoded[number] for number in order[:facts]], tokenizer)

    counts = [*(facts for facts in config.counts if facts < len(encoded)), len(encoded)]
    found = growing(config, directory, make, counts, say)
    if found is None:
        return None
    relations = Counter(one.fact.relation for one in encoded)
    about = {
        "source": Path(config.real).name,
        "facts": len(encoded),
        "skipped": collected.skipped | too_long,
        "relations": dict(relations.most_common()),
        "answer_bits": make(len(encoded), 0).value_bits,
    }
    return {"real": about | found}


# --- one run --------------------------------------------------------------------------------------------------------


def train_of_arm(train: TrainConfig, arm: FactsArm) -> TrainConfig:
    """The run of one arm. Raises ConfigError for a second memory layer in a model that has no block for it."""
    memory = train.model.memory
    assert memory is not None
    if arm == "no_convolution":
        memory = replace(memory, engram=replace(memory.engram, conv_kernel=0))
    elif arm == "second_layer":
        rows = int(prime_sizes(memory.hash).sum())
        layers = (*memory.hash.layers, max(memory.hash.layers) + 1)
        memory = replace(memory, hash=replace(memory.hash, layers=layers).sized(rows=rows))
    else:
        return config_of_arm(train, arm)
    return replace(train, model=replace(train.model, memory=memory))


def train_config(config: FactsConfig, arm: FactsArm, facts: FactSet, exposures: int, seed: int) -> TrainConfig:
    """The run in which an arm is told `facts` so often."""
    batch_size = max(config.min_batch, len(facts) // config.steps_per_epoch)
    first = torch.zeros(1, dtype=torch.int64)
    train = TrainConfig(
        model=config.model,
        optim=config.optim,
        steps=math.ceil(len(facts) * exposures / batch_size),
        batch_size=batch_size,
        length=facts.sentences(first, first).shape[1] - 1,
        seed=seed,
        precision=config.precision,
        device=config.device,
        eval_every=0,
        checkpoint_every=1000,
        keep_checkpoints=1,
    )
    return train_of_arm(fit_vocabulary(train, facts.tokenizer()), arm)


def job(config: FactsConfig, arm: FactsArm, facts: FactSet, exposures: int, seed: int, directory: Path) -> Job:
    """One model to train on `facts`, and to ask about them."""
    train = train_config(config, arm, facts, exposures, seed)
    some = torch.arange(min(len(facts), 1000))
    return Job(
        directory=directory,
        config=train,
        batches=Exposures(facts, train.batch_size, seed),
        tokenizer=facts.tokenizer(),
        measure=lambda run: measured(run, facts, config.max_asked),
        facts={
            "facts": len(facts),
            "sentences": zlib.crc32(facts.sentences(some, torch.zeros_like(some)).numpy().tobytes()),
            "max_asked": config.max_asked,
        },
    )


def measured(run: Training, facts: FactSet, limit: int) -> dict[str, Any]:
    """Right answers and loss for each kind of question; nats lost on a name, where names are made up."""
    kinds = {}
    for kind, questions in facts.questions(limit).items():
        answers = answer(run.model, run.lookup, questions)
        kinds[kind] = {"right": int(answers.right.sum()), "asked": len(answers.right), "loss": answers.loss}
    if not isinstance(facts, Biographies):
        return {"kinds": kinds, "loss_name": None, "flips": None}
    names = answer(run.model, run.lookup, facts.name_tokens(limit)).loss
    return {"kinds": kinds, "loss_name": names, "flips": flipped(run, facts)}


def flipped(run: Training, facts: Biographies) -> dict[str, Any] | None:
    """What follows when the memory reads another name's rows at a name's last token (analysis/flip.py); None without a memory.

    The rows that other tokens of the name read stay its own.
    """
    if run.lookup is None or facts.people < 2 * FLIPPED or facts.choices < 2:
        return None
    which = torch.arange(2 * FLIPPED) * facts.attributes  # the first attribute of so many people
    rows = facts.statements(which, torch.zeros_like(which)).to(run.device)
    rows = rows[:, (rows != ABSENT).all(0)]  # one phrasing of one attribute: all are as long
    prompts, values = rows[:, :-1], facts.values[:, 0].tolist()
    last = facts.names.shape[1]  # behind the token that begins a document
    pairs = [
        Pair(prompts[a], prompts[b], last, (values[a], values[b]))
        for a, b in zip(*[iter(range(2 * FLIPPED))] * 2, strict=True)
    ]
    return flips(run.model, run.lookup, pairs)


# --- results --------------------------------------------------------------------------------------------------------


def pooled(seeds: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Recall by kind of question over the seeds' answers, with Wilson's 95 % interval (over questions), and mean loss."""
    kinds = {}
    for kind in seeds[0]["kinds"]:
        each = [one["kinds"][kind] for one in seeds]
        asked = sum(one["asked"] for one in each)
        recall = sum(one["right"] for one in each) / asked
        kinds[kind] = {
            "recall": recall,
            "interval": wilson(recall, asked),
            "loss": float(np.mean([one["loss"] for one in each])),
            "seeds": [one["right"] / one["asked"] for one in each],
        }
    return kinds


def point(job: Job, facts: FactSet, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One arm at one number of facts; bits are those of the module capacity, names (of made-up people) and values."""
    kinds = pooled(seeds)
    first = next(iter(kinds.values()))
    value_bits = bits_stored(facts.facts, facts.value_bits, first["loss"])
    bits, loss_name = value_bits, None
    if isinstance(facts, Biographies):
        loss_name = float(np.mean([one["loss_name"] for one in seeds]))
        bits += bits_stored(facts.people, facts.name_bits, loss_name)
    size = count(job.config.model, context=job.config.length)
    return {
        "facts": facts.facts,
        "recall": first["recall"],
        "interval": first["interval"],
        "seeds": first["seeds"],
        "kinds": {kind: one["recall"] for kind, one in kinds.items()},
        "flips": seeds[0].get("flips"),
        "loss_value": first["loss"],
        "loss_name": loss_name,
        "bits": bits,
        "value_bits": value_bits,
        "bits_per_parameter": bits / size.total,
        "bits_per_active": bits / size.active,
        "steps": job.config.steps,
        "batch_size": job.config.batch_size,
        "seconds": float(np.mean([sum(one["step_seconds"]) for one in seeds])),
    }


def sizes(config: FactsConfig, arm: FactsArm, facts: FactSet) -> dict[str, int]:
    """Parameters and FLOPs a token of an arm; the same at every number of facts."""
    train = train_config(config, arm, facts, 1, 0)
    size = count(train.model, context=train.length)
    return {
        "total": size.total,
        "active": size.active,
        "tables": size.tables,
        "flops_per_token": size.training_flops,
    }


def hopeless(points: Sequence[dict[str, Any]], config: FactsConfig, exposures: int) -> bool:
    """Whether more facts need not be tried: too few were recalled, and not for want of steps."""
    return bool(
        points and points[-1]["recall"] < config.give_up and points[-1]["steps"] >= exposures * config.steps_per_epoch
    )


def holds(points: Sequence[dict[str, Any]], share: float = HOLDS) -> dict[str, Any]:
    """The largest number of facts that is recalled to `share`.

    {"facts": the largest that was tried (0 for none), "interpolated": where recall over log(facts) crosses `share` after it (None
    if none is held, or all are), "open": whether even the largest that was tried is held}
    """
    held = [number for number, one in enumerate(points) if one["recall"] >= share]
    if not held:
        return {"facts": 0, "interpolated": None, "open": False}
    last = points[held[-1]]
    if held[-1] + 1 == len(points):
        return {"facts": last["facts"], "interpolated": None, "open": True}
    after = points[held[-1] + 1]
    way = (last["recall"] - share) / (last["recall"] - after["recall"])
    crossing = math.exp(math.log(last["facts"]) + way * math.log(after["facts"] / last["facts"]))
    return {"facts": last["facts"], "interpolated": crossing, "open": False}


def ratio(engram: dict[str, Any], base: dict[str, Any], smallest: int) -> tuple[float | None, bool]:
    """How many times the base's facts the engram arm holds, and whether that is a lower bound; None where nothing can be said.

    An arm that holds the largest number tried holds at least that; a base that holds not even the smallest holds less than it.
    """
    if not engram["facts"] or base["open"]:
        return None, False
    held = engram["interpolated"] or engram["facts"]
    return held / (base["interpolated"] or smallest), engram["open"] or not base["facts"]
