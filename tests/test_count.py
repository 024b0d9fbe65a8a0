"""Counting parameters, operations and bytes; the paper's totals."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from engram_lm.hashing import HashPlan
from engram_lm.model import PRESETS, LanguageModel, count, get_preset
from engram_lm.model.count import PARTS


@pytest.mark.parametrize(
    ("name", "total", "tables"),
    [
        ("dense-4b", 4.1e9, 0),
        ("moe-27b", 26.7e9, 0),
        ("engram-27b", 26.7e9, 5.79e9),
        ("engram-40b", 39.5e9, 18.53e9),
    ],
)
def test_the_papers_models_have_the_papers_sizes(name, total, tables):
    counted = count(get_preset(name))
    assert counted.total == pytest.approx(total, rel=0.01)
    assert counted.active == pytest.approx(3.8e9, rel=0.02)
    assert counted.tables == pytest.approx(tables, rel=0.001)


def test_small_has_a_backbone_of_about_120_million():
    counted = count(get_preset("small"))
    assert counted.total - counted.tables - counted.memory == pytest.approx(120e6, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_parts_add_up(name):
    counted = count(get_preset(name))
    assert sum(getattr(counted, part) for part in PARTS) + counted.tables == counted.total
    assert counted.active < counted.total


def test_tiny_by_hand():
    config = get_preset("tiny")
    counted = count(config, context=100, bytes_per_value=2)
    assert counted.embedding == counted.head == 4096 * 128
    assert counted.attention == 4 * 4 * 128 * 128
    assert counted.ffn == 4 * 3 * 128 * 384
    assert counted.experts == counted.connections == 0
    assert counted.norms == (4 * 2 + 1) * 128 + 4 * 2 * 32
    assert counted.memory == 8 * 32 * 2 * 128 + 3 * 128 + 4 * 128
    rows = HashPlan.build(config.memory.hash, vocab_size=4096, pad=0).num_rows
    assert counted.tables == rows * 32
    assert counted.table_bytes == rows * 64
    assert counted.table_bytes_per_token == 8 * 64
    assert counted.active == counted.total - counted.tables - counted.embedding
    matrices = counted.active - counted.norms
    assert counted.inference_flops == 2 * matrices + 2 * 100 * 4 * 4 * (32 + 32)
    assert counted.training_flops == 3 * (2 * matrices + 2 * 50 * 4 * 4 * (32 + 32))


def test_the_model_itself_has_as_many_parameters():
    for name in ("tiny", "small"):
        config = get_preset(name)
        counted = count(config)
        assert counted.total - counted.tables == sum(p.numel() for p in LanguageModel(config).parameters())


def test_only_chosen_experts_are_active():
    config = get_preset("moe-27b")
    more = replace(config, moe=replace(config.moe, active=7))
    one_expert = 29 * 3 * 2560 * 1536
    assert count(more).active - count(config).active == one_expert


def test_a_tied_head_is_stored_once_and_still_works():
    config = get_preset("tiny")
    tied, untied = count(replace(config, tie_embeddings=True)), count(config)
    assert untied.total - tied.total == 4096 * 128
    assert untied.active == tied.active


def test_capacity_one_has_the_branch_but_no_table():
    config = get_preset("tiny")
    control = replace(config, memory=replace(config.memory, hash=replace(config.memory.hash, scheme="capacity_1")))
    assert count(control).tables == 8 * 32
    assert count(control).active == count(config).active


def test_the_table_prints():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(count(get_preset("engram-27b")))
    text = console.export_text()
    assert "5.792 G" in text
    assert "10,240 B" in text
