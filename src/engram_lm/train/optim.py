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
from torch import Tensor, nn

from ..errors import ConfigError, MismatchError
from .precision import bf16_is_fast


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
    """Every parameter of a model, each under the rule that names it."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.muon: dict[str, Tensor] = {}
        adamw: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
        self.adamw_names: list[str] = []
        for name, parameter in sorted(model.named_parameters(), key=lambda item: (rule_of(item[0]).pattern, item[0])):
            rule = rule_of(name)
            if rule.optimizer == "muon":
                self.muon[name] = parameter
            else:
                adamw[rule.lr, rule.weight_decay].append(parameter)
                self.adamw_names.append(name)
        self.momenta = {name: torch.zeros_like(parameter) for name, parameter in self.muon.items()}
        groups = [
            {
                "params": parameters,
                "lr": lr * config.lr,
                "peak": lr * config.lr,
                "weight_decay": decay * config.weight_decay,
            }
            for (lr, decay), parameters in adamw.items()
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=1e-10, fused=True)
        self.parameters = list(model.parameters())
        if len(self.muon) + len(self.adamw_names) != len(self.parameters):
            raise AssertionError("every parameter is in exactly one group")

    def clip(self, also: Iterable[Tensor] = ()) -> float:
        """Scale all gradients, those of `also` too, to the configured norm; returns the norm before."""
        limit = self.config.clip or math.inf
        return float(torch.nn.utils.clip_grad_norm_([*self.parameters, *also], limit))

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
        """Every tensor of optimizer state under a flat name, for a checkpoint."""
        state = {f"muon.{name}": momentum for name, momentum in self.momenta.items()}
        for name, parameter in zip(self.adamw_names, self._adamw_parameters(), strict=True):
            state |= {f"adamw.{key}.{name}": value for key, value in self.adamw.state[parameter].items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        try:
            for name, momentum in self.momenta.items():
                momentum.copy_(state[f"muon.{name}"])
            for name, parameter in zip(self.adamw_names, self._adamw_parameters(), strict=True):
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adamw.{key}.{name}" in state]
                self.adamw.state[parameter] = {key: state[f"adamw.{key}.{name}"].clone() for key in keys}
        except (KeyError, RuntimeError) as error:
            raise MismatchError(f"optimizer state is another model's: {error}") from None

    def _adamw_parameters(self) -> list[Tensor]:
        return [parameter for group in self.adamw.param_groups for parameter in group["params"]]


def muon_step(
    parameters: list[Tensor], momenta: list[Tensor], *, lr: float, momentum: float, weight_decay: float
) -> None:
    """Muon with Nesterov momentum (Jordan 2024) on matrices [..., m, n], all of one shape orthogonalised together."""
    by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for parameter, buffer in zip(parameters, momenta, strict=True):
        if parameter.grad is None:
            continue
        buffer.lerp_(parameter.grad, 1 - momentum)
        update = parameter.grad.lerp_(buffer, momentum)
        by_shape[parameter.shape[-2:]].append((parameter, update))
    for shape, members in by_shape.items():
        stacked = torch.cat([update.reshape(-1, *shape) for _, update in members])
        scale = 0.2 * math.sqrt(max(shape))
        pieces = orthogonalise(stacked).split([parameter.numel() // shape.numel() for parameter, _ in members])
        for (parameter, _), piece in zip(members, pieces, strict=True):
            parameter.data.mul_(1 - lr * weight_decay).add_(piece.view_as(parameter), alpha=-lr * scale)


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
