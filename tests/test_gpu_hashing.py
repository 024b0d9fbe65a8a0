"""The GPU's kernel, interpreted, against the readable truth, bit for bit; and what stands for an error there."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm import kernels
from engram_lm.errors import DataError
from engram_lm.hashing import DEAD, OUTSIDE, HashConfig, HashPlan, hash_ngrams, reference_hash_ngrams
from engram_lm.tokens import CanonicalVocabulary

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
fast = pytest.importorskip("engram_lm.kernels.gpu.hashing")

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
BIG = 2**63 - 1
SMALL = HashConfig(heads=2, rows_per_head=50)


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """What a kernel does not write is 2^63 - 1."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dispatched(monkeypatch):
    """The public functions take the kernels of a GPU."""
    monkeypatch.setenv("ENGRAM_KERNELS", "triton")
    kernels._triton.cache_clear()
    yield
    kernels._triton.cache_clear()


def on_device(plan, tokens, segments=None, dead=None, history=None):
    return fast.hash_ngrams(fast.constants(plan, CPU), tokens, segments, dead, history)


def same(one, other):
    return all(a.dtype == b.dtype == torch.int64 and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@triton.jit
def remainders(mixes, sizes, reciprocals, rests, MIXES: tl.constexpr, SIZES: tl.constexpr):
    mix, size = tl.arange(0, MIXES), tl.arange(0, SIZES)
    rest = fast.remainders(tl.load(mixes + mix), sizes + size, reciprocals + size, size < SIZES)
    tl.store(rests + mix[:, None] * SIZES + size[None, :], rest)


@given(
    sizes=st.lists(
        st.integers(1, 5) | st.integers(1, 2**62) | st.sampled_from([2**14, 2**53 + 1]), min_size=4, max_size=4
    ),
    mixes=st.lists(st.integers(0, BIG), min_size=2, max_size=2),
)
def test_remainders_are_exact(sizes, mixes):
    """For any mix and size, and next to the multiples, where a quotient that is off by one shows."""
    mixes += [mix - mix % size + step for mix in (*mixes, BIG) for size in sizes for step in (0, size - 1, -1)]
    mixes = ([mix for mix in mixes if 0 <= mix <= BIG] + [BIG] * 64)[:64]
    rests = torch.empty(64, 4, dtype=torch.int64)
    reciprocals = torch.from_numpy(fast.reciprocals(np.array(sizes)))
    remainders[1,](torch.tensor(mixes), torch.tensor(sizes), reciprocals, rests, 64, 4)
    assert rests.tolist() == [[mix % size for size in sizes] for mix in mixes]


@st.composite
def plans(draw, rows):
    orders = tuple(sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=3))))
    config = HashConfig(
        orders=orders,
        heads=draw(st.sampled_from([1, 2, 3, 8, 11])),
        rows_per_head=draw(rows | st.tuples(*[rows] * len(orders))),
        layers=draw(st.sampled_from([(0,), (1, 14), (5, 2, 9)])),
        seed=draw(st.integers(0, 99)),
        scheme=draw(st.sampled_from(["engram", "engram", "ple", "capacity_1", "shuffled"])),
    )
    return HashPlan.build(
        config, vocab_size=draw(st.sampled_from([4, 30, 100_000, 2**40])), pad=draw(st.integers(0, 3))
    )


rows = st.integers(1, 60) | st.sampled_from([2**14, 16_000_000, 2**31, 2**53])
length = st.integers(1, 9) | st.just(70)
optional = st.sets(st.sampled_from(["segments", "dead"]))
seeds = st.integers(0, 2**32 - 1).map(torch.Generator().manual_seed)


def text(plan, batch, length, names, g):
    """Tokens, among them the pad or the end of a text, and what else is named."""
    tokens = torch.randint(0, plan.vocab_size, (batch, length), generator=g)
    tokens[torch.rand(tokens.shape, generator=g) < 0.1] = plan.pad
    arguments = {
        "segments": (torch.rand(batch, length, generator=g) < 0.2).cumsum(1),
        "dead": torch.rand(batch, length, generator=g) < 0.1,
    }
    return tokens, {name: arguments[name] for name in sorted(names)}


@given(
    plan=plans(rows),
    batch=st.integers(1, 3),
    pieces=st.lists(st.tuples(length, optional), min_size=1, max_size=3),
    g=seeds,
)
@settings(max_examples=30)
def test_same_as_the_reference_in_any_pieces(plan, batch, pieces, g):
    history = None
    for length, names in pieces:
        tokens, arguments = text(plan, batch, length, names, g)
        expected = reference_hash_ngrams(plan, tokens, history=history, **arguments)
        found = on_device(plan, tokens, history=history, **arguments)
        assert same(found, expected)
        history = found[1]


@given(
    plan=plans(st.just(2**53)),
    lengths=st.lists(length, min_size=1, max_size=3),
    names=optional,
    bad=st.sampled_from([-1, -2, BIG]),
    g=seeds,
)
@settings(max_examples=30)
def test_whatever_sees_an_id_outside_the_vocabulary_has_row_minus_one(plan, lengths, names, bad, g):
    """It sees the id if its row depends on it."""
    tokens, arguments = text(plan, 2, sum(lengths), names, g)
    outside = torch.rand(tokens.shape, generator=g) < 0.1
    others = [id for id in range(4) if id != plan.pad]
    one, other = (reference_hash_ngrams(plan, tokens.masked_fill(outside, id), **arguments) for id in others[:2])
    tokens = tokens.masked_fill(outside, plan.vocab_size if bad == BIG else bad)

    history, found = None, []
    for piece, *more in zip(*(x.split(lengths, 1) for x in (tokens, *arguments.values())), strict=True):
        ids, history = on_device(plan, piece, history=history, **dict(zip(arguments, more, strict=True)))
        found.append(ids)
    depends = one[0] != other[0]
    if plan.sizes.max() > 1:  # else there is one row for everything
        assert torch.equal(torch.cat(found, 1), one[0].masked_fill(depends, -1))
    assert torch.equal(history, torch.where(one[1] == other[1], one[1], OUTSIDE))


def test_an_unseen_id_outside_the_vocabulary_does_no_harm():
    """In another document, before the end of a text, or where positions are dead."""
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    tokens, good = torch.tensor([[3, 99, 4, 5]]), torch.tensor([[3, 8, 4, 5]])
    for arguments in {"segments": torch.tensor([[0, 0, 1, 1]])}, {"dead": torch.tensor([[False, True, False, False]])}:
        ids, _ = on_device(plan, tokens, **arguments)
        assert torch.equal(ids[:, 2:], reference_hash_ngrams(plan, good, **arguments)[0][:, 2:])
    ple = HashPlan.build(replace(SMALL, scheme="ple"), vocab_size=10, pad=4)
    assert torch.equal(on_device(ple, tokens)[0][:, 3:], reference_hash_ngrams(ple, good)[0][:, 3:])
    assert on_device(plan, tokens)[0].eq(-1).flatten(2).any(-1).tolist() == [[False, True, True, True]]


def test_histories_say_why_nothing_is_seen():
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    _, history = on_device(plan, torch.tensor([[10, 11]]), dead=torch.tensor([[False, True]]))
    assert history.tolist() == [[[OUTSIDE, 0], [DEAD, 0]]]


def test_strided_and_narrow_arguments():
    plan = HashPlan.build(SMALL, vocab_size=10, pad=2)
    tokens, segments = torch.randint(0, 10, (9, 4)).t(), torch.randint(0, 2, (4, 18), dtype=torch.int32)[:, ::2]
    _, history = reference_hash_ngrams(plan, tokens)
    arguments = {"segments": segments, "dead": (torch.rand(9, 4) < 0.2).t(), "history": history.flip(0)[[3, 1, 1, 0]]}
    expected = reference_hash_ngrams(plan, tokens, **arguments)
    assert same(on_device(plan, tokens, **arguments), expected)
    assert same(on_device(plan, tokens.int(), **arguments), expected)


@pytest.mark.usefixtures("dispatched")
def test_golden_vectors():
    expected = json.loads((GOLDEN / "paper.json").read_text())
    plan = HashPlan.build(HashConfig.paper(), vocab_size=expected["compressed_vocab"], pad=2)
    hashes = hash_ngrams(plan, torch.tensor(expected["compressed"]))[0] - torch.as_tensor(plan.offsets)
    assert {str(layer): hashes[:, :, l].tolist() for l, layer in enumerate(plan.layers)} == expected["hashes"]

    expected = json.loads((GOLDEN / "ple.json").read_text())
    eos = expected["eos_token_id"]
    plan = HashPlan.build(HashConfig.qwen_ple(eos), vocab_size=248_320, pad=eos)
    assert hash_ngrams(plan, torch.tensor(expected["ids"]))[0][:, :, 0].tolist() == expected["rows"]


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_hash(shape):
    plan, tokens = HashPlan.build(SMALL, vocab_size=10, pad=2), torch.zeros(shape, dtype=torch.int64)
    history = torch.randint(0, 10, (len(tokens), 2, 2))
    assert same(hash_ngrams(plan, tokens, history=history), reference_hash_ngrams(plan, tokens, history=history))


@pytest.mark.usefixtures("dispatched")
def test_while_it_is_traced_plain_operations_are_used():
    plan, tokens = HashPlan.build(SMALL, vocab_size=10, pad=2), torch.tensor([[11]])
    with (
        mock.patch("torch.compiler.is_compiling", return_value=True),
        pytest.raises(ValueError, match="arbitrary rows"),
    ):
        hash_ngrams(plan, tokens)
    assert hash_ngrams(plan, tokens)[0].eq(-1).all()


def test_constants_are_copied_once():
    """Or each call would wait, and a captured graph could not read them."""
    first = fast.constants(HashPlan.build(SMALL, vocab_size=10, pad=2), CPU)
    assert first is fast.constants(HashPlan.build(SMALL, vocab_size=10, pad=2), CPU)
    assert first is not fast.constants(HashPlan.build(SMALL, vocab_size=11, pad=2), CPU)


# --- canonical ids ----------------------------------------------------------------------------------------------------

FOLDED = CanonicalVocabulary(np.array([0, 1, 1, 2, 0]))


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_that_the_tokenizer_does_not_have_become_minus_one(dtype):
    limits = torch.iinfo(dtype)
    tokens = torch.tensor([[0, 1, 2, 3, 4], [-1, 5, 6, limits.min, limits.max]], dtype=dtype)
    canonical = FOLDED(tokens)
    assert canonical.tolist() == [[0, 1, 1, 2, 0], [-1] * 5]
    plan = HashPlan.build(SMALL, vocab_size=FOLDED.size, pad=2)
    ids, _ = hash_ngrams(plan, canonical)
    assert (ids[0] >= 0).all()
    assert (ids[1] == -1).all()


def test_on_the_cpu_they_are_an_error():
    with pytest.raises(DataError, match="has 5"):
        FOLDED(torch.tensor([5]))


def test_on_a_device_nobody_waits_for_canonical_ids():
    """On `meta` there is nothing to wait for."""
    canonical = FOLDED(torch.empty(2, 3, dtype=torch.int64, device="meta"))
    assert (canonical.shape, canonical.dtype, canonical.device.type) == ((2, 3), torch.int64, "meta")
    assert FOLDED._framed(torch.device("meta")) is FOLDED._framed(torch.device("meta"))


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda vocabulary: pickle.loads(pickle.dumps(vocabulary))])
def test_copies_on_devices_stay_where_they_are(duplicate):
    FOLDED(torch.tensor([3]))
    other = duplicate(FOLDED)
    assert vars(other).keys() == {"lookup"}
    assert (other.digest, other(torch.tensor([3]))) == (FOLDED.digest, 2)
