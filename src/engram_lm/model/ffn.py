"""Feed-forward layers: SwiGLU (Shazeer 2020) and a mixture of experts (DeepSeekMoE, Dai et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: every token passes `active` of `experts` routed experts and all `shared` ones.

    width: of one expert. dense_layers: leading blocks that keep a plain SwiGLU. balance_speed: step of the
    selection bias against uneven load. route_scale: factor on the routed experts' output.
    """

    experts: int
    active: int
    shared: int
    width: int
    dense_layers: int = 1
    balance_speed: float = 1e-3
    route_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise ConfigError(f"moe: a token cannot pass {self.active} of {self.experts} experts.")
        if self.width < 1 or self.shared < 0 or self.dense_layers < 0:
            raise ConfigError(
                f"moe: width {self.width} must be at least 1, shared {self.shared} and dense_layers "
                f"{self.dense_layers} at least 0."
            )


class MixtureOfExperts(nn.Module):
    """Routed and shared experts with loss-free balancing (Wang et al. 2024).

        affinity = sigmoid(router x)                       chosen = the `active` largest of affinity + bias
        y = sum over chosen of affinity_e / (sum of the chosen affinities) * expert_e(x)  +  shared(x)

    `bias` decides who is chosen, never how much an expert counts, so it needs no gradient: training forwards
    add to `load`, and once a step `balance` raises the bias of experts that had less than their share.

    exchange: what runs in the place of `grouped_swiglu`, with its arguments, when other processes hold some of the
    experts; None where all are here.
    """

    exchange: Callable[..., Tensor] | None = None
    bias: Tensor
    load: Tensor

    def __init__(self, config: MoEConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(dim, config.experts, bias=False)
        # one matrix an expert, each [out, in] as in nn.Linear
        self.gate = nn.Parameter(torch.empty(config.experts, config.width, dim))
        self.up = nn.Parameter(torch.empty(config.experts, config.width, dim))
        self.down = nn.Parameter(torch.empty(config.experts, dim, config.width))
        self.shared = SwiGLU(dim, config.shared * config.width) if config.shared else None
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("load", torch.zeros(config.experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        tokens = x.flatten(0, -2)  # [N, D]
        chosen, weights = self.route(tokens)
        y = (self._experts(tokens, chosen) * weights[..., None]).sum(1).to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> the chosen experts [N, A] and their weights [N, A], in single precision at least."""
        with torch.autocast(tokens.device.type, enabled=False):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            affinity = F.linear(tokens.to(dtype), self.router.weight.to(dtype)).sigmoid()
        chosen = (affinity.detach() + self.bias).topk(self.config.active, dim=-1).indices
        weights = affinity.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.config.route_scale

    def _experts(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """tokens [N, D] through each of their chosen experts [N, A] -> [N, A, D].

        Sorting is a permutation, and so is its inverse: nothing is added up in an order that could vary.
        """
        expert = chosen.flatten()
        order = expert.argsort(stable=True)
        load = torch.zeros_like(self.load).scatter_add_(0, expert, torch.ones_like(expert))
        if self.training:
            self.load += load

        x = tokens.repeat_interleave(self.config.active, dim=0)[order]  # [N * A, D], expert by expert
        y = (self.exchange or grouped_swiglu)(x, load, self.gate, self.up, self.down)
        return y[order.argsort()].unflatten(0, chosen.shape)

    @torch.no_grad()
    def balance(self) -> None:
        """Make experts with less load than the mean likelier to be chosen, others less; forget the load."""
        load = self.load.float()
        self.bias += self.config.balance_speed * (load.mean() - load).sign()
        self.load.zero_()


def grouped_swiglu(x: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Rows of x [N, D], sorted by expert, each through its expert's SwiGLU -> [N, D].

    counts: [E] int64, the rows of each expert; N together. gate, up: [E, width, D]. down: [E, D, width].
    """
    ends = counts.cumsum(0)
    hidden = F.silu(grouped_linear(x, gate, ends)) * grouped_linear(x, up, ends)
    return grouped_linear(hidden, down, ends)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [N, in], sorted by expert, each times its expert's matrix of weight [E, out, in] -> [N, out].

    ends: [E] int64, the row behind each expert's last. In bf16 one kernel does all experts, if rows are
    multiples of 16 bytes; otherwise a loop. Follows autocast as a linear layer does.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype == torch.bfloat16 and aligned and len(x):  # the kernel refuses to have nothing to do
        return F.grouped_mm(x, weight.mT, offs=ends.int())
    return grouped_linear_loop(x, weight, ends)


def grouped_linear_loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same, one expert after the other."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(counts), weight, strict=True)])
