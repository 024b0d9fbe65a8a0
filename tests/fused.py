"""An Engram layer that is fused, and all that comes out of it: for the tests of either kind of kernels."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from engram_lm import memory
from engram_lm.memory import Engram


def example(config, *, batch=2, length=7, streams=2, dim=12, seed=0):
    """A module, hidden states and rows. No score is near zero, where a rounding error changes the root's slope."""
    torch.manual_seed(seed)
    module = Engram(replace(config, row_dim=6), dim=dim, streams=streams, rows_per_token=3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    noise, rows = torch.randn(batch, length, streams, dim), torch.randn(batch, length, 3, 6)
    with torch.no_grad():
        _, projected, gain, _ = module._inputs(noise, rows)
    agrees = torch.randn(batch, length, streams, 1).sign()
    return module, agrees * gain * projected[:, :, :-1] * (1 + 0.2 * noise), rows


def evaluate(module, hidden, rows, *, plain=False, dtype=torch.float32, **given):
    """The output, and the gradients of everything for a fixed random gradient of the output."""
    module = deepcopy(module).to(dtype)
    hidden, rows = (x.to(dtype).requires_grad_() for x in (hidden, rows))
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(memory, "_kernels_for", lambda hidden: None)
        delta = module(hidden, rows, **given)[0]
    upstream = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1))
    wanted = {"hidden": hidden, "rows": rows, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(delta, list(wanted.values()), upstream.to(dtype))
    return {"delta": delta.detach(), **dict(zip(wanted, gradients, strict=True))}
