"""Arms differ from the model with a memory in one thing, and are equal in what they are said to be equal in."""

from dataclasses import replace

import pytest
import torch
from tiny import BASE, ENGRAM, EVERYTHING, config, lookup_of, split

from engram_lm.errors import ConfigError
from engram_lm.evaluate.controls import ARMS, DESCRIPTIONS, RANDOM_STD, config_of_arm, model_of_arm
from engram_lm.model.count import count
from engram_lm.model.lm import LanguageModel
from engram_lm.model.presets import PRESETS, get_preset
from engram_lm.train.loader import Loader, LoaderState

TINY = get_preset("tiny")


def test_every_arm_is_described():
    assert set(DESCRIPTIONS) == set(ARMS)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("model", [ENGRAM, EVERYTHING], ids=["engram", "everything"])
def test_every_arm_trains(tmp_path, arm, model):
    if arm == "moe" and model is EVERYTHING:
        model = replace(model, moe=replace(model.moe, dense_layers=0))
    asked = config_of_arm(config(model), arm)
    batch, _ = Loader(split(), 4, 10).next(LoaderState())
    lookup = lookup_of(asked.model)
    rows = lookup.rows(batch.tokens, segments=batch.segments)[0] if lookup else None
    loss = LanguageModel.build(asked.model).loss(batch.tokens, batch.targets, rows, segments=batch.segments)
    loss.backward()
    assert torch.isfinite(loss)


def size(model, context=256):
    return count(model, context=context)


def within(share: float, one: float, other: float) -> bool:
    return abs(one / other - 1) <= share


@pytest.mark.parametrize("preset", ["tiny", "small", "engram-27b"])
def test_arms_are_equal_in_what_they_match(preset):
    model = PRESETS[preset]
    engram = size(model)
    assert within(0.002, size(model_of_arm(model, "ffn")).active, engram.active)
    assert within(0.002, size(model_of_arm(model, "iso_flop")).training_flops, engram.training_flops)
    moe = size(model_of_arm(model, "moe"))
    assert within(0.02, moe.total, engram.total)
    assert within(0.03, moe.training_flops, engram.training_flops)
    for arm in ("capacity_1", "shuffled", "frozen_random"):
        same = size(model_of_arm(model, arm))
        assert (same.active, same.training_flops) == (engram.active, engram.training_flops)
    bigram = size(model_of_arm(model, "bigram"))
    assert within(0.002, bigram.tables, engram.tables)
    assert bigram.tables <= engram.tables


def test_the_paper_s_own_exchange_of_experts():
    """Engram-27B has 55 experts where its baseline MoE-27B has 72 (table 5)."""
    assert model_of_arm(PRESETS["engram-27b"], "moe") == PRESETS["moe-27b"]


def test_the_backbone_starts_equal_in_arms_of_its_shape():
    states = {
        arm: LanguageModel.build(model_of_arm(TINY, arm), seed=3).state_dict() for arm in ("base", "engram", "bigram")
    }
    for name, weight in states["base"].items():
        assert all(torch.equal(weight, state[name]) for state in states.values())


def test_random_rows_never_train():
    asked = config_of_arm(config(), "frozen_random")
    assert (asked.optim.peak_table_lr, asked.table.std) == (0.0, RANDOM_STD)


def test_a_shuffled_text_reads_the_rows_of_the_one_before_it():
    model = model_of_arm(ENGRAM, "shuffled")
    lookup = replace(lookup_of(model), shuffled=True)
    plain = lookup_of(ENGRAM)
    tokens = torch.randint(1, 48, (3, 9))
    assert torch.equal(lookup.ids(tokens)[0], plain.ids(tokens)[0].roll(1, 0))
    alone = lookup.ids(tokens[:1])[0]
    assert torch.equal(alone, lookup.ids(tokens[1:2])[0]), "a lone text reads nothing of its own"


def test_without_a_memory_there_is_nothing_to_compare():
    with pytest.raises(ConfigError, match="starts from a model with a memory"):
        model_of_arm(BASE, "base")


def test_too_few_parameters_for_experts():
    few = replace(PRESETS["moe-27b"].moe, experts=64, active=60, shared=0, width=32)
    model = replace(TINY, moe=few, memory=replace(TINY.memory, hash=replace(TINY.memory.hash, rows_per_head=7)))
    grown = model_of_arm(model, "moe")
    assert grown.moe.experts > 64, "the branch alone is worth some"
