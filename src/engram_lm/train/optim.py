"""One parameter table says how each tensor learns: Muon for matrices, AdamW for the rest, row-wise for memory tables.

Muon's step is scaled to AdamW's root mean square (0.2 sqrt(max side); Moonlight, arXiv 2502.16982), so one learning rate
serves both, and a table's is a multiple of it.
"""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..errors import ConfigError, MismatchError
from .precision import bf16_is_fast
from .ranks import Ranks
from .sharding import divided_as, is_first_to_hold, local, rows_divided_among


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates and their course. Fractions are of all steps."""

    lr: float = 5e-3
    """Peak learning rate of the backbone."""
    table_lr: float = 80.0
    """Peak learning rate of memory rows, as a multiple of lr; 0 freezes the table."""
    weight_decay: float = 0.1
    """Of the matrices; nothing else decays."""
    warmup: float = 0.05
    """Fraction in which the rates rise from 0 in a straight line."""
    decay: float = 0.4
    """Fraction at the end in which they fall in a straight line."""
    final: float = 0.05
    """What is left of the rates at the end."""
    momentum: float = 0.95
    """Muon's."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 for none."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.table_lr < 0:
            raise ConfigError(f"optim.lr must be above 0 and table_lr at least 0, got {self.lr} and {self.table_lr}.")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ConfigError(f"optim.warmup {self.warmup} and decay {self.decay} are fractions that fit in one run.")
        if len(self.betas) != 2:
            raise ConfigError(f"optim.betas are two numbers, got {self.betas}.")

    @property
    def peak_table_lr(self) -> float:
        """Peak learning rate of memory rows."""
        return self.lr * self.table_lr


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """Multiple of the peak learning rate in step `step` of `steps`: up, level, down."""
    warmup, decay = config.warmup * steps, config.decay * steps
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = min(1.0, (steps - step) / decay) if decay else 1.0
    return rise * (config.final + (1 - config.final) * left)


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches `pattern`: their optimizer, multiple of the learning rate, and multiple of the decay."""

    pattern: str
    optimizer: Literal["muon", "adamw"]
    lr: float = 1.0
    weight_decay: float = 0.0


# The first match counts. Tables are not parameters: their rows are updated where they live, at `table_lr`, without decay.
PARAMETER_TABLE = (
    Rule("embedding.weight", "adamw"),
    Rule("head.weight", "adamw"),
    Rule("*norm.weight", "adamw"),
    Rule("*_connection.*", "adamw"),  # hyper-connections: small matrices around the identity
    Rule("*.router.weight", "adamw"),
    Rule("*.memory.*_gain", "adamw"),
    Rule("*.memory.conv_weight", "adamw"),
    Rule("*.bias", "adamw"),
    *(Rule(f"*.ffn.{part}", "muon", weight_decay=1.0) for part in ("gate", "up", "down")),  # [experts, out, in]
    Rule("*.weight", "muon", weight_decay=1.0),
)


def rule_of(name: str) -> Rule:
    """The parameter table's row for a tensor. Raises ConfigError when there is none."""
    for rule in PARAMETER_TABLE:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule
    raise ConfigError(f"no row of the parameter table matches {name!r}: it would never have been trained.")


class Optimizer:
    """Every parameter of a model, each under the rule that names it.

    ranks: all that take the same steps; None for a process that runs alone. Parameters may be DTensors, each on a mesh of its own; each rank then updates its
    part of them. Gradients are those of the whole batch: the same on every rank that holds the same part.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self.muon: dict[str, Tensor] = {}
        self.adamw_parameters: dict[str, Tensor] = {}
        groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
        for name, parameter in sorted(model.named_parameters(), key=lambda item: (rule_of(item[0]).pattern, item[0])):
            rule = rule_of(name)
            if rule.optimizer == "muon":
                self.muon[name] = parameter
            else:
                groups[rule.lr, rule.weight_decay].append(parameter)
                self.adamw_parameters[name] = parameter
        self.momenta = {name: torch.zeros_like(parameter) for name, parameter in self.muon.items()}
        self.adamw = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": lr * config.lr,
                    "peak": lr * config.lr,
                    "weight_decay": decay * config.weight_decay,
                }
                for (lr, decay), parameters in groups.items()
            ],
            betas=(config.betas[0], config.betas[1]),
            eps=1e-10,
            fused=True,
        )
        for held in self.adamw_parameters.values():  # as AdamW would, but now: a checkpoint is read into them
            self.adamw.state[held] = {
                "step": torch.zeros((), device=held.device),
                "exp_avg": torch.zeros_like(held),
                "exp_avg_sq": torch.zeros_like(held),
            }
        self.parameters = list(model.parameters())
        if len(self.muon) + len(self.adamw_parameters) != len(self.parameters):
            raise AssertionError("every parameter is in exactly one group")

    @torch.no_grad()
    def clip(self, also: Iterable[Tensor] = ()) -> float:
        """Scale all gradients, those of `also` too, to the configured norm; returns the norm before, on every rank the same.

        also: gradients of this rank alone, such as those of the memory rows that it owns.
        """
        own = list(also)
        shared = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.ranks.group is None:
            norm = get_total_norm([*shared, *own])
        else:  # each part of each tensor is counted once
            counted = [local(gradient) for gradient in shared if is_first_to_hold(gradient, self.ranks.rank)] + own
            norm = get_total_norm([gradient for gradient in counted if gradient.numel()])
            square = norm.to(self.parameters[0].device, torch.float64).square()
            dist.all_reduce(square, group=self.ranks.group)
            norm = square.sqrt()
        scale = ((self.config.clip or math.inf) / (norm + 1e-6)).clamp(max=1.0)
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for gradient in [*map(local, shared), *own]:
            by_device[gradient.device].append(gradient)
        for device, gradients in by_device.items():
            torch._foreach_mul_(gradients, scale.to(device, gradients[0].dtype))
        return float(norm)

    def step(self, multiple: float) -> None:
        """Apply and clear the gradients at `multiple` of the peak learning rates."""
        muon_step(
            list(self.muon.values()),
            list(self.momenta.values()),
            lr=self.config.lr * multiple,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * multiple
        self.adamw.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor of optimizer state under a flat name, for a checkpoint; of a DTensor's state, DTensors."""
        state = {f"muon.{name}": momentum for name, momentum in self.momenta.items()}
        for name, parameter in self.adamw_parameters.items():
            state |= {f"adamw.{key}.{name}": value for key, value in self.adamw.state[parameter].items()}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave, here or with parameters divided otherwise: whole tensors, or DTensors of this mesh.

        Raises MismatchError when it is another model's.
        """
        try:
            for name, ours in self.state().items():
                theirs = state[name]
                if theirs.shape != ours.shape:
                    raise RuntimeError(f"{name} has the shape {list(theirs.shape)}, not {list(ours.shape)}")
                ours.copy_(divided_as(ours, theirs))
        except (KeyError, RuntimeError) as error:
            raise MismatchError(f"optimizer state is another model's: {error}") from None


@torch.no_grad()
def muon_step(
    parameters: list[Tensor], momenta: list[Tensor], *, lr: float, momentum: float, weight_decay: float
) -> None:
    """Muon with Nesterov momentum (Jordan 2024) on matrices [..., m, n], all of one shape orthogonalised together.

    They may be DTensors that are divided along their first dimension.
    """
    batches: dict[tuple[torch.Size, dist.ProcessGroup | None], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for parameter, buffer in zip(parameters, momenta, strict=True):
        if parameter.grad is None:
            continue
        gradient, average = local(parameter.grad), local(buffer)
        average.lerp_(gradient, 1 - momentum)
        update = gradient.lerp_(average, momentum)
        batches[parameter.shape[-2:], rows_divided_among(parameter)].append((local(parameter), update))
    for (shape, group), members in batches.items():
        counts = [update.shape[:-2].numel() for _, update in members]
        stacked = torch.cat(
            [update.reshape(count, *update.shape[-2:]) for count, (_, update) in zip(counts, members, strict=True)]
        )
        orthogonal = orthogonalise_divided(stacked, shape[0], group) if group else orthogonalise(stacked)
        scale = 0.2 * math.sqrt(max(shape))
        for (parameter, _), piece in zip(members, orthogonal.split(counts), strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(piece.view_as(parameter), alpha=-lr * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly the nearest orthogonal matrices of a batch [N, m, n]: five quintic Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if bf16_is_fast(matrices.device) else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def orthogonalise_divided(parts: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """`orthogonalise` for matrices [N, m, n] whose `rows` = m are divided among a group as a DTensor's are.

    parts: the rows of each that this rank holds, [N, m', n]; so are the results. Every rank is sent some of the matrices
    whole, orthogonalises them, and sends everyone their rows back: no work is done twice.
    """
    number, held, columns = parts.shape
    size, rank = group.size(), group.rank()
    share = -(-rows // size)
    heights = [min(share, max(0, rows - other * share)) for other in range(size)]  # of each rank's part
    numbers = [number * (other + 1) // size - number * other // size for other in range(size)]  # each orthogonalises
    mine = [numbers[rank] * height * columns for height in heights]
    theirs = [count * held * columns for count in numbers]

    received = parts.new_empty(sum(mine))
    dist.all_to_all_single(received, parts.flatten(), mine, theirs, group=group)
    pieces = [
        piece.view(numbers[rank], height, columns) for piece, height in zip(received.split(mine), heights, strict=True)
    ]
    orthogonal = orthogonalise(torch.cat(pieces, dim=1))
    sent = torch.cat([piece.flatten() for piece in orthogonal.split(heights, dim=1)])
    returned = torch.empty_like(parts)
    dist.all_to_all_single(returned.view(-1), sent, theirs, mine, group=group)
    return returned
