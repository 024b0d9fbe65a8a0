"""The GPU's fused kernels, interpreted, against Engram's plain operations in double precision; of memory that held NaN."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from fused import evaluate, example
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm import memory
from engram_lm.memory import Engram, EngramConfig, Inputs, reference_engram

kernel = pytest.importorskip("engram_lm.kernels.gpu.fuse")

LAYOUTS = {
    "paper": EngramConfig.paper(),
    "paper, plain gate": replace(EngramConfig.paper(), gate="plain", norm_eps=0.3, conv_norm_eps=0.7),
    "paper, long reach": replace(EngramConfig.paper(), conv_kernel=5, conv_dilation=2),
    "one tap": replace(EngramConfig.paper(), conv_kernel=1),
    "deepseek_v41": EngramConfig.deepseek_v41(),
    "qwen_ple": EngramConfig.qwen_ple(),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Small tiles and few programs, so that programs meet several tiles and chains; memory that is not zero by chance."""
    monkeypatch.setenv("ENGRAM_KERNELS", "triton")
    monkeypatch.setattr(kernel, "NUMBERS", 64)
    monkeypatch.setattr(kernel, "WARPS", 5)
    poison(monkeypatch, torch.nan)


def poison(patch, filling):
    def poisoned(allocate):
        def wrapped(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(filling) if tensor.is_floating_point() else tensor

        return wrapped

    patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    patch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def distance(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def assert_near_the_truth(found, *inputs, **given):
    """Near to double precision, or where that is ill-conditioned as near as plain operations in single precision."""
    plain = evaluate(*inputs, **given, plain=True)
    for name, truth in evaluate(*inputs, **given, dtype=torch.float64).items():
        assert distance(found[name], truth) < 1e-5 + 4 * distance(plain[name], truth), name


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    batch=st.integers(1, 2),
    length=st.sampled_from([1, 2, 8]),
    streams=st.sampled_from([1, 3, 4]),
    dim=st.sampled_from([3, 18]),
    documents=st.booleans(),
    silenced=st.booleans(),
    warps=st.sampled_from([1, 5, 99]),
    seed=st.integers(0, 99),
)
@settings(max_examples=2)
def test_values_and_gradients_of_everything(layout, batch, length, streams, dim, documents, silenced, warps, seed):
    inputs = example(LAYOUTS[layout], batch=batch, length=length, streams=streams, dim=dim, seed=seed)
    given = {
        "segments": (torch.rand(batch, length) < 0.2).cumsum(1) if documents else None,
        "keep": torch.rand(batch, length) < 0.7 if silenced else None,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "WARPS", warps)
        found = evaluate(*inputs, **given)
    assert_near_the_truth(found, *inputs, **given)


@pytest.mark.parametrize("dtypes", ["bf16 bf16", "bf16 fp32", "fp16 fp16"])
def test_inputs_in_their_own_precision(dtypes):
    """As the plain operations do in double precision with the same rounded inputs; results are rounded to their dtypes."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    query_dtype, projected_dtype = (kinds[name] for name in dtypes.split())
    module, hidden, rows = example(LAYOUTS["qwen_ple"], batch=1, length=8, dim=20)
    query, projected, gain, taps = module._inputs(hidden, rows)
    inputs = [query.to(query_dtype), projected.to(projected_dtype), gain, taps]
    inputs = [x.detach().requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]

    def plain(*inputs):
        return module._fuse(Inputs(*inputs), None, None, None, False)[0]

    delta = kernel.fuse(plain, *inputs, segments=None, keep=None, config=module.config)
    truth = plain(*doubles)
    upstream = torch.randn(truth.shape).to(query_dtype)
    found = [delta, *torch.autograd.grad(delta, inputs, upstream)]
    wanted = [truth, *torch.autograd.grad(truth, doubles, upstream.double())]
    assert [x.dtype for x in found] == [query_dtype, *(x.dtype for x in inputs)]
    for ours, theirs in zip(found, wanted, strict=True):
        eps = torch.finfo(ours.dtype).eps
        assert distance(ours.detach(), theirs.detach()) < max(eps, 2e-5)


def test_hidden_states_in_half_precision_go_in_as_they_are():
    module, hidden, rows = example(LAYOUTS["qwen_ple"], length=4)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(hidden.bfloat16(), rows)[0]
        exact = module(hidden.bfloat16().float(), rows)[0]
    assert half.dtype == torch.bfloat16
    assert distance(half.detach(), exact.detach()) < torch.finfo(torch.bfloat16).eps  # the interpreter truncates


@pytest.mark.parametrize("size", [0.0, 1e-9])
@pytest.mark.parametrize("layout", ["paper", "deepseek_v41"])
def test_scores_too_small_to_be_squashed(layout, size):
    """Of a hidden state of zeros the score is zero; of one as small as this, below the floor (unless eps is smaller)."""
    module, hidden, rows = example(LAYOUTS[layout], length=3)
    assert_near_the_truth(evaluate(module, size * hidden, rows), module, size * hidden, rows)


def test_rows_of_zero_and_a_silent_convolution():
    """What training begins with."""
    module, hidden, rows = example(LAYOUTS["paper"], length=5)
    module.reset_parameters()
    found = evaluate(module, hidden, 0 * rows)
    assert found["rows"].abs().sum() > 0
    assert_near_the_truth(found, module, hidden, 0 * rows)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, which interprets
def test_gates_and_convolutions_far_out():
    """Where e^-x overflows, or is lost beside one."""
    module, hidden, rows = example(LAYOUTS["paper, plain gate"], length=5)
    with torch.no_grad():
        module.query_gain.mul_(300.0)
        module.conv_weight.mul_(300.0)
    assert module.gates(hidden, rows).min() < 1e-40
    assert_near_the_truth(evaluate(module, hidden, rows), module, hidden, rows)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_nan_spreads_where_it_does_in_the_truth():
    module, hidden, rows = example(LAYOUTS["paper"], length=20, dim=6)
    segments = (torch.arange(20) >= 12).long().expand(2, -1)
    keep = torch.ones(2, 20, dtype=torch.bool)
    hidden[0, 10, 1], rows[1, 2], rows[1, 18], keep[1, 18] = torch.nan, torch.inf, torch.nan, False
    delta = evaluate(module, hidden, rows, segments=segments, keep=keep)["delta"]
    truth = reference_engram(module, hidden, rows, segments=segments, keep=keep)
    assert torch.equal(delta.isfinite(), truth.isfinite())
    assert not truth[0, 10, 1].isfinite().any()
    assert truth[0, 13].isfinite().all()
    assert not truth[1, 5].isfinite().any()
    assert truth[1, 18:].isfinite().all()


def test_silenced_positions_receive_no_gradient():
    """Not even of rows that are NaN, or of an upstream gradient that is."""
    module, hidden, rows = example(LAYOUTS["paper"], length=5)
    rows[:, 1], keep = torch.nan, torch.tensor([True, False, True, True, False]).expand(2, -1)
    hidden, rows = hidden.requires_grad_(), rows.requires_grad_()
    query, projected, gain, taps = (x.detach().requires_grad_() for x in module._inputs(hidden, rows))
    delta = kernel.fuse(None, query, projected, gain, taps, segments=None, keep=keep, config=module.config)
    upstream = torch.randn(delta.shape)
    upstream[:, 4] = torch.nan
    grads = torch.autograd.grad(delta, [query, projected], upstream)
    assert all((grad[:, [1, 4]] == 0).all() for grad in grads)


def test_streams_that_share_their_memory():
    """The first block is given one hidden state expanded to all streams; a sum's gradient is one number, expanded."""
    module, hidden, rows = example(LAYOUTS["paper"], length=5, streams=4)
    shared = hidden[:, :, :1].clone().requires_grad_()
    module(shared.expand(-1, -1, 4, -1), rows)[0].sum().backward()
    apart = shared.detach().repeat(1, 1, 4, 1).requires_grad_()
    module(apart, rows)[0].backward(torch.ones(apart.shape))
    torch.testing.assert_close(shared.grad, apart.grad.sum(2, keepdim=True))


def test_any_layout_of_memory():
    """Inputs with strides of their own, as slices and transposes have them."""
    module, hidden, rows = example(LAYOUTS["paper"], length=6)
    mask = torch.rand(6, 2) < 0.5
    given = {"segments": mask.long().T, "keep": (torch.rand(6, 2) < 0.7).T}
    found = evaluate(module, hidden.transpose(0, 1).contiguous().transpose(0, 1), rows[:, :], **given)
    spread = evaluate(module, hidden.mT.contiguous().mT, rows, **given)
    assert_near_the_truth(found, module, hidden, rows, **given)
    assert all(torch.equal(x, spread[name]) for name, x in found.items())


def test_the_same_bits_whatever_memory_held():
    inputs = example(LAYOUTS["paper"], streams=3)
    first = evaluate(*inputs)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 7.0)
        second = evaluate(*inputs)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_gradients_of_gradients():
    found = []
    for kernels in ("gpu", None):
        module, hidden, rows = example(LAYOUTS["paper"], length=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "_kernels_for", lambda hidden, kernels=kernels: kernels)
            delta = module(hidden, rows.requires_grad_())[0]
        (grad,) = torch.autograd.grad(delta.square().sum(), rows, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [rows, *module.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("layout", ["paper", "deepseek_v41"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_by_token(layout, dtype):
    """With a state, and what it becomes, as by plain operations."""
    module, hidden, rows = example(LAYOUTS[layout], length=6)
    keep = torch.rand(2, 6) < 0.7
    results = []
    for kernels in ("gpu", None):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(memory, "_kernels_for", lambda hidden, kernels=kernels: kernels)
            deltas, state = [], None
            for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
                delta, state = module(
                    hidden[:, part].to(dtype), rows[:, part], state, keep=keep[:, part], with_state=True
                )
                deltas.append(delta)
        results.append((torch.cat(deltas, 1), state))
    (ours, our_state), (theirs, their_state) = results
    assert ours.dtype == theirs.dtype
    assert distance(ours, theirs) < max(1e-5, torch.finfo(dtype).eps)
    assert (our_state is None) == (their_state is None) == (layout == "deepseek_v41")
    if our_state is not None:
        assert distance(our_state.inputs, their_state.inputs) < 1e-5
        assert torch.equal(our_state.segments, their_state.segments)


def test_gradients_go_through_a_step_with_a_state():
    module, hidden, rows = example(LAYOUTS["paper"], length=6)
    assert_near_the_truth(evaluate(module, hidden, rows, with_state=True), module, hidden, rows)


@pytest.mark.parametrize("layout", ["paper", "deepseek_v41"])
def test_no_tokens(layout):
    found = evaluate(*example(LAYOUTS[layout], length=0))
    assert found["delta"].shape == (2, 0, 2, 12)
    assert found["conv_weight" if layout == "paper" else "key_gain"].eq(0).all()


def test_who_is_taken_by_the_kernels(monkeypatch):
    calls, fuse = [], kernel.fuse
    monkeypatch.setattr(kernel, "fuse", lambda *args, **kwargs: calls.append(1) or fuse(*args, **kwargs))

    def takes_kernels(module, hidden, rows, **given):
        calls.clear()
        module(hidden, rows, **given)
        return bool(calls)

    module, hidden, rows = example(LAYOUTS["paper"], length=2)
    assert takes_kernels(module, hidden, rows)
    assert takes_kernels(module, hidden, rows, with_state=True)
    assert not takes_kernels(torch.compile(module, backend="eager", fullgraph=True), hidden, rows)
    assert not takes_kernels(deepcopy(module).double(), hidden.double(), rows.double())
    monkeypatch.delenv("ENGRAM_KERNELS")
    assert not takes_kernels(module, hidden, rows)
    monkeypatch.setenv("ENGRAM_KERNELS", "triton")
    still_open = Engram(replace(module.config, gate="open"), dim=12, streams=2, rows_per_token=3)
    assert not takes_kernels(still_open, hidden, rows)
