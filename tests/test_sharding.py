"""A backbone over ranks, whole on each or divided with FSDP2, learns what one process learns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from tiny import MODELS, live, text
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from engram_lm.model import ModelConfig
from engram_lm.train.experts import divide_experts
from engram_lm.train.optim import OptimConfig, Optimizer, orthogonalise, orthogonalise_divided
from engram_lm.train.ranks import Ranks
from engram_lm.train.sharding import shard_backbone, sum_gradients

BATCH, LENGTH, STEPS = 12, 8, 3
WORLDS, WAYS = (1, 2, 3, 4), ("whole", "sharded")


@contextmanager
def strictly() -> Iterator[None]:
    """Warnings are errors in ranks too, and Muon iterates in float32, whatever the hardware likes."""
    with warnings.catch_warnings(), mock.patch("engram_lm.train.optim.bf16_is_fast", return_value=False):
        warnings.simplefilter("error")
        yield


def everyone() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def full(tensor: Tensor | None) -> Tensor:
    """The whole of a tensor that may be divided, as it is now."""
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def rows_of(config: ModelConfig, step: int, dtype: torch.dtype) -> Tensor | None:
    """Some rows [B, T, L, K, d] for a batch."""
    if config.memory is None:
        return None
    shape = (len(config.memory.hash.layers), config.memory.hash.rows_per_token, config.memory.engram.row_dim)
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, LENGTH, *shape, generator=generator, dtype=torch.float64).to(dtype)


class Run:
    """A model in training on this rank's part of each batch; alone, all of it.

    accumulate: parts that a step is computed in. checkpointing: blocks are computed again in the backward. experts: ranks
    among which experts are divided.
    """

    def __init__(
        self,
        name: str,
        way: str,
        dtype: torch.dtype,
        *,
        accumulate: int = 1,
        checkpointing: bool = False,
        experts: int = 1,
    ) -> None:
        self.ranks = Ranks() if way == "alone" else everyone()
        self.way, self.accumulate = way, accumulate
        self.model, _ = live(MODELS[name])
        self.model.to(dtype).train()
        for block in self.model.blocks:
            block.checkpoint = partial(checkpoint, use_reentrant=False) if checkpointing else None
        self.experts: set[nn.Parameter] = set()
        if experts > 1:
            shape = (self.ranks.size // experts, experts)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "experts"))
            self.experts, self.replicas = divide_experts(self.model, mesh["experts"]), mesh["replicas"].get_group()
        if way == "sharded":
            shard_backbone(self.model, init_device_mesh("cpu", (self.ranks.size,)))
        self.optimizer = Optimizer(self.model, OptimConfig(clip=0.5), self.ranks)
        self.seen: list[tuple[float, float]] = []  # each step's loss of the whole batch, and norm
        self.row_gradients: list[Tensor] = []

    def sum_gradients(self) -> None:
        if self.way == "whole":
            sum_gradients([p for p in self.optimizer.parameters if p not in self.experts], dist.group.WORLD)
        if self.experts:
            sum_gradients([p for p in self.optimizer.parameters if p in self.experts], self.replicas)

    def part(self, whole: Tensor) -> Tensor:
        return whole.tensor_split(self.ranks.size)[self.ranks.rank]

    def take(self, steps: int = STEPS) -> Run:
        dtype = self.model.norm.weight.dtype
        for step in range(len(self.seen), len(self.seen) + steps):
            tokens = self.part(text(LENGTH + 1, BATCH, seed=step))
            rows = rows_of(self.model.config, step, dtype)
            rows = None if rows is None else self.part(rows).requires_grad_()
            total = torch.zeros((), dtype=dtype)
            for some in torch.arange(len(tokens)).tensor_split(self.accumulate):
                given = None if rows is None else rows[some]
                losses = self.model.loss(tokens[some, :-1], tokens[some, 1:], given, reduction="none")
                loss = losses.sum() / (BATCH * LENGTH)
                loss.backward()
                total += loss.detach()
            if self.ranks.group:
                dist.all_reduce(total)
                self.sum_gradients()
            norm = self.optimizer.clip([] if rows is None or rows.grad is None else [rows.grad])
            self.row_gradients += [] if rows is None or rows.grad is None else [rows.grad]
            self.optimizer.step(1.0)
            self.seen.append((float(total), norm))
        return self

    def outcome(self) -> dict[str, Tensor]:
        weights = {name: full(parameter) for name, parameter in self.model.named_parameters()}
        seen = {"seen": torch.tensor(self.seen, dtype=torch.float64)}
        return weights | {name: full(tensor) for name, tensor in self.optimizer.state().items()} | seen


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to 1e-9 of the largest element: in float64, where only Muon's iterations round to float32."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9 * largest, msg=lambda m, n=name: f"{n}: {m}")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- what is learned ------------------------------------------------------------------------------------------------


def learn_in_float64(way: str) -> list[dict[str, Tensor]]:
    """Compare with one process; the outcomes."""
    outcomes = []
    with strictly():
        for name, how in (
            ("base", {}),
            ("engram", {"accumulate": 2}),
            ("everything", {"accumulate": 2, "checkpointing": True}),
        ):
            alone = Run(name, "alone", torch.float64).take()
            run = Run(name, way, torch.float64, **how).take()
            outcomes.append(run.outcome())
            assert_near(outcomes[-1], alone.outcome())
            for ours, theirs in zip(run.row_gradients, alone.row_gradients, strict=True):
                torch.testing.assert_close(ours, run.part(theirs), rtol=1e-9, atol=1e-12)
    return outcomes


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_learn_what_one_process_learns(processes: ForkServerContext, way: str, world: int):
    first, *others = run_ranks(processes, world, learn_in_float64, way)
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert_same(ours, theirs)


def learn(way: str) -> dict[str, Tensor]:
    with strictly():
        return Run("everything", way, torch.float32, accumulate=2).take().outcome()


@pytest.mark.parametrize("way", WAYS)
def test_every_run_and_rank_has_the_same_bits(processes: ForkServerContext, way: str):
    first, *others = [outcome for _ in range(2) for outcome in run_ranks(processes, 3, learn, way)]
    for other in others:
        assert_same(first, other)


def learn_with_divided_experts(way: str) -> dict[str, Tensor]:
    with strictly():
        alone = Run("everything", "alone", torch.float64).take()
        run = Run("everything", way, torch.float64, accumulate=2, experts=2).take()
        assert all(isinstance(p, DTensor) and p.device_mesh.size() == 2 for p in run.experts)
        assert_near(run.outcome(), alone.outcome())
        return run.outcome()


@pytest.mark.parametrize("way", WAYS)
def test_divided_experts_stay_as_they_are_and_learn_the_same(processes: ForkServerContext, way: str):
    first, *others = run_ranks(processes, 4, learn_with_divided_experts, way)
    for other in others:
        assert_same(first, other)


# --- sharded models between steps -----------------------------------------------------------------------------------


def evaluate_between_steps() -> None:
    with strictly():
        alone, run = Run("engram", "alone", torch.float64), Run("engram", "sharded", torch.float64)
        tokens, rows = text(LENGTH + 1, BATCH, seed=9), rows_of(run.model.config, 9, torch.float64)
        for _ in range(2):
            for each in (alone, run):
                each.take(1)
                each.model.eval()
            with torch.no_grad():
                expected, _ = alone.model(tokens[:, :-1], rows)
                hidden, _ = run.model(tokens[:, :-1], rows)
                torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(run.model.logits(hidden), alone.model.logits(expected), rtol=0, atol=1e-9)
                given = tokens[:, :-1], tokens[:, 1:], rows
                torch.testing.assert_close(run.model.loss(*given), alone.model.loss(*given), rtol=1e-9, atol=0)
                _, state = run.model(tokens[:, :-1], rows, with_state=True)
                assert state is not None
                assert state.position == LENGTH
                assert None not in state.layers
            assert all(isinstance(p, DTensor) for p in run.model.state_dict().values())
            for each in (alone, run):
                each.model.train()
        assert_near(run.outcome(), alone.outcome())


def test_a_sharded_model_is_evaluated_as_any_other(processes: ForkServerContext):
    run_ranks(processes, 2, evaluate_between_steps)


def save_after_a_step(way: str, directory: str) -> None:
    with strictly():
        run = Run("everything", way, torch.float64).take(1)
        dcp.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state()}, checkpoint_id=directory)


def go_on(way: str, directory: str) -> None:
    """Load what other ranks saved into a model that was never trained, by parts and, if whole, whole; compare."""
    with strictly():
        alone = Run("everything", "alone", torch.float64).take(1)
        whole = {name: tensor.clone() for name, tensor in alone.optimizer.state().items()}
        weights = {name: tensor.clone() for name, tensor in alone.model.state_dict().items()}
        alone.take()
        for by_parts in (True, False):
            run = Run("everything", way, torch.float64)
            parts = {"model": run.model.state_dict(), "optimizer": run.optimizer.state()}
            if by_parts:
                dcp.load(parts, checkpoint_id=directory)
                run.model.load_state_dict(parts["model"])
                run.optimizer.load_state(parts["optimizer"])
            else:
                for name, tensor in parts["model"].items():
                    tensor.copy_(divided(weights[name], tensor))
                run.optimizer.load_state(whole)
            run.seen = alone.seen[:1]
            assert_near(run.take().outcome(), alone.outcome())


def divided(whole: Tensor, like: Tensor) -> Tensor:
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


@pytest.mark.parametrize(("way_then", "way_now"), [("sharded", "sharded"), ("sharded", "whole"), ("whole", "sharded")])
def test_state_is_taken_over_by_other_ranks(processes: ForkServerContext, tmp_path: Path, way_then: str, way_now: str):
    run_ranks(processes, 4, save_after_a_step, way_then, str(tmp_path))
    run_ranks(processes, 3, go_on, way_now, str(tmp_path))


# --- sums and matrices ----------------------------------------------------------------------------------------------


def sum_some() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    everywhere, somewhere, nowhere = (nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (5,), (4,)))
    narrow = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    alone = DeviceMesh("cpu", [rank])  # a mesh a rank: all hold the same part
    part = nn.Parameter(distribute_tensor(torch.zeros(2, 2), alone, [Shard(0)]))
    everywhere.grad = torch.full((3, 2), rank + 1.0).t().contiguous().t()  # in another order in memory
    narrow.grad = torch.full((7,), 2.0, dtype=torch.bfloat16)
    part.grad = distribute_tensor(torch.full((2, 2), rank + 2.0), alone, [Shard(0)])
    if rank == size - 1:
        somewhere.grad = torch.arange(5.0)
    parameters = [everywhere, somewhere, nowhere, narrow, part]
    sum_gradients(iter(parameters), mesh.get_group())
    assert torch.equal(full(everywhere.grad), torch.full((3, 2), size * (size + 1) / 2))
    assert torch.equal(full(somewhere.grad), torch.arange(5.0))
    assert nowhere.grad is None
    assert torch.equal(full(narrow.grad), torch.full((7,), 2.0 * size, dtype=torch.bfloat16))
    assert isinstance(part.grad, DTensor)
    assert torch.equal(full(part.grad), torch.full((2, 2), sum(r + 2.0 for r in range(size))))


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_summed_whoever_has_one(processes: ForkServerContext, world: int):
    run_ranks(processes, world, sum_some)


def orthogonalise_some() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with strictly():
        for number, rows, columns in ((1, 5, 3), (2, 2, 6), (3, 8, 8), (7, 9, 4), (4, 1, 4)):
            generator = torch.Generator().manual_seed(number)
            matrices = torch.randn(number, rows, columns, generator=generator)
            parts = [distribute_tensor(matrix, mesh, [Shard(0)]).to_local() for matrix in matrices]
            found = orthogonalise_divided(torch.stack(parts), rows, mesh.get_group())
            for matrix, piece in zip(orthogonalise(matrices), found, strict=True):
                expected = distribute_tensor(matrix, mesh, [Shard(0)]).to_local()
                torch.testing.assert_close(piece, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_divided_matrices_are_orthogonalised_as_whole_ones(processes: ForkServerContext, world: int):
    run_ranks(processes, world, orthogonalise_some)
