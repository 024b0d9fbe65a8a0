"""Engram: forward and backward near the float64 module, at most about as far from it as plain operations are."""

from __future__ import annotations

import copy
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from engram_lm.memory import Engram, EngramConfig

from .bench import Bench, without_kernels
from .equal import deterministic, distance, same

FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # an error below it is none


class Case(NamedTuple):
    """A module and what it is given; all of it does something."""

    module: Engram
    hidden: Tensor
    rows: Tensor
    grad: Tensor  # of the delta
    options: dict[str, Tensor]  # segments, keep

    @staticmethod
    def make(
        bench: Bench,
        config: EngramConfig,
        shape: tuple[int, int, int, int],
        rows: int,
        dtype: torch.dtype,
        *,
        masks: bool,
    ) -> Case:
        """shape: [B, T, M, D]; rows: a token's."""
        batch, length, streams, dim = shape
        module = Engram(config, dim=dim, streams=streams, rows_per_token=rows).to(bench.device)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.3 * parameter.abs().mean().clamp(0.1) * bench.normal(*parameter.shape)
        options = {}
        if masks:
            options = {
                "segments": (bench.integers(7, batch, length) == 0).cumsum(1),
                "keep": bench.integers(5, batch, length) > 0,
            }
        return Case(
            module.to(dtype),
            bench.normal(*shape, dtype=dtype),
            bench.normal(batch, length, rows, config.row_dim, dtype=dtype),
            bench.normal(*shape, dtype=dtype),
            options,
        )

    def double(self) -> Case:
        """The same in float64."""
        tensors = (tensor.double() for tensor in (self.hidden, self.rows, self.grad))
        return Case(copy.deepcopy(self.module).double(), *tensors, self.options)

    def run(self) -> dict[str, Tensor]:
        """The delta, and the gradients of everything."""
        inputs = {"hidden": self.hidden.detach().requires_grad_(), "rows": self.rows.detach().requires_grad_()}
        delta, _ = self.module(inputs["hidden"], inputs["rows"], **self.options)
        wanted = inputs | dict(self.module.named_parameters())
        grads = torch.autograd.grad(delta, list(wanted.values()), self.grad)
        return {"delta": delta.detach(), **dict(zip(wanted, grads, strict=True))}


def cases(bench: Bench) -> dict[str, tuple[EngramConfig, tuple[int, int, int, int], int]]:
    """Configuration, [B, T, M, D] and rows a token of each case."""
    paper, v41 = EngramConfig.paper(), EngramConfig.deepseek_v41()
    small = {
        "paper": (EngramConfig(row_dim=8, bias=True), (2, 37, 4, 96), 4),
        "ple": (EngramConfig(row_dim=8, zero_centered=True, conv_dilation=2), (1, 9, 1, 64), 2),
        "v41": (EngramConfig(row_dim=8, gate="copysign_sqrt", conv_kernel=0, norm_eps=1e-20), (3, 5, 2, 100), 3),
        "plain": (EngramConfig(row_dim=8, gate="plain"), (1, 20, 2, 64), 2),
        "open": (EngramConfig(row_dim=8, gate="open", conv_kernel=0), (1, 20, 1, 64), 1),
    }
    real = {
        "paper, real": (
            EngramConfig(row_dim=80, bias=paper.bias, norm_eps=paper.norm_eps, conv_norm_eps=1e-5),
            (4, 2048, 4, 2560),
            16,
        ),
        "v41, real": (v41, (4, 2048, 4, 2560), 24),
    }
    tiny = {
        "paper": (EngramConfig(row_dim=4, conv_kernel=2, conv_dilation=2), (1, 3, 1, 16), 2),
        "v41": (EngramConfig(row_dim=4, gate="copysign_sqrt", conv_kernel=0), (1, 3, 2, 16), 2),
    }
    return bench.size(small | real, tiny)


def near_the_truth(bench: Bench) -> None:
    """Engram: every output and gradient against float64, in float32 and bfloat16; the same bits twice."""
    for (name, (config, shape, rows)), dtype in product(cases(bench).items(), FLOOR):
        case = Case.make(bench, config, shape, rows, dtype, masks="real" not in name)
        with deterministic(poisoned=True):
            once = case.run()
        twice = case.run()
        bench.check(f"{name} {str(dtype)[6:]}: the same bits twice", all(same(once[key], twice[key]) for key in once))
        del twice
        with without_kernels():
            plain, truth = case.run(), case.double().run()
        for key, want in truth.items():
            ours, theirs = distance(once[key], want), distance(plain[key], want)
            limit = max(2 * theirs, FLOOR[dtype])
            bench.check(
                f"{name} {str(dtype)[6:]}: {key}", ours < limit, f"off by {ours:.1e}, plain operations by {theirs:.1e}"
            )


def missing_numbers(bench: Bench) -> None:
    """NaN in gives NaN out: of the stream and position that had it, and of no other document."""
    config = EngramConfig(row_dim=4, conv_kernel=2, conv_dilation=1)
    case = Case.make(bench, config, (1, 6, 2, 16), 2, torch.float32, masks=False)
    case.options["segments"] = torch.tensor([[0, 0, 0, 1, 1, 1]], device=bench.device)
    case.hidden[0, 1, 0, 3] = torch.nan
    delta = case.run()["delta"].isnan().all(-1)[0]
    bench.check(
        "NaN in a stream", delta.tolist() == [[False, False], [True, False], [True, False]] + 3 * [[False, False]]
    )
    case.hidden[0, 1, 0, 3] = 0.0
    case.rows[0, 5, 1, 2] = torch.nan
    delta = case.run()["delta"].isnan().all(-1)[0]
    bench.check("NaN in a row", delta.tolist() == 5 * [[False, False]] + [[True, True]])


CHECKS = (near_the_truth, missing_numbers)
