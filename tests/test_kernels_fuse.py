"""The fused kernels against Engram's plain operations: values, gradients, and the bits for any number of threads."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm import memory
from engram_lm.kernels import compiled
from engram_lm.memory import Engram, EngramConfig

pytestmark = pytest.mark.skipif(not compiled(), reason="needs Numba")

LAYOUTS = {
    "paper": EngramConfig.paper(),
    "paper, plain gate": replace(EngramConfig.paper(), gate="plain"),
    "paper, long reach": replace(EngramConfig.paper(), conv_kernel=5, conv_dilation=4),
    "deepseek_v41": EngramConfig.deepseek_v41(),
    "qwen_ple": EngramConfig.qwen_ple(),
}


def example(layout, *, batch=2, length=20, streams=1, dim=24, seed=0):
    """A module, hidden states and rows. No score is near zero, where a rounding error changes the root's slope."""
    torch.manual_seed(seed)
    module = Engram(replace(LAYOUTS[layout], row_dim=6), dim=dim, streams=streams, rows_per_token=3)
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
            patch.setattr(memory, "compiled", lambda: False)
        delta = module(hidden, rows, **given)[0]
    upstream = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1))
    wanted = {"hidden": hidden, "rows": rows, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(delta, list(wanted.values()), upstream.to(dtype))
    return {"delta": delta.detach(), **dict(zip(wanted, gradients, strict=True))}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 5, 20, 127, 128, 129, 300]),
    streams=st.sampled_from([1, 4]),
    dim=st.sampled_from([3, 7, 32, 33]),
    documents=st.booleans(),
    silenced=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_as_near_to_double_precision_as_plain_operations(layout, batch, length, streams, dim, documents, silenced, seed):
    inputs = example(layout, batch=batch, length=length, streams=streams, dim=dim, seed=seed)
    given = {
        "segments": (torch.rand(batch, length) < 0.1).cumsum(1) if documents else None,
        "keep": torch.rand(batch, length) < 0.7 if silenced else None,
    }
    truth = evaluate(*inputs, **given, dtype=torch.float64)
    plain = evaluate(*inputs, **given, plain=True)
    for name, found in evaluate(*inputs, **given).items():
        error, usual = ((x - truth[name]).abs().max() for x in (found, plain[name]))
        assert error <= 4 * usual + 1e-5 * truth[name].abs().max(), name
