"""Runs divided among ranks give what one process gives, however they are divided, and go on from one another's checkpoints."""

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import ENGRAM, EVERYTHING, config, lookup_of, split

from engram_lm.model import ModelConfig
from engram_lm.model.lookup import Lookup, address_digest, build_plan
from engram_lm.tables import TableConfig
from engram_lm.tables.sharded import build_sharded
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train import optim
from engram_lm.train.loader import Loader
from engram_lm.train.loop import TrainConfig, Training
from engram_lm.train.parallel import ParallelConfig
from engram_lm.train.ranks import Ranks

SHAPES = {"engram": ENGRAM, "everything": EVERYTHING}
WAYS = {
    "data": ParallelConfig(),
    "shard": ParallelConfig(shard=True),
    "experts": ParallelConfig(experts=2),
    "context": ParallelConfig(context=2),
    "all": ParallelConfig(shard=True, experts=2, context=2),
}


def divided_lookup(model: ModelConfig, directory: Path, run: TrainConfig) -> Lookup | None:
    if model.memory is None:
        return None
    vocabulary = CanonicalVocabulary.identity(model.vocab_size)
    plan = build_plan(model.memory.hash, vocabulary)
    table = build_sharded(
        run.table,
        plan.num_rows,
        model.memory.engram.row_dim,
        digest=address_digest(vocabulary, plan),
        directory=directory,
        group=dist.group.WORLD,
    )
    return Lookup(vocabulary, plan, table, shuffled=model.memory.hash.scheme == "shuffled")


def start(directory: Path, run: TrainConfig, resume: bool = False) -> Training:
    return Training(
        run,
        directory,
        Loader(split(40), run.batch_size, run.length, run.seed),
        divided_lookup(run.model, directory, run),
        resume=resume,
        ranks=Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD),
    )


def everything(run: Training) -> dict[str, torch.Tensor]:
    """Losses, norms, weights, optimizer state and table."""
    found = {"metrics": torch.tensor([[line["loss"], line["norm"]] for line in run.metrics.lines], dtype=torch.float64)}
    for name, tensor in {**run.model.state_dict(), **run.optimizer.state()}.items():
        found[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    if run.lookup:
        found["table"] = run.lookup.table.fetch(torch.arange(run.lookup.table.num_rows))
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def exactly() -> None:
    """Muon's iterations in float32: in bfloat16 they magnify what the order of sums does to the last bits."""
    optim.bf16_is_fast = lambda device: False


def run_to(directory: Path, run: TrainConfig, resume: bool = False) -> dict[str, torch.Tensor]:
    exactly()
    this = start(directory, run, resume)
    while not this.done:
        this.step()
    found = everything(this)
    this.close()
    return found


def alone(directory: Path, run: TrainConfig) -> dict[str, torch.Tensor]:
    exactly()
    single = Training(
        run,
        directory,
        Loader(split(40), run.batch_size, run.length, run.seed),
        lookup_of(run.model, "host"),
    )
    while not single.done:
        single.step()
    single.close()
    return everything(single)


def settings(model: ModelConfig, **changes: Any) -> TrainConfig:
    return config(model, **{"batch_size": 12, "length": 12, "steps": 4, "checkpoint_every": 2, **changes})


def assert_near(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        error = float((found[name].double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-3))
        assert error < tolerance, (name, error)


def divisions() -> Iterator[tuple[str, str, int]]:
    """Which model is divided in which way among how many ranks."""
    for (model, shape), (way, parallel), size in product(SHAPES.items(), WAYS.items(), (1, 2, 3, 4)):
        possible = size % parallel.experts == size % parallel.context == 0
        if possible and (way == "data" or (size > 1 and shape is EVERYTHING)):
            yield model, way, size


@pytest.mark.parametrize(("model", "way", "size"), divisions())
def test_ranks_learn_what_one_process_learns(
    processes: ForkServerContext, model: str, way: str, size: int, tmp_path: Path
):
    shape, parallel = SHAPES[model], WAYS[way]
    run = settings(shape, parallel=parallel, accumulate=1 if size > 2 else 2)
    results = run_ranks(processes, size, run_to, tmp_path / "ranks", run)
    [truth] = run_ranks(processes, 1, alone, tmp_path / "alone", replace(run, parallel=ParallelConfig()))
    for column, tolerance in enumerate((1e-6, 1e-5)):  # losses, norms
        ours, theirs = results[0]["metrics"][:, column], truth["metrics"][:, column]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    # EVERYTHING's small gates divide by little: rounding alone moves one process's gradients by 3e-5
    assert_near(results[0], truth, 2e-5 if model == "engram" else 1e-3)
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), name


def from_two_to_the_end(directory: Path, run: TrainConfig) -> dict[str, torch.Tensor]:
    exactly()
    warnings.simplefilter("ignore", UserWarning)  # of another number of ranks
    return run_to(directory, run, resume=True)


@pytest.mark.parametrize(
    ("tier", "before", "after"),
    [*product(["host"], (1, 2, 3, 4), (1, 2, 3, 4)), *(("disk", *pair) for pair in ((2, 2), (3, 2), (1, 4)))],
)
def test_saved_by_so_many_ranks_and_continued_by_others(
    processes: ForkServerContext, tier: str, before: int, after: int, tmp_path: Path
):
    parallel = ParallelConfig(shard=before % 2 == 0, experts=2 if before == 4 else 1)
    run = settings(EVERYTHING, table=TableConfig(tier=tier), parallel=parallel)
    first = run_ranks(processes, before, run_to, tmp_path, run)[0]
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
    other = replace(run, parallel=ParallelConfig(shard=after % 2 == 1, experts=2 if after == 2 else 1))
    results = run_ranks(processes, after, from_two_to_the_end, tmp_path, run if before == after else other)
    if before == after:
        assert all(torch.equal(results[0][name], expected) for name, expected in first.items())
    else:
        assert_near({**results[0], "metrics": first["metrics"]}, first, 1e-3)
    for result in results[1:]:
        assert all(torch.equal(result[name], found) for name, found in results[0].items() if name != "metrics")


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (2, {"parallel": ParallelConfig(context=2), "length": 9}, r"9 tokens of a sequence .* parallel.context = 2"),
        (3, {"parallel": ParallelConfig(context=2)}, "3 ranks .* groups of parallel.context = 2"),
        (2, {"batch_size": 3}, "3 sequences .* = 2"),
        (2, {"model": ENGRAM, "parallel": ParallelConfig(experts=2)}, "no mixture of experts"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    processes: ForkServerContext, size: int, changes: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(RuntimeError, match=message):
        run_ranks(processes, size, run_to, tmp_path, replace(settings(EVERYTHING), **changes))
