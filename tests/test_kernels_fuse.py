"""The fused kernels against Engram's plain operations: values, gradients, and the bits for any number of threads."""

from dataclasses import replace

import fused
import numpy as np
import pytest
import torch
from fused import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

import engram_lm.kernels
from engram_lm import memory
from engram_lm.memory import EngramConfig

kernel = pytest.importorskip("engram_lm.kernels.fuse")

LAYOUTS = {
    "paper": EngramConfig.paper(),
    "paper, plain gate": replace(EngramConfig.paper(), gate="plain"),
    "paper, long reach": replace(EngramConfig.paper(), conv_kernel=5, conv_dilation=4),
    "deepseek_v41": EngramConfig.deepseek_v41(),
    "qwen_ple": EngramConfig.qwen_ple(),
}


def example(layout, **sizes):
    return fused.example(LAYOUTS[layout], **{"length": 20, "streams": 1, "dim": 24} | sizes)


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
def test_as_near_to_double_precision_as_plain_operations(
    layout, batch, length, streams, dim, documents, silenced, seed
):
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_for_any_number_of_threads(layout, monkeypatch):
    inputs = example(layout, batch=3, length=300, streams=2)
    monkeypatch.setattr(kernel, "PART", 1)
    found = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(engram_lm.kernels, "threads", lambda threads=threads: threads)
        found.append(evaluate(*inputs))
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_scores_too_small_to_be_squashed(layout, size):
    """Of a hidden state of zeros the score is zero; of one as small as this, below the floor (unless eps is smaller)."""
    module, hidden, rows = example(layout)
    truth = evaluate(module, size * hidden, rows, plain=True)
    for name, found in evaluate(module, size * hidden, rows).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-4, atol=1e-5 * float(truth[name].abs().max()), msg=name)


def test_rows_of_zero_and_a_silent_convolution():
    """What training begins with."""
    module, hidden, rows = example("paper")
    module.reset_parameters()
    truth = evaluate(module, hidden, 0 * rows, plain=True)
    assert truth["rows"].abs().sum() > 0
    for name, found in evaluate(module, hidden, 0 * rows).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-4, atol=1e-5 * float(truth[name].abs().max()), msg=name)


def test_nan_is_passed_on_and_silenced_as_by_plain_operations():
    module, hidden, rows = example("paper", length=40)
    keep = torch.ones(2, 40, dtype=torch.bool)
    hidden[0, 10], rows[1, 5], rows[1, 30], keep[1, 30] = torch.nan, torch.inf, torch.nan, False
    found, plain = (evaluate(module, hidden, rows, keep=keep, plain=plain)["delta"] for plain in (False, True))
    assert torch.equal(found.isfinite(), plain.isfinite())
    assert not found[0, 10].isfinite().any()
    assert found[1, 30].isfinite().all()


def test_half_precision_streams():
    module, hidden, rows = example("qwen_ple", streams=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(module, hidden.bfloat16().float(), rows)["delta"]
        half = module(hidden.bfloat16(), rows)[0]
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, found.bfloat16())


def test_streams_that_share_their_memory():
    """The first block is given one hidden state expanded to all streams; a sum's gradient is one number, expanded."""
    module, hidden, rows = example("paper", streams=4)
    shared = hidden[:, :, :1].clone().requires_grad_()
    module(shared.expand(-1, -1, 4, -1), rows)[0].sum().backward()
    apart = shared.detach().repeat(1, 1, 4, 1).requires_grad_()
    module(apart, rows)[0].backward(torch.ones(apart.shape))
    torch.testing.assert_close(shared.grad, apart.grad.sum(2, keepdim=True))


def test_gradients_of_gradients():
    found = []
    for plain in (False, True):
        module, hidden, rows = example("paper", streams=2)
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(memory, "compiled", lambda: False)
            delta = module(hidden, rows.requires_grad_())[0]
        (grad,) = torch.autograd.grad(delta.square().sum(), rows, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [rows, *module.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_who_takes_the_plain_way():
    def takes_kernels(module, hidden, rows, **given):
        return "Fuse" in type(module(hidden, rows, **given)[0].grad_fn).__name__

    module, hidden, rows = example("paper")
    assert takes_kernels(module, hidden, rows)
    assert not takes_kernels(module, hidden, rows, with_state=True)
    assert not takes_kernels(torch.compile(module, backend="eager", fullgraph=True), hidden, rows)
    assert not takes_kernels(module.double(), hidden.double(), rows.double())


def test_exp():
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    truth = np.exp(x.astype(np.float64))
    found = np.array([kernel.exp(number) for number in x])
    assert (np.abs(found - truth) / np.spacing(truth.astype(np.float32))).max() < 1.1
    assert kernel.exp(np.float32(-np.inf)) == kernel.exp(np.float32(-87))
    assert kernel.exp(np.float32(np.inf)) == kernel.exp(np.float32(88))
    assert np.isnan(kernel.exp(np.float32(np.nan)))
