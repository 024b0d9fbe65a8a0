"""Engram against its naive reference, in pieces, and against transformers' own module."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.memory import ConvState, Engram, EngramConfig, reference_engram

LAYOUTS = {
    "paper": EngramConfig.paper(),
    "paper, plain gate": replace(EngramConfig.paper(), gate="plain"),
    "paper, no gate": replace(EngramConfig.paper(), gate="open"),
    "deepseek_v41": EngramConfig.deepseek_v41(),
    "qwen_ple": EngramConfig.qwen_ple(),
}
DIM, ROWS = 8, 3


def example(layout, *, streams=1, length=7, batch=2, dtype=torch.float64, seed=0):
    """A module with random parameters, hidden states and rows."""
    torch.manual_seed(seed)
    config = replace(LAYOUTS[layout], row_dim=4)
    module = Engram(config, dim=DIM, streams=streams, rows_per_token=ROWS).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(batch, length, streams, DIM, dtype=dtype, requires_grad=True)
    rows = torch.randn(batch, length, ROWS, 4, dtype=dtype, requires_grad=True)
    return module, hidden, rows


@pytest.mark.parametrize("length", [1, 2, 7, 63])
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradient_equal_the_reference(layout, streams, length):
    module, hidden, rows = example(layout, streams=streams, length=length, batch=1 if length == 63 else 2)
    expected = reference_engram(module, hidden, rows)
    found, _ = module(hidden, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs, weight = [hidden, rows, *module.parameters()], torch.randn_like(expected)
    gradients = [  # without a gate, nothing depends on hidden
        torch.autograd.grad(y, inputs, weight, allow_unused=True, materialize_grads=True) for y in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_silenced_positions(layout):
    module, hidden, rows = example(layout, streams=2, length=12)
    segments = torch.tensor([[0] * 5 + [1] * 7, [3] * 12])
    keep = torch.rand(2, 12) > 0.3
    found, _ = module(hidden, rows, segments=segments, keep=keep)
    torch.testing.assert_close(
        found, reference_engram(module, hidden, rows, segments=segments, keep=keep), rtol=0, atol=1e-10
    )
    alone, _ = module(hidden[:1, 5:], rows[:1, 5:], keep=keep[:1, 5:])
    torch.testing.assert_close(found[:1, 5:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(cuts=st.sets(st.integers(1, 29)), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_chunks_equal_one_pass(layout, cuts, seed):
    module, hidden, rows = example(layout, streams=2, length=30, dtype=torch.float32, seed=seed)
    segments = torch.randint(0, 4, (2, 30)).sort(dim=1).values
    whole, _ = module(hidden, rows, segments=segments)
    state, pieces = None, []
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 30], strict=True):
        piece = slice(first, last)
        delta, state = module(hidden[:, piece], rows[:, piece], state, segments=segments[:, piece], with_state=True)
        pieces.append(delta)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_future_changes_nothing(layout):
    module, hidden, rows = example(layout, length=20)
    before, _ = module(hidden, rows)
    hidden, rows = hidden.detach().clone(), rows.detach().clone()
    hidden[:, 11:] += 1
    rows[:, 11:] -= 1
    after, _ = module(hidden, rows)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


def test_state_is_a_value_that_beams_can_index():
    module, hidden, rows = example("paper", length=15)
    _, state = module(hidden[:, :10], rows[:, :10], with_state=True)
    straight, _ = module(hidden[:, 10:], rows[:, 10:], state)
    swapped, _ = module(hidden[:, 10:].flip(0), rows[:, 10:].flip(0), ConvState(*(part[[1, 0]] for part in state)))
    torch.testing.assert_close(swapped, straight.flip(0))


def test_a_shortened_state_rolls_back():
    module, hidden, rows = example("paper", length=15)
    _, state = module(hidden[:, :12], rows[:, :12], with_state=True)
    rolled = ConvState(*(part[:, :7] for part in state))
    whole, _ = module(hidden, rows)
    again, _ = module(hidden[:, 7:], rows[:, 7:], rolled)
    torch.testing.assert_close(again, whole[:, 7:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_zero_change_nothing_but_can_learn(layout):
    config = replace(LAYOUTS[layout], row_dim=4)
    module = Engram(config, dim=DIM, streams=2, rows_per_token=ROWS)
    rows = torch.zeros(1, 5, ROWS, 4, requires_grad=True)
    delta, _ = module(torch.randn(1, 5, 2, DIM), rows)
    assert torch.count_nonzero(delta) == 0
    delta.sum().backward()
    assert rows.grad.abs().sum() > 0
    assert rows.grad.isfinite().all()


def test_gates_are_those_of_the_forward():
    module, hidden, rows = example("deepseek_v41", streams=3)
    gates = module.gates(hidden, rows)
    assert gates.shape == (2, 7, 3)
    delta, _ = module(hidden, rows)
    value = module._inputs(hidden, rows)[1][:, :, -1]
    torch.testing.assert_close(delta, gates[..., None] * value[:, :, None])


def test_a_score_of_zero():
    """The demo's sign(0) closes to one half exactly; V4.1's copysign keeps the sign bit of zero."""
    hidden, rows = torch.zeros(1, 1, 1, DIM), torch.ones(1, 1, ROWS, 4)
    demo = Engram(replace(LAYOUTS["paper"], row_dim=4), dim=DIM, rows_per_token=ROWS)
    v41 = Engram(replace(LAYOUTS["deepseek_v41"], row_dim=4), dim=DIM, rows_per_token=ROWS)
    assert demo.gates(hidden, rows).item() == 0.5
    assert v41.gates(hidden, rows).item() == pytest.approx(0.5 + 0.25e-3, abs=1e-6)


def test_half_precision_streams_keep_their_type():
    module, hidden, rows = example("paper", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        delta, _ = module(hidden.bfloat16(), rows)
    assert delta.dtype == torch.bfloat16
    torch.testing.assert_close(delta.float(), module(hidden, rows)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("change", [{"row_dim": 0}, {"conv_kernel": -1}, {"conv_dilation": 0}])
def test_impossible_configurations(change):
    with pytest.raises(ConfigError, match="engram:"):
        replace(EngramConfig(), **change)


def test_parity_with_transformers_qwen4_exp():
    """Same ids from the n-gram module and, with its weights, the same output as Qwen's PLE layer."""
    pytest.importorskip("transformers", reason="the [hf] extra carries Qwen's own modules")
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    configuration = pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp")
    from engram_lm.hashing import HashConfig, HashPlan, hash_ngrams

    torch.manual_seed(0)
    eos, vocab_size, streams = 9, 300, 4
    theirs_config = configuration.Qwen4ExpTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        hc_count=streams,
        num_hidden_layers=4,
        ple_layer_ids=[1, 3],
        layer_types=["linear_attention"] * 4,
        ple_embed_dim=32,
        ngram_vocab_size_base=500,
        eos_token_id=eos,
    )
    tokens = torch.randint(0, vocab_size, (2, 40))
    tokens[:, [3, 4, 20]] = eos
    hashing = replace(HashConfig.qwen_ple(eos, layers=(0, 2)), rows_per_head=500)
    plan = HashPlan.build(hashing, vocab_size=vocab_size, pad=eos)
    ids, _ = hash_ngrams(plan, tokens)
    for ordinal, layer in enumerate((0, 2)):
        theirs = modeling.Qwen4ExpTextPLELayer(theirs_config, layer, ordinal)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        asked = []
        hook = theirs.ple_embedding.ngram_embedding.register_forward_pre_hook(lambda _, x, to=asked: to.append(x[0]))
        hidden = torch.randn(2, 40, streams, 16)
        expected = theirs(hidden.flatten(-2), tokens, None)
        hook.remove()
        own = ids[:, :, ordinal] - int(plan.layer_starts[ordinal])
        assert torch.equal(asked[0], own)

        ours = Engram(replace(EngramConfig.qwen_ple(), row_dim=2), dim=16, streams=streams, rows_per_token=16)
        with torch.no_grad():
            ours.project.weight.copy_(torch.cat([theirs.key_proj.weight, theirs.value_proj.weight]))
            for ours_gain, norm in (
                (ours.query_gain, theirs.norm_query),
                (ours.key_gain, theirs.norm_key),
                (ours.conv_gain, theirs.norm_conv),
            ):
                ours_gain.copy_(norm.weight.view(streams, 16))
            ours.conv_weight.copy_(theirs.conv1d.weight[:, 0].T.view(4, streams, 16))
        found, _ = ours(hidden, theirs.ple_embedding.ngram_embedding.weight[own])
        torch.testing.assert_close(found.flatten(-2), expected, rtol=1e-5, atol=1e-5)
