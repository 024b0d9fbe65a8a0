"""Figures of gates against a plain loop over windows, tokens and n-grams."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from engram_lm.analysis.capture import capture_gates, watching
from engram_lm.analysis.gate_statistics import extremes, gate_statistics, stream
from engram_lm.analysis.ngrams import Ngrams, views
from engram_lm.errors import DataError, MismatchError
from engram_lm.train.loader import windows

PIECES = [bytes([65 + token]) for token in range(tiny.VOCABULARY)]


def batches():
    return list(windows(tiny.split(), 3, 11))


@torch.no_grad()
def slow(model, lookup):
    """Of each position that predicts something: gates [tokens, L, M], delta and hidden [tokens, L, M, D], tokens, views."""
    gates, deltas, hiddens, tokens, seen = [], [], [], [], []
    layers = model.config.memory.hash.layers
    for batch in batches():
        for i in range(len(batch.tokens)):
            text, segments = batch.tokens[i : i + 1], batch.segments[i : i + 1]
            found = {}

            def hook(module, inputs, output, found=found):
                found[module] = (module.gates(*inputs[:2])[0], output[0][0], inputs[0][0])

            hooks = [model.blocks[layer].memory.register_forward_hook(hook) for layer in layers]
            model(text, lookup.rows(text, segments=segments)[0], segments=segments)
            for handle in hooks:
                handle.remove()
            of_layers = [
                torch.stack(part, 1) for part in zip(*(found[model.blocks[l].memory] for l in layers), strict=True)
            ]
            for t in np.flatnonzero(batch.targets[i] >= 0):
                for part, value in zip((gates, deltas, hiddens), of_layers, strict=True):
                    part.append(value[t].numpy())
                tokens.append((int(text[0, t - 1]) if t else -1, int(text[0, t])))
                seen.append(views(lookup, text, segments)[t])
    return (*(np.stack(part).astype(np.float64) for part in (gates, deltas, hiddens)), tokens, np.stack(seen))


def test_figures_are_those_of_a_loop():
    memory = replace(tiny.EVERYTHING.memory, hash=replace(tiny.HASH, layers=(1, 0)))  # not in the order of the blocks
    model, lookup = tiny.live(replace(tiny.EVERYTHING, memory=memory))
    training = Ngrams.of(np.concatenate([views(lookup, b.tokens, b.segments) for b in batches()[:4]]), tiny.VOCABULARY)
    found = gate_statistics(model, lookup, batches(), PIECES, training)
    gates, deltas, hiddens, tokens, seen = slow(model, lookup)
    assert found["tokens"] == len(gates)
    assert [layer["layer"] for layer in found["layers"]] == [1, 0]
    for number, layer in enumerate(found["layers"]):
        for m, figures in enumerate(layer["streams"]):
            values = gates[:, number, m]
            assert figures["mean"] == pytest.approx(values.mean(), rel=1e-5)
            assert figures["quartiles"] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]).tolist(), rel=1e-5)
            assert figures["closed"] == (values < 0.05).mean()
            assert figures["open"] == (values > 0.95).mean()
            bins = np.bincount((values * 20).astype(int), minlength=20) / len(values)
            assert figures["histogram"] == pytest.approx(bins.tolist())
        rms = [np.sqrt(np.square(part[:, number]).mean()) for part in (deltas, hiddens)]
        assert [layer["delta_rms"], layer["hidden_rms"]] == pytest.approx(rms, rel=1e-4)
        assert layer["relative"] == pytest.approx(rms[0] / rms[1], rel=1e-4)

        mean = gates[:, number].mean(1)
        for order in (2, 3):
            times = training.times(seen)[:, order - 1]
            inside = [times == 0, (times >= 1) & (times <= 3), (times >= 4) & (times <= 31), times >= 32]
            by_seen = layer["by_seen"][str(order)]
            assert by_seen["seen"] == ["0", "1-3", "4-31", "32+"]
            assert by_seen["share"] == pytest.approx([part.mean() for part in inside])
            assert by_seen["mean"] == [pytest.approx(mean[p].mean(), rel=1e-5) if p.any() else None for p in inside]

        by_ngram = defaultdict(list)
        for gate, pair, view in zip(mean, tokens, seen, strict=True):
            by_ngram[tuple(view[:2])].append((gate, "".join(chr(65 + token) for token in pair if token >= 0)))
        frequent = [each for each in by_ngram.values() if len(each) >= 4]
        ranked = sorted(frequent, key=lambda each: -np.mean([gate for gate, _ in each]))
        for name, expected in ("highest", ranked[:12]), ("lowest", ranked[::-1][:12]):
            assert layer[name] == [
                {
                    "text": each[0][1],
                    "mean": pytest.approx(np.mean([gate for gate, _ in each]), rel=1e-5),
                    "times": len(each),
                }
                for each in expected
            ]


def test_a_stuck_gate_is_seen():
    assert stream(np.full(10, 0.01)) == {
        "mean": pytest.approx(0.01),
        "quartiles": [pytest.approx(0.01)] * 3,
        "closed": 1.0,
        "open": 0.0,
        "histogram": [1.0] + [0.0] * 19,
    }
    assert stream(np.ones(10))["open"] == stream(np.ones(10))["histogram"][-1] == 1.0


def test_rare_ngrams_are_not_shown_and_fragments_are_joined():
    wide = "中".encode()
    pieces, tokens = [b"a", wide[:1], wide[1:]], np.array([[1, 2]] * 4 + [[0, 0]] * 3)
    highest, lowest = extremes(np.linspace(0, 0.6, 7), np.array([0] * 4 + [1] * 3), tokens, pieces)
    assert highest == lowest == [{"text": "中", "mean": pytest.approx(0.15), "times": 4}]


def test_what_was_not_given_is_left_out():
    model, lookup = tiny.live(tiny.ENGRAM)
    layer = gate_statistics(model, lookup, batches())["layers"][0]
    assert layer.keys() == {"layer", "streams", "delta_rms", "hidden_rms", "relative"}


def test_captured_gates_are_in_the_order_of_the_plan():
    memory = replace(tiny.ENGRAM.memory, hash=replace(tiny.HASH, layers=(1, 0)))
    model, lookup = tiny.live(replace(tiny.ENGRAM, memory=memory))
    tokens, seen = tiny.text(9), []
    with watching(model, lambda number, module, hidden, rows, delta: seen.append((number, module.gates(hidden, rows)))):
        model(tokens, lookup.rows(tokens)[0])
    assert [number for number, _ in seen] == [1, 0]  # as the blocks come
    assert torch.equal(capture_gates(model, lookup, tokens[0]), torch.stack([seen[1][1][0], seen[0][1][0]], 1))


def test_hooks_are_gone_whatever_happens():
    model, lookup = tiny.live(tiny.ENGRAM)
    with pytest.raises(ZeroDivisionError), watching(model, lambda *arguments: 1 / 0):
        model(tiny.text(9), lookup.rows(tiny.text(9))[0])
    assert not model.blocks[1].memory._forward_hooks


def test_models_and_texts_without_gates_are_refused():
    model, lookup = tiny.live(tiny.ENGRAM)
    with pytest.raises(MismatchError, match="no memory"):
        gate_statistics(tiny.live(tiny.BASE)[0], lookup, batches())
    with pytest.raises(DataError, match="no gates"):
        gate_statistics(model, lookup, [])
