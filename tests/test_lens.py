"""Hidden states are the model's own, and the lens reads them as its definition says, one position at a time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from engram_lm.analysis import lens
from engram_lm.analysis.hidden import hidden_states
from engram_lm.analysis.lens import document_sums, logit_lens, predictions
from engram_lm.errors import ConfigError, DataError
from engram_lm.statistics import ratio_interval
from engram_lm.train.loader import Batch, windows


def batches():
    return list(windows(tiny.split(), 3, 11))


def stopped_after(model, blocks, tokens, rows, segments):
    """Hidden states after the final norm of a model that has only its first blocks."""
    every, model.blocks = model.blocks, model.blocks[:blocks]
    try:
        return model(tokens, rows, segments=segments)[0]
    finally:
        model.blocks = every


@torch.no_grad()
def slow_lens(model, lookup, given):
    """{document: [layers + 1] lists of (KL(p || q), KL(q || p), entropy, agreement)}, a position at a time in float64."""
    found = {}
    for batch in given:
        rows = lookup.rows(batch.tokens, segments=batch.segments)[0] if lookup else None
        layers = [
            model.logits(stopped_after(model, blocks, batch.tokens, rows, batch.segments)).double()
            for blocks in range(len(model.blocks) + 1)
        ]
        for b, t in (batch.targets != -100).nonzero().tolist():
            p = layers[-1][b, t].softmax(0)
            for layer, logits in enumerate(layers):
                q = logits[b, t].softmax(0)
                values = (
                    (p * (p / q).log()).sum(),
                    (q * (q / p).log()).sum(),
                    -(q * q.log()).sum(),
                    q.argmax() == p.argmax(),
                )
                of_document = found.setdefault(int(batch.segments[b, t]), [[] for _ in layers])
                of_document[layer].append([float(value) for value in values])
    return found


@pytest.mark.parametrize("name", tiny.MODELS)
def test_hidden_states_are_what_the_model_computes(name):
    model, lookup = tiny.live(tiny.MODELS[name])
    batch = batches()[0]
    rows = lookup.rows(batch.tokens, segments=batch.segments)[0] if lookup else None
    states = hidden_states(model, lookup, batch.tokens, batch.segments)
    with torch.no_grad():
        assert torch.equal(model.norm(states[-1]), model(batch.tokens, rows, segments=batch.segments)[0])
        for layer, state in enumerate(states):
            expected = stopped_after(model, layer, batch.tokens, rows, batch.segments)
            torch.testing.assert_close(model.norm(state), expected)
        embedded = F.rms_norm(model.embedding(batch.tokens), (model.config.dim,), eps=model.config.norm_eps)
    torch.testing.assert_close(states[0], embedded)
    assert len(states) == 1 + len(model.blocks)


def test_hooks_and_mode_are_put_back_whatever_happens():
    model, lookup = tiny.live(tiny.ENGRAM)
    model.train()
    tokens = tiny.text(5)
    hidden_states(model, lookup, tokens)
    handle = model.blocks[1].register_forward_hook(lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        hidden_states(model, lookup, tokens)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_experts_do_not_count_what_a_probe_reads():
    model, lookup = tiny.live(tiny.EVERYTHING)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hidden_states(model.train(), lookup, tiny.text(20))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize(("direction", "column"), [("final_to_layer", 0), ("layer_to_final", 1)])
def test_the_lens_is_its_definition(name, direction, column):
    model, lookup = tiny.live(tiny.MODELS[name])
    slow = slow_lens(model, lookup, batches())
    found = logit_lens(model, lookup, batches(), direction=direction)
    each = np.concatenate([np.array(layers) for _, layers in sorted(slow.items())], axis=1)  # [layers + 1, tokens, 4]
    assert found["tokens"] == each.shape[1] == sum(int((batch.targets != -100).sum()) for batch in batches())
    assert found["documents"] == len(slow) == 12
    assert found["layers"] == [0, 1, 2]
    for key, number in {"kl": column, "entropy": 2, "agreement": 3}.items():
        np.testing.assert_allclose(found[key], each[:, :, number].mean(1), rtol=1e-4, atol=1e-6)
    assert (found["kl"][-1], found["agreement"][-1]) == (0, 1)
    assert found["kl"][0] > 0.01
    assert 0 < found["agreement"][0] < 1
    counts = np.array([len(layers[0]) for _, layers in sorted(slow.items())])
    sums = [sum(value[column] for value in layers[0]) for _, layers in sorted(slow.items())]
    np.testing.assert_allclose(found["kl_interval"][0], ratio_interval(np.array(sums), counts), rtol=1e-4)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_positions_in_small_parts_are_the_same(monkeypatch):
    model, lookup = tiny.live(tiny.ENGRAM)
    whole = logit_lens(model, lookup, batches())
    monkeypatch.setattr(lens, "CHUNK", 5 * tiny.VOCABULARY)
    parts = logit_lens(model, lookup, batches())
    for key in lens.MEASURED:
        np.testing.assert_allclose(parts[key], whole[key], rtol=1e-5, atol=1e-7)


def test_the_first_tokens_only():
    model, lookup = tiny.live(tiny.ENGRAM)
    one = int((batches()[0].targets >= 0).sum())
    assert logit_lens(model, lookup, batches(), max_tokens=one) == logit_lens(model, lookup, batches()[:1])
    assert logit_lens(model, lookup, batches(), max_tokens=one + 1)["tokens"] == one + 1


def test_windows_without_segments_are_documents():
    model, lookup = tiny.live(tiny.ENGRAM)
    given = [Batch(tiny.text(6, 2, seed), tiny.text(6, 2, seed + 9), None) for seed in (0, 1)]
    sums, tokens = document_sums(model, lookup, given)
    assert tokens.tolist() == [6] * 4
    alone, _ = document_sums(model, lookup, [Batch(given[1].tokens[1:], given[1].targets[1:], None)])
    np.testing.assert_allclose(sums[:, :, 3:], alone, rtol=1e-5, atol=1e-6)
    assert (
        logit_lens(model, lookup, [Batch(given[0].tokens[:1], given[0].targets[:1], None)])["kl_interval"] == [None] * 3
    )


def test_autocast_does_not_round_the_lens():
    model, lookup = tiny.live(tiny.ENGRAM)
    states = [h.flatten(0, 1) for h in hidden_states(model, lookup, tiny.text(30))]
    outside = predictions(model, states, "final_to_layer")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predictions(model, states, "final_to_layer"), outside)


def test_a_model_held_in_bfloat16():
    model, lookup = tiny.live(tiny.ENGRAM)
    wide = logit_lens(model, lookup, batches())
    narrow = logit_lens(model.to(torch.bfloat16), lookup, batches())
    np.testing.assert_allclose(narrow["kl"], wide["kl"], rtol=0.05, atol=0.01)


def test_what_cannot_be_read_is_refused():
    model, lookup = tiny.live(tiny.ENGRAM)
    silent = replace(batches()[0], targets=torch.full_like(batches()[0].targets, -100))
    with pytest.raises(DataError, match="no token to predict"):
        logit_lens(model, lookup, [silent])
    with pytest.raises(DataError, match="no token to predict"):
        logit_lens(model, lookup, [])
    with pytest.raises(ConfigError, match="backwards"):
        logit_lens(model, lookup, batches(), direction="backwards")
    with pytest.raises(ConfigError, match="max_tokens = 0"):
        logit_lens(model, lookup, batches(), max_tokens=0)


def test_a_layer_that_adds_nothing_repeats_the_prediction():
    model, lookup = tiny.live(tiny.ENGRAM)
    with torch.no_grad():
        for linear in (part for part in model.blocks[1].modules() if isinstance(part, nn.Linear)):
            linear.weight.zero_()
    found = logit_lens(model, lookup, batches())
    assert found["kl"][1:] == [0, 0]
    assert found["entropy"][1] == found["entropy"][2]
