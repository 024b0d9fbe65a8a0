"""Addresses: golden vectors of all published layouts, and the properties that make them safe to compute in pieces."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm import hashing
from engram_lm.errors import ConfigError
from engram_lm.hashing import DEAD, HashConfig, HashPlan, is_prime, prime_sizes

GOLDEN = Path(__file__).parent / "golden"
SMALL = HashConfig(orders=(2, 3), heads=2, rows_per_head=50, layers=(1, 4), pad_id=2)


@pytest.fixture(scope="session", params=["hash_ngrams", "reference_hash_ngrams"])
def hash_ngrams(request):
    """The function by its public name, which takes the kernel, and the readable truth."""
    return getattr(hashing, request.param)


def golden(name):
    return json.loads((GOLDEN / name).read_text())


def in_layer(ids, plan):
    """Row numbers inside each layer's own table, as published."""
    return ids - torch.as_tensor(plan.layer_starts)[:, None]


def test_paper_demo(hash_ngrams):
    expected = golden("paper.json")
    plan = HashPlan.build(HashConfig.paper(), vocab_size=expected["compressed_vocab"], pad=2)
    assert {str(l): m for l, m in zip(plan.layers, plan.multipliers.tolist(), strict=True)} == expected["multipliers"]
    assert {str(l): s for l, s in zip(plan.layers, plan.sizes.reshape(2, 2, 8).tolist(), strict=True)} == expected[
        "primes"
    ]
    ids, _ = hash_ngrams(plan, torch.tensor(expected["compressed"]))
    hashes = ids - torch.as_tensor(plan.offsets)
    for index, layer in enumerate(plan.layers):
        assert hashes[:, :, index].tolist() == expected["hashes"][str(layer)]


def test_deepseek_v41():
    expected = golden("v41.json")
    plan = HashPlan.build(HashConfig.deepseek_v41(), vocab_size=expected["canonical_vocab_size"], pad=2)
    assert plan.sizes.sum(1).tolist() == expected["num_rows"]
    for index, layer in enumerate(plan.layers):
        assert plan.multipliers[index].tolist() == expected["multipliers"][str(layer)]
        assert [plan.sizes[index, 0], plan.sizes[index, -1]] == expected["first_last_prime"][str(layer)]


def test_qwen_ple(hash_ngrams):
    expected = golden("ple.json")
    plan = HashPlan.build(
        HashConfig.qwen_ple(expected["eos_token_id"]), vocab_size=248_320, pad=expected["eos_token_id"]
    )
    assert plan.multipliers[0].tolist() == expected["multipliers"]
    assert plan.sizes[0].tolist() == expected["primes"]
    assert plan.offsets[0].tolist() == expected["offsets"]
    ids, _ = hash_ngrams(plan, torch.tensor(expected["ids"]))
    assert ids[:, :, 0].tolist() == expected["rows"]


def test_primes_are_prime_and_never_reused():
    config = HashConfig(orders=(2, 3, 4), heads=8, rows_per_head=(1000, 1000, 3000), layers=(0, 3, 5))
    sizes = prime_sizes(config).ravel().tolist()
    assert len(set(sizes)) == len(sizes) == 72
    assert all(sympy.isprime(size) for size in sizes)


@given(st.integers(0, 10**6) | st.integers(0, 2**63))
def test_is_prime_agrees_with_sympy(n):
    assert is_prime(n) == sympy.isprime(n)


def test_is_prime_withstands_carmichael_numbers_and_strong_pseudoprimes():
    for n in (561, 41041, 825265, 3215031751, 3825123056546413051, 318665857834031151167461 % 2**63):
        assert is_prime(n) == sympy.isprime(n)


def by_hand(plan, tokens, segments, dead):
    """One position, one head at a time, in Python's unbounded integers."""
    ids = np.zeros((len(tokens), len(plan.layers), len(plan.orders) * plan.heads), np.int64)
    for t in range(len(tokens)):
        for layer in range(len(plan.layers)):
            for o, order in enumerate(plan.orders):
                mix, blocked = 0, False
                for lag in range(order):
                    s = t - lag
                    blocked = blocked or s < 0 or segments[s] != segments[t] or bool(dead[s])
                    mix ^= (plan.pad if blocked else tokens[s]) * int(plan.multipliers[layer, lag])
                    blocked = blocked or (lag > 0 and tokens[s] == plan.eos)
                for head in range(plan.heads):
                    k = o * plan.heads + head
                    ids[t, layer, k] = mix % int(plan.sizes[layer, k]) + int(plan.offsets[layer, k])
    return ids


@st.composite
def texts(draw):
    """Tokens, non-decreasing segments, dead positions and places to cut, for one sequence."""
    length = draw(st.integers(1, 24))
    tokens = draw(st.lists(st.integers(0, 9), min_size=length, max_size=length))
    segments = np.cumsum(draw(st.lists(st.booleans(), min_size=length, max_size=length))).tolist()
    dead = draw(st.lists(st.sampled_from([False, False, False, True]), min_size=length, max_size=length))
    cuts = sorted(draw(st.sets(st.integers(1, length))) | {length})
    return tokens, segments, dead, cuts


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, orders=(1, 2, 4)), replace(SMALL, scheme="ple")], ids=str)
@given(text=texts())
@settings(max_examples=60, deadline=None)
def test_whole_and_in_chunks_equals_by_hand(config, text, hash_ngrams):
    tokens, segments, dead, cuts = text
    plan = HashPlan.build(config, vocab_size=10, pad=2)
    expected = by_hand(plan, tokens, segments, dead)
    as_rows = [torch.tensor([values]) for values in (tokens, segments, dead)]
    ids, _ = hash_ngrams(plan, as_rows[0], segments=as_rows[1], dead=as_rows[2])
    assert ids[0].numpy().tolist() == expected.tolist()

    history, pieces = None, []
    for first, last in zip([0, *cuts], cuts, strict=False):
        piece = [values[:, first:last] for values in as_rows]
        ids, history = hash_ngrams(plan, piece[0], segments=piece[1], dead=piece[2], history=history)
        pieces.append(ids[0])
    assert torch.cat(pieces).tolist() == expected.tolist()


def test_history_is_a_value(hash_ngrams):
    """Roll back after a rejected draft, and reorder beams."""
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    prompt, draft, accepted = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[1], [1]]), torch.tensor([[9], [0]])
    _, before = hash_ngrams(plan, prompt)
    kept = before.clone()
    hash_ngrams(plan, draft, history=before)
    assert torch.equal(before, kept)
    after, _ = hash_ngrams(plan, accepted, history=before)
    whole, _ = hash_ngrams(plan, torch.cat([prompt, accepted], 1))
    assert torch.equal(after, whole[:, 3:])
    swapped, _ = hash_ngrams(plan, accepted.flip(0), history=before[[1, 0]])
    assert torch.equal(swapped, after.flip(0))


def test_without_segments_a_chunk_continues_the_last_document(hash_ngrams):
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    tokens = torch.tensor([[3, 4, 5, 6]])
    _, history = hash_ngrams(plan, tokens[:, :2], segments=torch.tensor([[0, 7]]))
    continued, _ = hash_ngrams(plan, tokens[:, 2:], history=history)
    whole, _ = hash_ngrams(plan, tokens, segments=torch.tensor([[0, 7, 7, 7]]))
    assert torch.equal(continued, whole[:, 2:])


def test_dead_positions_leave_no_trace(hash_ngrams):
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    dead = torch.tensor([[False, True, False, False]])
    one, history = hash_ngrams(plan, torch.tensor([[3, 4, 5, 6]]), dead=dead)
    other, _ = hash_ngrams(plan, torch.tensor([[8, 0, 5, 6]]), dead=dead)
    assert torch.equal(one[:, 1:], other[:, 1:])
    assert history.shape == (1, 2, 2)
    assert hash_ngrams(plan, torch.tensor([[3, 4]]), dead=torch.tensor([[False, True]]))[1][0, -1, 0] == DEAD


def test_empty_input(hash_ngrams):
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    ids, history = hash_ngrams(plan, torch.zeros(3, 0, dtype=torch.int64))
    assert ids.shape == (3, 0, 2, 4)
    assert history.shape == (3, 2, 2)


def test_every_id_lies_in_its_head(hash_ngrams):
    plan = HashPlan.build(SMALL, vocab_size=1000, pad=2)
    ids, _ = hash_ngrams(plan, torch.randint(0, 1000, (4, 200)))
    offsets, sizes = torch.as_tensor(plan.offsets), torch.as_tensor(plan.sizes)
    assert ((ids >= offsets) & (ids < offsets + sizes)).all()
    assert plan.num_rows == int((plan.offsets + plan.sizes).max())


def test_capacity_1_reads_one_row_a_head(hash_ngrams):
    plan = HashPlan.build(replace(SMALL, scheme="capacity_1"), vocab_size=10, pad=2)
    ids, _ = hash_ngrams(plan, torch.randint(0, 10, (2, 30)))
    assert plan.num_rows == 8
    assert torch.equal(ids, torch.arange(8).view(2, 4).expand(2, 30, 2, 4))


@given(rows=st.integers(600, 100_000), layers=st.sampled_from([(0,), (1, 3)]))
def test_sized_fills_a_budget(rows, layers):
    config = replace(SMALL, layers=layers).sized(rows=rows)
    assert prime_sizes(config).sum() <= rows
    assert prime_sizes(replace(config, rows_per_head=config.rows_per_head + 1)).sum() > rows


def test_sizes_of_each_order():
    plan = HashPlan.build(replace(SMALL, rows_per_head=(50, 500)), vocab_size=10, pad=2)
    assert plan.sizes[:, :2].max() < 100 <= 500 < plan.sizes[:, 2:].min()


@pytest.mark.parametrize("kernels", ["", "triton"])
def test_shapes_of_another_batch_are_refused(hash_ngrams, kernels, monkeypatch):
    """A kernel would read past their ends."""
    monkeypatch.setenv("ENGRAM_KERNELS", kernels)
    plan, tokens = HashPlan.build(SMALL, vocab_size=10, pad=2), torch.zeros(2, 5, dtype=torch.int64)
    for name, value in {
        "history": torch.zeros(2, 3, 2, dtype=torch.int64),
        "segments": torch.zeros(1, 5, dtype=torch.int64),
        "dead": torch.zeros(5, dtype=torch.bool),
    }.items():
        with pytest.raises(ValueError, match=name):
            hash_ngrams(plan, tokens, **{name: value})


def test_digest_names_everything_that_moves_a_row():
    same = HashPlan.build(SMALL, vocab_size=10, pad=2)
    hashing.hash_ngrams(
        same, torch.zeros(1, 1, dtype=torch.int64)
    )  # what the plan keeps for the kernel is not part of it
    assert same == HashPlan.build(SMALL, vocab_size=10, pad=2)
    others = [
        HashPlan.build(replace(SMALL, seed=1), vocab_size=10, pad=2),
        HashPlan.build(replace(SMALL, rows_per_head=60), vocab_size=10, pad=2),
        HashPlan.build(SMALL, vocab_size=11, pad=2),
        HashPlan.build(SMALL, vocab_size=10, pad=3),
        HashPlan.build(replace(SMALL, scheme="ple"), vocab_size=10, pad=2),
    ]
    assert len({plan.digest for plan in [same, *others]}) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": (3, 2)}, "orders must rise"),
        ({"orders": ()}, "orders must rise"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"layers": (1, 1)}, "different blocks"),
        ({"layers": (-1,)}, "different blocks"),
        ({"rows_per_head": (5,)}, "1 sizes for 2 orders"),
        ({"rows_per_head": 0}, "at least 1"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


def test_ids_outside_the_vocabulary(hash_ngrams):
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    for token in (-1, 10):
        with pytest.raises(ValueError, match="arbitrary rows"):
            hash_ngrams(plan, torch.tensor([[1, token]]))
    with pytest.raises(ConfigError, match="pad id 10 lies outside"):
        HashPlan.build(SMALL, vocab_size=10, pad=10)
    with pytest.raises(ConfigError, match="too small"):
        SMALL.sized(rows=10)
