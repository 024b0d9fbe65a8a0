"""A run divided among ranks: the part of each batch that a rank computes, and what it holds of model and table.

    world = data x context          ranks of one sequence are neighbours: rank = data index * context + chunk
    tables                          rows over all ranks
    backbone                        on every rank, or over all ranks (shard)
    experts                         over groups of so many neighbouring ranks

Every rank knows the whole batch, which is little: tokens. Each loss is divided by the targets of the whole batch, so
losses and gradients of ranks are summed, and are those of one process that computes it all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, TrainingError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from .context import ContextRanks, chunk_ids
from .experts import divide_experts, sum_loads
from .loader import Batch
from .meeting import meet
from .ranks import Ranks
from .sharding import shard_backbone, sum_gradients
from .watch import brief, lost_contact

if TYPE_CHECKING:
    from .loop import TrainConfig


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is divided among the ranks that torchrun starts; the result is that of one process, but for rounding."""

    shard: bool = False
    """Divide the backbone's parameters and their optimizer state among all ranks (FSDP2). Otherwise each rank holds all."""
    experts: int = 1
    """Ranks that the experts of a mixture are divided among."""
    context: int = 1
    """Ranks that share each sequence, a chunk each. The others share the batch."""
    timeout: float = 300.0
    """Seconds after which ranks that do not answer are given up."""

    def __post_init__(self) -> None:
        if self.experts < 1 or self.context < 1 or self.timeout <= 0:
            raise ConfigError(
                f"parallel.experts and parallel.context are at least 1 and timeout above 0, got {self.experts}, "
                f"{self.context} and {self.timeout}."
            )


def start_ranks(timeout: float, device: str) -> Ranks:
    """Find the others that torchrun has started; a process that it did not start is alone.

    device: what the run computes on, as `choose_device` takes it; of several GPUs each rank takes its own. Raises
    TrainingError when some do not come within `timeout` seconds, the time that collectives get too.
    """
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = meet(timeout)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        raise TrainingError(f"rank {rank} found the others gone ({brief(error)}).") from error
    return Ranks(rank, size, dist.group.WORLD)


class Parallel:
    """One rank's part of a run. Built by all ranks together, as all of its methods but `part` and `ids` are called.

    Raises ConfigError for sizes that do not divide one another.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.config, self.ranks = config.parallel, ranks
        world, context = ranks.size, self.config.context
        data = world // context
        for what, whole, parts in (
            ("ranks cannot be divided into groups of parallel.context", world, context),
            ("ranks cannot be divided into groups of parallel.experts", world, self.config.experts),
            ("tokens of a sequence (length) cannot be divided among parallel.context", config.length, context),
            ("sequences of a part of the batch (batch_size / accumulate) cannot be divided among ranks / parallel.context",
             config.batch_size // config.accumulate, data),
        ):  # fmt: skip
            if whole % parts:
                raise ConfigError(f"{whole} {what} = {parts}: some would have had more to do than others.")
        self.experts: DeviceMesh | None = None
        self.holders: dist.ProcessGroup | None = None  # of the same experts
        self.context = ContextRanks()
        if ranks.group is not None:
            if context > 1:
                mesh = init_device_mesh(device.type, (data, context), mesh_dim_names=("data", "context"))["context"]
                self.context = ContextRanks(mesh.get_local_rank(), context, mesh.get_group())
            if self.config.experts > 1:
                shape = world // self.config.experts, self.config.experts
                both = init_device_mesh(device.type, shape, mesh_dim_names=("holders", "experts"))
                self.experts, self.holders = both["experts"], both["holders"].get_group()
            self.everyone = init_device_mesh(device.type, (world,), mesh_dim_names=("ranks",))
            for group in list(_world.pg_map):  # those of the tables too: torch lets all but the first wait half an hour
                _set_pg_timeout(timedelta(seconds=self.config.timeout), group)
        size, first = config.batch_size // data, ranks.rank // context * (config.batch_size // data)
        chunk = config.length // context
        self.sequences = slice(first, first + size)
        self.positions = slice(self.context.rank * chunk, (self.context.rank + 1) * chunk)

    def divide(self, model: LanguageModel) -> None:
        """Leave this rank its part of a model that is the same on all ranks; the optimizer is built afterwards."""
        if self.experts is not None:
            divide_experts(model, self.experts)
        if self.ranks.group is not None and self.config.shard:
            shard_backbone(model, self.everyone)

    def part(self, batch: Batch) -> Batch:
        """This rank's sequences and positions of a batch."""
        where = self.sequences, self.positions
        segments = None if batch.segments is None else batch.segments[where]
        return Batch(batch.tokens[where], batch.targets[where], segments)

    def ids(self, lookup: Lookup, batch: Batch) -> Tensor:
        """Row numbers [b, t, L, K] of this rank's part of a whole batch."""
        # the rows of the neighbour in the batch are read by the shuffled control: it has to see all of it
        ours = slice(None) if lookup.shuffled else self.sequences
        segments = None if batch.segments is None else batch.segments[ours]
        ids = chunk_ids(lookup, batch.tokens[ours], segments, self.positions.start, self.positions.stop)
        return ids[self.sequences] if lookup.shuffled else ids

    def neighbours(self) -> ContextRanks | None:
        """What a model's `neighbours` are while it is given parts of batches."""
        return self.context if self.context.size > 1 else None

    def sum_gradients(self, model: nn.Module) -> None:
        """Make every gradient that of the whole batch, after the last backward of a step."""
        if self.ranks.group is None:
            return
        divided = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        experts = [p for p in divided if p.device_mesh == self.experts]
        if experts and self.holders is not None and self.holders.size() > 1:
            sum_gradients(experts, self.holders)
        if not self.config.shard:
            whole = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
            sum_gradients(whole, self.ranks.group)

    def balance(self, model: LanguageModel) -> None:
        """`model.balance` by the load on all ranks."""
        if self.ranks.group is not None:
            sum_loads(model, self.ranks.group)
        model.balance()

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over ranks."""
        if self.ranks.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.ranks.group)
        return total.tolist()
