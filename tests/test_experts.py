"""Divided experts give what one process that holds them all gives: values, gradients, loads and whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from tiny import BASE, live, text
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from engram_lm.errors import ConfigError
from engram_lm.model import LanguageModel, MoEConfig
from engram_lm.model.ffn import MixtureOfExperts, grouped_linear
from engram_lm.train import experts
from engram_lm.train.experts import divide_experts, sum_loads

MOE = MoEConfig(experts=4, active=2, shared=1, width=8)
EXPERTS = {1: 4, 2: 4, 3: 6, 4: 4}  # a multiple of each number of ranks
NAMES = ("gate", "up", "down")


def build(config: MoEConfig, favourite: int | None = None) -> MixtureOfExperts:
    """A mixture in training. favourite: an expert that every token chooses."""
    torch.manual_seed(0)
    module = MixtureOfExperts(config, 16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
        if favourite is not None:
            module.bias[favourite] = 2.0  # affinities are below 1
    return module.train()


def in_bf16(on: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


def assert_near(one: Tensor | None, other: Tensor | None, bf16: bool = False, within: float = 1e-6) -> None:
    """Of one type and shape, and equal to 1e-6 of the largest element, or to two roundings of it to bf16."""
    assert one is not None
    assert other is not None
    largest = max([1.0, *other.detach().abs().flatten().tolist()])
    torch.testing.assert_close(one, other, rtol=0, atol=largest * (2**-7 if bf16 else within))


def summed(x: Tensor | None) -> Tensor:
    """Over all ranks of the run."""
    assert x is not None
    total = x.clone()
    dist.all_reduce(total)
    return total


def full(x: Tensor | None) -> Tensor:
    """The whole of a tensor that may be divided."""
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- one layer ----------------------------------------------------------------------------------------------


def compare_layer(config: MoEConfig, sizes: list[int], favourite: int | None, bf16: bool) -> None:
    """A layer with divided experts against a whole one; ranks have `sizes` tokens."""
    rank = dist.get_rank()
    whole, divided = build(config, favourite), build(config, favourite)
    divide_experts(divided, init_device_mesh("cpu", (len(sizes),)))
    x, towards = torch.randn(2, sum(sizes), 16, generator=torch.Generator().manual_seed(1))
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x_whole, x_mine = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    with in_bf16(bf16):
        y_whole, y_mine = whole(x_whole), divided(x_mine)
    (y_whole * towards).sum().backward()
    (y_mine * towards[mine]).sum().backward()

    assert_near(y_mine, y_whole[mine], bf16)
    assert x_whole.grad is not None
    assert_near(x_mine.grad, x_whole.grad[mine], bf16)
    assert_near(summed(divided.router.weight.grad), whole.router.weight.grad, bf16)
    for name in NAMES:
        parameter, before = divided.get_parameter(name), whole.get_parameter(name)
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (Shard(0),)
        assert torch.equal(full(parameter), before)
        assert_near(full(parameter.grad), before.grad, bf16)

    sum_loads(divided, dist.group.WORLD)
    assert torch.equal(divided.load, whole.load)
    whole.balance()
    divided.balance()
    assert torch.equal(divided.bias, whole.bias)

    with torch.inference_mode():
        assert_near(divided.eval()(x[mine]), whole.eval()(x)[mine])


def cases(world: int) -> Iterator[dict[str, Any]]:
    """Batches, experts and routings: plain, lopsided, and any others."""
    plain = {"config": replace(MOE, experts=EXPERTS[world], route_scale=1.5), "sizes": [6] * world, "favourite": None}
    yield plain
    for favourite in (0, EXPERTS[world] - 1):  # all ranks but one compute nothing at all
        yield plain | {"config": replace(MOE, experts=EXPERTS[world], active=1), "favourite": favourite}
    random = Random(world)
    for _ in range(20):
        count = world * random.randint(1, 3)
        config = replace(MOE, experts=count, active=random.randint(1, count), shared=random.randint(0, 1))
        sizes = [random.randint(0, 4) for _ in range(world)]
        yield {"config": config, "sizes": sizes, "favourite": random.choice([None, random.randrange(count)])}


def compare_layers() -> None:
    for case in cases(dist.get_world_size()):
        for bf16 in (False, True):
            try:
                compare_layer(**case, bf16=bf16)
            except Exception as error:
                error.add_note(f"in {case}, bf16 {bf16}")
                raise


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_layer_equals_the_whole(processes: ForkServerContext, world: int):
    run_ranks(processes, world, compare_layers)


def test_an_expert_without_rows_has_a_gradient_of_zero():
    x = torch.zeros(0, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    y = grouped_linear(x, weight, torch.zeros(4, dtype=torch.int64))
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


def traffic(bf16: bool) -> list[tuple[torch.dtype, int, int]]:
    """Type, rows sent and rows received of each exchange of a forward with six tokens."""
    calls = []
    rank, world = dist.get_rank(), dist.get_world_size()
    divided = build(MOE, favourite=0)
    divide_experts(divided, init_device_mesh("cpu", (world,)))
    exchange_rows, exchange_counts = experts.all_to_all_single_autograd, dist.all_to_all_single

    def rows(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        calls.append((x.dtype, sum(sent), sum(received)))
        return exchange_rows(x, received, sent, group)

    def counts(received: Tensor, sent: Tensor, **options: Any) -> None:
        calls.append((sent.dtype, sent.numel(), received.numel()))
        exchange_counts(received, sent, **options)

    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(rank))
    with (
        mock.patch.object(experts, "all_to_all_single_autograd", rows),
        mock.patch.object(dist, "all_to_all_single", counts),
        in_bf16(bf16),
    ):
        divided(x)
    sum_loads(divided, dist.group.WORLD)
    held = int(divided.load.view(world, -1).sum(1)[rank])
    assert calls[1][1:] == (6 * MOE.active, held)
    return calls


@pytest.mark.parametrize("bf16", [False, True])
def test_what_was_chosen_travels_and_nothing_else(processes: ForkServerContext, bf16: bool):
    dtype = torch.bfloat16 if bf16 else torch.float32
    received = 0
    for calls in run_ranks(processes, 4, traffic, bf16):
        held = calls[1][2]
        assert calls == [(torch.int64, 4, 4), (dtype, 12, held), (dtype, held, 12)]
        received += held
    assert received == 4 * 12


# --- whole models -------------------------------------------------------------------------------------------


def model_of(count: int, seed: int = 0) -> LanguageModel:
    """Three blocks, two of them with `count` experts."""
    model, _ = live(replace(BASE, layers=3, moe=replace(MOE, experts=count, balance_speed=0.05)), seed)
    return model.train()


def shard(model: LanguageModel, ignored: set[nn.Parameter]) -> None:
    """All else is divided by FSDP2 over all ranks; gradients are summed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def compare_run(count: int, divide: int, sharded: bool, recompute: bool) -> None:
    """Four steps of SGD on two sequences a rank against one process on all of them; experts among `divide` ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // divide, divide), mesh_dim_names=("replicas", "experts"))
    whole, divided = model_of(count), model_of(count)
    ignored = divide_experts(divided, mesh["experts"])
    if recompute:
        for block in divided.blocks:
            block.checkpoint = partial(checkpoint, use_reentrant=False)
    if sharded:
        shard(divided, ignored)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2) for model in (whole, divided)]
    start = whole.blocks[2].ffn.bias.clone()

    for step in range(4):
        tokens, targets = text(8, batch=2 * world, seed=2 * step), text(8, batch=2 * world, seed=2 * step + 1)
        mine = slice(2 * rank, 2 * rank + 2)
        loss = whole.loss(tokens, targets)
        part = divided.loss(tokens[mine], targets[mine], reduction="none").sum() / targets.numel()
        loss.backward()
        part.backward()
        for parameter in divided.parameters():
            assert parameter.grad is not None
            if parameter in ignored:
                dist.all_reduce(parameter.grad.to_local(), group=mesh["replicas"].get_group())
            elif not sharded:
                dist.all_reduce(parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        sum_loads(divided, dist.group.WORLD)
        whole.balance()
        divided.balance()
        assert_near(summed(part.detach()), loss.detach())

    assert not torch.equal(whole.blocks[2].ffn.bias, start)
    for name, buffer in whole.named_buffers():
        assert torch.equal(divided.get_buffer(name), buffer), name
    for name, parameter in whole.named_parameters():
        assert_near(full(divided.get_parameter(name)), parameter, within=1e-5)


def compare_runs(divide: int) -> None:
    for sharded in (False, True):
        for recompute in (False, True):
            compare_run(EXPERTS[dist.get_world_size()], divide, sharded, recompute)


@pytest.mark.parametrize(("world", "divide"), [(1, 1), (2, 2), (3, 3), (4, 2), (4, 4)])
def test_a_run_equals_that_of_one_process(processes: ForkServerContext, world: int, divide: int):
    run_ranks(processes, world, compare_runs, divide)


def save(directory: Path) -> None:
    model = model_of(4, seed=0)
    divide_experts(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.save(model.state_dict(), checkpoint_id=directory)


def load(directory: Path) -> None:
    truth, model = model_of(4, seed=0), model_of(4, seed=1)
    divide_experts(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.load(model.state_dict(), checkpoint_id=directory)
    for name, tensor in truth.state_dict().items():
        assert torch.equal(full(model.state_dict()[name]), tensor), name


@pytest.mark.parametrize("worlds", [(2, 4), (4, 1)])
def test_a_checkpoint_is_divided_anew(processes: ForkServerContext, tmp_path: Path, worlds: tuple[int, int]):
    run_ranks(processes, worlds[0], save, tmp_path)
    run_ranks(processes, worlds[1], load, tmp_path)


def refuse(count: int | None, message: str) -> None:
    model = live(BASE)[0] if count is None else model_of(count)
    with pytest.raises(ConfigError, match=message):
        divide_experts(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_what_cannot_be_divided_is_refused(processes: ForkServerContext):
    run_ranks(processes, 3, refuse, 4, "4 experts cannot be divided equally among 3 ranks")
    run_ranks(processes, 2, refuse, None, "no mixture of experts")


def test_a_model_without_mixtures_has_no_loads_to_sum(processes: ForkServerContext):
    run_ranks(processes, 2, sum_no_loads)


def sum_no_loads() -> None:
    sum_loads(live(BASE)[0], dist.group.WORLD)
