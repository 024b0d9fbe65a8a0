"""A model over ranks: gradients summed where each holds all of it, FSDP2 where each holds a part, and tensors in parts.

Every rank computes the losses of its own part of the batch, each divided by the targets of the whole batch. So gradients
are summed over ranks, never averaged, and are those of one process that computes it all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..model.lm import LanguageModel


def shard_backbone(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Leave each rank of a one-dimensional mesh a part of every parameter (FSDP2): DTensors with Shard(0) over the mesh.

    All ranks must hold the same weights; nothing is sent. What blocks hold as DTensors already (experts) stays as it is. From
    then on a forward or backward of one rank waits for those of all others, and a backward sums its gradients over them;
    several backwards before a step add up. The optimizer is built afterwards.

    Each block is gathered when it is reached. What lies outside of blocks is gathered by a forward and stays until the
    backward, so that `model.logits` may follow.
    """
    divided: set[nn.Parameter] = {parameter for parameter in model.parameters() if isinstance(parameter, DTensor)}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=divided)
    # On its own: what the model itself holds may be reduced as soon as the gradient of its input, the rows, is known, and
    # the embedding's may come later.
    fully_shard(model.embedding, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else by PREMUL_SUM, which gloo lacks


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Make every gradient the sum of those of all ranks of the group: one collective a dtype, after the last backward.

    A parameter without a gradient here counts as zero and gets one if any rank has one. Parameters must come in the same
    order everywhere. Of DTensors the local parts are summed: they must be the same part in every rank of the group.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        by_dtype[parameter.dtype].append(parameter)
    for members in by_dtype.values():
        # The layout does not depend on who has a gradient: the same sums in the same order in every run.
        present = torch.tensor([parameter.grad is not None for parameter in members]).to(local(members[0]))
        parts = [local(p if p.grad is None else p.grad) for p in members]
        filled = [
            part.new_zeros(part.numel()) if p.grad is None else part.flatten()
            for p, part in zip(members, parts, strict=True)
        ]
        total = torch.cat([*filled, present])
        dist.all_reduce(total, group=group)
        *sums, anywhere = total.split([*(part.numel() for part in parts), len(members)])
        for parameter, summed, found in zip(members, sums, anywhere.tolist(), strict=True):
            if found:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                local(parameter.grad).copy_(summed.view_as(local(parameter.grad)))


# --- tensors in parts -----------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, sharing its memory; any other tensor itself. Without autograd only."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divided_as(like: Tensor, whole: Tensor) -> Tensor:
    """A tensor divided as another is: a whole one that every rank has, or a DTensor. Only the latter is sent for."""
    if not isinstance(like, DTensor):
        return whole
    if isinstance(whole, DTensor):
        return whole.redistribute(like.device_mesh, like.placements)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def is_first_to_hold(tensor: Tensor, rank: int) -> bool:
    """Whether no rank before this one holds the same part of a tensor; a plain one is whole on every rank.

    Where several meshes divide the same tensor, each for itself, all of it is on the ranks of the one with rank 0.
    """
    if not isinstance(tensor, DTensor):
        return rank == 0
    mesh = tensor.device_mesh
    along = zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
    return 0 in mesh.mesh and all(place == 0 or placement.is_shard() for place, placement in along)


def rows_divided_among(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that the rows of a matrix are divided among; None where a rank holds whole matrices [..., m, n]."""
    if isinstance(tensor, DTensor) and tensor.ndim == 2:
        for dimension, placement in enumerate(tensor.placements):
            if placement == Shard(0):
                return tensor.device_mesh.get_group(dimension)
    return None
