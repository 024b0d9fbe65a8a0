"""Held-out loss against a loop over documents, its interval against a bootstrap, bytes against the text."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import BASE, ENGRAM, VOCABULARY, live, split
from tokenizers import AddedToken

from engram_lm.errors import MismatchError
from engram_lm.evaluate.loss import Losses, bytes_of_tokens, difference, half_width, measure
from engram_lm.train.loader import windows
from engram_lm.train.tokenizer import encode_texts, train_tokenizer

SPLIT = split(documents=7, seed=3)
SIZES = torch.arange(VOCABULARY, dtype=torch.float64)  # token 0, the separator, has no bytes


@torch.no_grad()
def naive(model, lookup, length: int) -> Losses:
    """Every document of every window on its own, token by token."""
    tokens = torch.from_numpy(SPLIT.tokens.astype(np.int64))
    borders = [*SPLIT.starts.tolist(), len(tokens)]
    nats, counts, sizes = (np.zeros(len(SPLIT.starts)) for _ in range(3))
    for document, (begin, end) in enumerate(pairwise(borders)):
        for target in range(begin + 1, end):
            first = max(begin, (target - 1) // length * length)  # the window that has this target
            context = tokens[None, first:target]
            rows = lookup.rows(context)[0] if lookup else None
            logits = model.logits(model(context, rows)[0])[0, -1]
            nats[document] += F.cross_entropy(logits[None], tokens[target, None]).item()
            counts[document] += 1
            sizes[document] += SIZES[tokens[target]].item()
    return Losses(nats, counts, sizes)


@pytest.mark.parametrize("length", [5, 16, 1000])
@pytest.mark.parametrize("config", [BASE, ENGRAM], ids=["base", "engram"])
def test_loss_by_document_equals_the_naive_loop(config, length):
    model, lookup = live(config)
    expected = naive(model, lookup, length)
    assert len(expected.tokens) == 7
    for batch_size in (1, 4):
        found = measure(model, lookup, windows(SPLIT, batch_size, length), SIZES)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.bytes, expected.bytes)
        np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5)
        assert found.mean == pytest.approx(expected.mean, rel=1e-6)


def test_the_mean_counts_every_token_once():
    losses = Losses(np.array([2.0, 9.0]), np.array([1.0, 4.0]), np.array([3.0, 8.0]))
    assert losses.mean == pytest.approx(11 / 5)
    assert losses.bits_per_byte == pytest.approx(11 / math.log(2) / 11)


def test_documents_without_a_counted_target_do_not_count():
    model, lookup = live(ENGRAM)
    some = measure(model, lookup, windows(SPLIT, 2, 10, limit=2), SIZES)
    assert 1 <= len(some.tokens) < 7
    assert (some.tokens > 0).all()
    assert math.isfinite(some.mean)


# --- uncertainty --------------------------------------------------------------------------------------------


def corpus(documents: int, seed: int) -> Losses:
    """Documents of very different lengths; longer ones are easier, and each has a difficulty of its own."""
    rng = np.random.default_rng(seed)
    tokens = np.ceil(rng.lognormal(4, 1, documents))
    nats = tokens * (4 + rng.normal(0, 0.5, documents) - 0.2 * np.log(tokens))
    return Losses(nats, tokens, tokens * 4)


def bootstrap(sums: np.ndarray, counts: np.ndarray, draws: int = 4000) -> float:
    """95 % half width of sum(sums) / sum(counts), by drawing documents again and again."""
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    return 1.96 * float((sums[chosen].sum(1) / counts[chosen].sum(1)).std())


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_agrees_with_a_bootstrap(seed):
    losses = corpus(300, seed)
    assert losses.interval == pytest.approx(bootstrap(losses.nats, losses.tokens), rel=0.15)


def test_the_interval_covers_the_truth():
    """In about 95 of 100 corpora drawn from a large one, the interval holds the large one's mean."""
    everything = corpus(20_000, 0)
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        chosen = rng.choice(20_000, 100)
        sample = Losses(everything.nats[chosen], everything.tokens[chosen], everything.bytes[chosen])
        hits += abs(sample.mean - everything.mean) < sample.interval
    assert 0.90 <= hits / 400 <= 0.98


def test_four_times_the_documents_halve_the_interval():
    assert corpus(4000, 0).interval == pytest.approx(corpus(1000, 0).interval / 2, rel=0.15)


def test_one_document_tells_nothing():
    assert half_width(np.array([3.0]), np.array([2.0])) == math.inf
    assert half_width(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == 0  # equally hard


def test_a_paired_difference_forgets_what_is_common():
    base = corpus(300, 0)
    better = replace(base, nats=base.nats - 0.3 * base.tokens)
    gain, interval = difference(better, base)
    assert gain == pytest.approx(-0.3)
    assert interval == pytest.approx(0, abs=1e-9)
    assert base.interval > 0.05
    noise = np.random.default_rng(1).normal(0, 0.1, 300) * base.tokens
    gain, interval = difference(replace(base, nats=base.nats + noise), base)
    assert gain == pytest.approx(noise.sum() / base.tokens.sum())
    assert interval == pytest.approx(bootstrap(noise, base.tokens), rel=0.15)


def test_other_documents_have_no_difference():
    with pytest.raises(MismatchError, match="different documents"):
        difference(corpus(30, 0), corpus(30, 1))
    with pytest.raises(MismatchError, match="different documents"):
        difference(corpus(30, 0), corpus(29, 0))


# --- bytes --------------------------------------------------------------------------------------------------

TEXTS = [
    "The memory of a language model is where it keeps what it has read. " * 8,
    "语言模型的记忆是它保存所读内容的地方。哈希表把每个词组映射到一行。" * 8,
    "Größe, façade, naïve; 12345 67890 \t\n\r\n    indented = {'key': [1, 2]}\n" * 8,
    "🧠🗂️ emoji and ｆｕｌｌ ｗｉｄｔｈ " * 8,
]
TOKENIZER = train_tokenizer(TEXTS, 420)
TOKENIZER.add_tokens([AddedToken("<tool call>", normalized=False)])  # not special: it stands for its own text


def size_of(text: str) -> float:
    ids = encode_texts(TOKENIZER, [text])[0].astype(np.int64)
    return float(bytes_of_tokens(TOKENIZER)[torch.from_numpy(ids)].sum())


@given(st.text() | st.text("memory 语言模型的é🧠\n\t<|endoftext|>") | st.sampled_from(TEXTS))
def test_bytes_of_tokens_add_up_to_the_text(text):
    assert size_of(text) == len(text.encode())


def test_bytes_of_added_tokens():
    sizes = bytes_of_tokens(TOKENIZER)
    assert sizes[TOKENIZER.token_to_id("<|endoftext|>")] == 0
    assert sizes[TOKENIZER.token_to_id("<tool call>")] == len("<tool call>")
    text = "a <tool call> and <|endoftext|> spelled out"
    assert size_of(text) == len(text.encode())


def test_bits_a_byte_of_a_text():
    """A model that is uniform over its vocabulary spends log2(V) bits on every token."""
    ids = encode_texts(TOKENIZER, TEXTS)
    sizes = bytes_of_tokens(TOKENIZER)
    tokens = np.array([len(part) for part in ids])
    counted = np.array([float(sizes[torch.from_numpy(part.astype(np.int64))].sum()) for part in ids])
    losses = Losses(tokens * math.log(TOKENIZER.get_vocab_size()), tokens, counted)
    whole = sum(len(text.encode()) for text in TEXTS)
    assert losses.bits_per_byte == pytest.approx(math.log2(TOKENIZER.get_vocab_size()) * tokens.sum() / whole)
