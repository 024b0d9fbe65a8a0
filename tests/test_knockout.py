"""A part that is knocked out does nothing, the others do what they did, and the model is as it was."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from engram_lm.analysis.knockout import ALL_ON, document_losses, knock_out, knock_outs, zeroed
from engram_lm.analysis.probes import evaluate_once
from engram_lm.errors import DataError, MismatchError
from engram_lm.memory import Engram
from engram_lm.model import LanguageModel
from engram_lm.statistics import ratio_interval
from engram_lm.train.loader import Batch, windows
from engram_lm.train.precision import autocast

TWO = replace(tiny.ENGRAM, memory=replace(tiny.ENGRAM.memory, hash=replace(tiny.HASH, layers=(1, 0))))


def batches(limit=None):
    return list(windows(tiny.split(), 3, 11, limit))


def slow_loss(model, lookup, change_rows=None, change_delta=None):
    """Mean loss, one window at a time, with functions put in by hand."""
    nats, count = 0.0, 0
    layers = model.config.memory.hash.layers
    hooks = []
    for number, layer in enumerate(layers if change_delta else ()):

        def hook(module, inputs, output, number=number):
            return change_delta(number, module, *inputs[:2], output[0]), output[1]

        hooks.append(model.blocks[layer].memory.register_forward_hook(hook))
    with torch.no_grad():
        for batch in batches():
            for i in range(len(batch.tokens)):
                tokens, targets, segments = (part[i : i + 1] for part in (batch.tokens, batch.targets, batch.segments))
                rows = lookup.rows(tokens, segments=segments)[0]
                if change_rows:
                    change_rows(rows.unflatten(3, (2, 2)))  # [1, T, L, orders, heads, d], in place
                hidden, _ = model(tokens, rows, segments=segments)
                known = targets[0] >= 0
                nats += F.cross_entropy(model.logits(hidden[0, known]), targets[0, known], reduction="sum").item()
                count += int(known.sum())
    for hook in hooks:
        hook.remove()
    return nats / count


def test_each_part_is_gone_and_no_other():
    model, lookup = tiny.live(TWO)
    found = {name: variant["loss"] for name, variant in knock_out(model, lookup, batches())["variants"].items()}

    def silence(*silent):
        return lambda number, module, hidden, rows, delta: delta * (number not in silent)

    def gated_only(number, module: Engram, hidden, rows, delta):
        value = F.linear(rows.flatten(-2), module.project.weight)[..., -module.dim :]
        return module.gates(hidden, rows)[..., None] * value[:, :, None]

    def forget(order, layer=slice(None)):
        return lambda rows: rows[:, :, layer, order].zero_()

    assert found == {
        name: pytest.approx(expected, rel=1e-5)
        for name, expected in {
            "all on": slow_loss(model, lookup),
            "no memory": slow_loss(model, lookup, None, silence(0, 1)),
            "no memory in block 1": slow_loss(model, lookup, None, silence(0)),
            "no memory in block 0": slow_loss(model, lookup, None, silence(1)),
            "no 2-grams": slow_loss(model, lookup, forget(0)),
            "no 2-grams in block 1": slow_loss(model, lookup, forget(0, 0)),
            "no 2-grams in block 0": slow_loss(model, lookup, forget(0, 1)),
            "no 3-grams": slow_loss(model, lookup, forget(1)),
            "no 3-grams in block 1": slow_loss(model, lookup, forget(1, 0)),
            "no 3-grams in block 0": slow_loss(model, lookup, forget(1, 1)),
            "no convolution": slow_loss(model, lookup, None, gated_only),
        }.items()
    }
    assert len({round(loss, 5) for loss in found.values()}) == len(found)  # each of them does something


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # autocast keeps copies of parameters
@torch.no_grad()
def test_without_its_memory_a_model_is_the_one_that_never_had_it(precision):
    model, lookup = tiny.live(tiny.ENGRAM)
    base = LanguageModel(tiny.BASE).eval()
    base.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".memory." not in name})
    with autocast(precision, torch.device("cpu")):
        found = knock_out(model, lookup, batches())["variants"]
        of_base = sum(base.loss(b.tokens, b.targets, segments=b.segments, reduction="none").sum() for b in batches())
        of_model = sum(evaluate_once(model, lookup, [b], torch.device("cpu")) for b in batches())
    tokens = sum(int((b.targets >= 0).sum()) for b in batches())
    assert found["no memory"]["loss"] == pytest.approx(float(of_base) / tokens, rel=1e-5)
    assert found["all on"]["loss"] == pytest.approx(of_model / tokens, rel=1e-5)
    assert abs(found["no memory"]["difference"]) > 0.01


def test_differences_and_their_intervals_are_over_documents():
    model, lookup = tiny.live(tiny.ENGRAM)
    found = knock_out(model, lookup, batches())
    parts = knock_outs(model)
    nats, tokens = document_losses(model, lookup, batches(), parts)
    split = tiny.split()
    assert np.array_equal(tokens, np.diff(split.starts, append=len(split.tokens)) - 1)
    assert (found["documents"], found["tokens"]) == (len(tokens), tokens.sum())
    variants = found["variants"]
    assert variants[ALL_ON]["difference"] == 0
    assert variants[ALL_ON]["interval"] is None
    for name, sums in zip(parts, nats, strict=True):
        above = variants[name]["loss"] - variants[ALL_ON]["loss"]
        assert variants[name]["difference"] == pytest.approx(above, abs=1e-9)
        if name != ALL_ON:
            assert variants[name]["interval"] == list(ratio_interval(sums - nats[0], tokens))
    assert found == knock_out(model, lookup, batches())


def test_windows_without_segments_are_documents():
    model, lookup = tiny.live(tiny.ENGRAM)
    halves = [Batch(tiny.text(9, 2, seed), tiny.text(9, 2, seed + 9), None) for seed in range(2)]
    assert knock_out(model, lookup, halves)["documents"] == 4


def test_only_parts_that_differ_are_taken_away():
    model, _ = tiny.live(tiny.ENGRAM)
    assert list(knock_outs(model)) == ["all on", "no memory", "no 2-grams", "no 3-grams", "no convolution"]
    memory = replace(
        tiny.ENGRAM.memory,
        hash=replace(tiny.HASH, orders=(2,)),
        engram=replace(tiny.ENGRAM.memory.engram, conv_kernel=0),
    )
    model, _ = tiny.live(replace(tiny.ENGRAM, memory=memory))
    assert list(knock_outs(model)) == ["all on", "no memory"]


@pytest.mark.parametrize("config", [tiny.ENGRAM, tiny.EVERYTHING], ids=["engram", "everything"])
def test_the_model_is_as_it_was_whatever_happens(config, monkeypatch):
    model, lookup = tiny.live(config)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = [parameter.data_ptr() for parameter in model.parameters()]
    knock_out(model, lookup, batches(4))

    calls = []
    loss = LanguageModel.loss

    def fails(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # while the memory is silenced
            raise KeyboardInterrupt
        return loss(self, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "loss", fails)
    with pytest.raises(KeyboardInterrupt):
        knock_out(model, lookup, batches(4))
    assert model.training
    assert held == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_are_zero_only_within():
    weight = nn.Parameter(torch.ones(2))
    with zeroed([weight]):
        assert weight.tolist() == [0, 0]
    assert weight.tolist() == [1, 1]


def test_what_has_nothing_to_knock_out_is_refused():
    model, lookup = tiny.live(tiny.ENGRAM)
    with pytest.raises(MismatchError, match="no memory"):
        knock_out(tiny.live(tiny.BASE)[0], lookup, batches())
    with pytest.raises(DataError, match="no token"):
        knock_out(model, lookup, [])
