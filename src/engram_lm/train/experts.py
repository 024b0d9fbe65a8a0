"""Expert parallelism: each rank of a group holds some of every mixture's experts, and tokens travel to them and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..errors import ConfigError
from ..model.ffn import MixtureOfExperts, grouped_swiglu


def divide_experts(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leave each of the P ranks of a one-dimensional mesh E / P experts of every mixture; returns their parameters.

    Rank p keeps experts [p E / P, (p + 1) E / P), as it holds them now: nothing is sent, so all ranks must hold the
    same weights. gate, up and down become new parameters, DTensors with Shard(0) over the mesh. From then on a forward
    or backward of one rank waits for those of all others.

    Every rank sends its tokens to the rank that holds their expert, so an expert's gradient is already summed over
    the mesh. It must not be summed over it again, only over ranks that hold the same experts. Given to `fully_shard`
    as `ignored_params`, the parameters stay as they are.

    Raises ConfigError when there is no mixture, or one whose experts are not a multiple of P; nothing is changed then.
    """
    mixtures = list(_mixtures(model))
    if not mixtures:
        raise ConfigError(f"experts cannot be divided among {mesh.size()} ranks: the model has no mixture of experts.")
    for mixture in mixtures:
        if mixture.config.experts % mesh.size():
            raise ConfigError(
                f"{mixture.config.experts} experts cannot be divided equally among {mesh.size()} ranks: some would have "
                "held more than others, and all would have waited for them."
            )
    divided = set()
    for mixture in mixtures:
        for name in ("gate", "up", "down"):
            part = distribute_tensor(mixture.get_parameter(name).detach(), mesh, [Shard(0)], src_data_rank=None)
            parameter = nn.Parameter(part.clone())  # a copy, or the whole tensor would stay in memory
            mixture.register_parameter(name, parameter)
            divided.add(parameter)
        mixture.exchange = Exchange(mesh.get_group())
    return divided


def sum_loads(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Make every mixture's load that of all ranks of the group, in one collective: to be called before `balance`.

    Each rank counts its own tokens only, so the group is all ranks of the run; their biases then stay the same.
    """
    loads = [mixture.load for mixture in _mixtures(model)]
    if loads:
        total = torch.cat(loads)
        dist.all_reduce(total, group=group)
        torch._foreach_copy_(loads, total.split([len(load) for load in loads]))


class Exchange:
    """`grouped_swiglu` for a group of ranks that hold equal contiguous parts of the experts.

    Rows travel to their expert's rank, are computed there and travel back. There are as many as were chosen: none is
    padded, none dropped. A rank may get none. All is ordered by (expert, source rank, place at the source), so
    results do not depend on timing.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, x: Tensor, counts: Tensor, gate: DTensor, up: DTensor, down: DTensor) -> Tensor:
        """x [N, D], sorted by expert, counts [E] of this rank's rows and the divided parameters -> [N, D]."""
        device, ranks = x.device.type, self.group.size()
        if torch.is_autocast_enabled(device):  # rows are computed in this type: they need not travel in a wider one
            x = x.to(torch.get_autocast_dtype(device))

        sent = counts.view(ranks, -1)  # [P, E / P]: to each rank, for each of its experts
        received = torch.empty_like(sent)  # from each rank, for each expert here
        dist.all_to_all_single(received, sent, group=self.group)
        sizes_sent, sizes_received = torch.stack([sent.sum(1), received.sum(1)]).tolist()  # one wait for the device

        there = all_to_all_single_autograd(x, sizes_received, sizes_sent, self.group)
        expert = torch.arange(sent.shape[1], device=x.device).repeat(ranks).repeat_interleave(received.flatten())
        order = expert.argsort(stable=True)
        y = grouped_swiglu(there[order], received.sum(0), gate.to_local(), up.to_local(), down.to_local())
        return all_to_all_single_autograd(y[order.argsort()], sizes_sent, sizes_received, self.group)


def _mixtures(model: nn.Module) -> Iterator[MixtureOfExperts]:
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))
