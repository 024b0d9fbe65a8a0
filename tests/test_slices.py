"""Every target in one slice of each kind; slices against loops, and what they say about arms that are made up."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BASE, ENGRAM, HASH, VOCABULARY, live, split
from tokenizers import AddedToken

from engram_lm.errors import MismatchError
from engram_lm.evaluate.loss import Losses, TokenLosses, measure, measure_tokens
from engram_lm.evaluate.slices import (
    CLASSES,
    by_class,
    by_context,
    by_count,
    class_of,
    compare_slices,
    seen_counts,
    slice_losses,
    slicings,
)
from engram_lm.hashing import hash_ngrams
from engram_lm.model.lookup import build_plan
from engram_lm.statistics import ratio_interval
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.loader import Batch, Loader, LoaderState, windows
from engram_lm.train.ngrams import Positions
from engram_lm.train.shards import split_in_memory
from engram_lm.train.sources import Document
from engram_lm.train.tokenizer import encode_texts, train_tokenizer

HELD_OUT = split(documents=7, seed=3)
SIZES = torch.arange(VOCABULARY, dtype=torch.float64)
FOLD = CanonicalVocabulary(np.arange(VOCABULARY) // 2)  # pairs of tokens are one word to the memory
TEXTS = [
    "The memory of a language model, it's said, isn't where it keeps what it has read. " * 4,
    "In 1990s Größe, (The) façade: naïve-Looking 'quoted' 12345 67890th \t\n\r\n    indented = {'Key': [1, 2]}\n" * 4,
    "语言模型的记忆是它保存所读内容的地方。哈希表 Русский Ελληνικά 🧠🗂️ emoji\u200b" * 4,
]
TOKENIZER = train_tokenizer(TEXTS, 420)


def read(steps: int, seed: int = 0) -> list[Batch]:
    """What a run reads in so many steps."""
    loader, state, batches = Loader(split(seed=3, documents=12), 2, 10, seed), LoaderState(), []
    for _ in range(steps):
        batch, state = loader.next(state)
        batches.append(batch)
    return batches


# --- losses of tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BASE, ENGRAM], ids=["base", "engram"])
def test_losses_of_tokens_are_those_of_the_model(config):
    model, lookup = live(config)
    found = measure_tokens(model, lookup, windows(HELD_OUT, 3, 16))
    nats = []
    for batch in windows(HELD_OUT, 1, 16):
        rows = lookup.rows(batch.tokens, segments=batch.segments)[0] if lookup else None
        losses = model.loss(batch.tokens, batch.targets, rows, segments=batch.segments, reduction="none")
        nats += losses[batch.targets >= 0].tolist()
    assert len(nats) == len(HELD_OUT.tokens) - 7
    np.testing.assert_allclose(found.nats, nats, rtol=1e-4)


def test_summed_by_document_they_are_the_measured_loss():
    model, lookup = live(ENGRAM)
    found = measure_tokens(model, lookup, windows(HELD_OUT, 3, 16))
    measured, summed = measure(model, lookup, windows(HELD_OUT, 3, 16), SIZES), found.by_document(SIZES)
    documents = found.positions.documents[found.positions.counted]
    for number in range(7):
        mine = documents == number + 1
        assert summed.nats[number] == measured.nats[number] == pytest.approx(float(found.nats[mine].sum()), rel=1e-5)
        assert summed.tokens[number] == measured.tokens[number] == mine.sum()
    np.testing.assert_array_equal(summed.bytes, measured.bytes)


def test_no_batches_leave_nothing():
    assert measure_tokens(*live(ENGRAM), []).by_document(SIZES).tokens.shape == (0,)


# --- how often an n-gram was seen ---------------------------------------------------------------------------


def seen_slowly(training: list[Batch], evaluation: list[Batch], orders: tuple[int, ...]) -> tuple[list, list]:
    """The same counts from tuples of canonical ids, one by one."""

    def of(batches):
        for batch in batches:
            for tokens, targets, segments in zip(*(part.tolist() for part in vars(batch).values()), strict=True):
                words = FOLD.lookup[tokens].tolist()
                for last, target in enumerate(targets):
                    firsts = [last - order + 1 for order in orders]
                    whole = [first >= 0 and segments[first] == segments[last] for first in firsts]
                    ngrams = [tuple(words[first : last + 1]) for first in firsts]
                    yield target, [ngram if known else None for ngram, known in zip(ngrams, whole, strict=True)]

    counts: Counter = Counter()
    for target, ngrams in of(training):
        counts.update(ngrams)
        counts.update((ngram, target) for ngram in ngrams)
    wanted = [(target, ngrams) for target, ngrams in of(evaluation) if target >= 0]
    seen = [[counts[ngram] if ngram else -1 for ngram in ngrams] for _, ngrams in wanted]
    followed = [[counts[ngram, target] if ngram else -1 for ngram in ngrams] for target, ngrams in wanted]
    return seen, followed


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(0, 3), st.integers(2, 40), st.sampled_from([(2, 3), (3,), (1, 2, 4)]))
def test_seen_counts_are_those_of_a_loop(steps, seed, length, orders):
    training, evaluation = read(steps, seed), list(windows(HELD_OUT, 2, length))
    seen, followed = seen_counts(iter(training), evaluation, FOLD, orders)
    expected = seen_slowly(training, evaluation, orders)
    assert (seen.tolist(), followed.tolist()) == expected
    assert (followed <= seen).all()


def test_seen_are_the_rows_that_training_read():
    """With a head large enough that nothing collides, an n-gram was seen exactly where training read its row."""
    vocabulary = CanonicalVocabulary.identity(VOCABULARY + 1)
    plan = build_plan(replace(HASH, rows_per_head=2_000_003, pad_id=VOCABULARY), vocabulary)  # the text has no pad
    training, evaluation = read(6), list(windows(HELD_OUT, 2, 12))
    known, asked = (
        [hash_ngrams(plan, vocabulary(batch.tokens), segments=batch.segments)[0] for batch in batches]
        for batches in (training, evaluation)
    )
    targets = [batch.targets >= 0 for batch in evaluation]
    rows = torch.cat([ids[counted] for ids, counted in zip(asked, targets, strict=True)])  # [N, L, K]
    was_read = torch.isin(rows, torch.cat([ids.flatten() for ids in known]))[:, 0, :: plan.heads].numpy()
    seen, _ = seen_counts(training, evaluation, vocabulary, plan.orders)
    whole = seen >= 0
    np.testing.assert_array_equal(was_read[whole], seen[whole] > 0)
    assert 0 < was_read[whole].mean() < 1


# --- slices -------------------------------------------------------------------------------------------------


def test_counts_are_sliced_at_1_4_and_32():
    sliced = by_count(np.array([-1, 0, 1, 3, 4, 31, 32, 10**6]))
    assert [sliced.labels[number] for number in sliced.number] == "start 0 1-3 1-3 4-31 4-31 32+ 32+".split()


@pytest.mark.parametrize(
    ("length", "labels"),
    [(2, ("1+",)), (7, ("1+",)), (8, ("1-3", "4+")), (31, ("1-3", "4+")), (99, ("1-3", "4-15", "16+"))],
)
def test_positions_are_sliced_up_to_half_of_what_windows_show(length, labels):
    positions = Positions.of(windows(HELD_OUT, 2, length))
    sliced = by_context(positions)
    assert sliced.labels == labels
    context = positions.reach[positions.counted]
    for number, label in enumerate(labels):
        low, high = (label.rstrip("+") + f"-{10**9}" if "+" in label else label).split("-")
        np.testing.assert_array_equal(sliced.number == number, (int(low) <= context) & (context <= int(high)))


def test_every_target_is_in_one_slice_of_every_kind():
    documents = [Document(str(number), text) for number, text in enumerate(TEXTS)]
    text = split_in_memory(documents, TOKENIZER)
    vocabulary = CanonicalVocabulary.from_tokenizer(TOKENIZER, cache=False)
    batches = list(windows(text, 2, 24))
    found = slicings(iter(batches), windows(text, 1, 50, limit=3), TOKENIZER, vocabulary, (2, 3))
    assert list(found) == [
        "seen 2-gram",
        "seen 3-gram",
        "seen 2-gram with its next token",
        "seen 3-gram with its next token",
        "position",
        "token class",
    ]
    positions = Positions.of(batches)
    number = int(positions.counted.sum())
    losses = TokenLosses(positions, np.random.default_rng(0).random(number, np.float32))
    whole = losses.by_document(torch.zeros(TOKENIZER.get_vocab_size(), dtype=torch.float64))
    for kind, slicing in found.items():
        assert slicing.number.shape == (number,), kind
        sums = slice_losses(losses, slicing)
        np.testing.assert_array_equal(np.sum(sums["tokens"], 0), whole.tokens)
        np.testing.assert_allclose(np.sum(sums["nats"], 0), whole.nats, atol=1e-5)
        for label, nats, tokens in zip(range(len(slicing.labels)), sums["nats"], sums["tokens"], strict=True):
            mine = slicing.number == label
            assert sum(tokens) == mine.sum()
            assert sum(nats) == pytest.approx(float(losses.nats[mine].sum()), abs=1e-4)
    assert len(found["seen 2-gram"].labels) == 5
    assert set(found["token class"].number) == set(range(len(CLASSES)))


def test_other_targets_are_refused():
    losses = TokenLosses(Positions.of(windows(HELD_OUT, 2, 10)), np.zeros(len(HELD_OUT.tokens) - 7, np.float32))
    with pytest.raises(MismatchError, match="booked on the wrong slices"):
        slice_losses(losses, by_count(np.zeros(5, np.int64)))


# --- token classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "word start") for text in (" the", "the", "(the", "-based", "\n\nthe", " 'tis", "é", " naïve")),
        *((text, "capitalised word start") for text in (" The", "The", "(The", " NATO", "É", "McX")),
        *((text, "number") for text in ("1", " 12", "$5", "²", "½", "1st", "٣")),
        *((text, "punctuation") for text in (".", ",", " (", ");\n", "€", "=", "。", "🧠", "'")),
        *((text, "white space") for text in (" ", "\n", " \t\r\n", "\u3000")),
        *((text, "other script") for text in ("中", "语言", " Русский", "Ελλ", "日本", "가", "一")),
        *((text, "other") for text in ("", "\x00", "\u200b", "\u0301")),
    ],
)
def test_class_of_a_token(text, expected):
    assert class_of(text.encode()) == expected


@pytest.mark.parametrize("piece", ["中".encode()[:2], "中".encode()[1:], b"\xff", b" \xe4"])
def test_parts_of_characters_are_other(piece):
    assert class_of(piece) == "other"


@given(st.binary(max_size=12) | st.text(max_size=6).map(str.encode))
def test_every_token_has_a_class(piece):
    assert class_of(piece) in CLASSES


def classes_in(text: str, tokenizer=TOKENIZER) -> list[tuple[str, str]]:
    """Each token of a text, as text, with its class."""
    ids = torch.from_numpy(encode_texts(tokenizer, [text])[0].astype(np.int64))
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), ids[:-1]])
    sliced = by_class(Positions.of([Batch(tokens[None], ids[None], None)]), tokenizer)
    names = [sliced.labels[number] for number in sliced.number]
    return [(tokenizer.decode([token]), name) for token, name in zip(ids.tolist(), names, strict=True)]


def test_words_go_on_after_letters_and_digits():
    assert classes_in("The xqzw isn't (Xqz) 19th") == [
        ("The", "capitalised word start"),
        *zip((" ", "x", "q", "z", "w"), ("white space", "word start", *["word continuation"] * 3), strict=True),
        (" isn", "word start"),
        ("'t", "word continuation"),
        (" (", "punctuation"),
        ("X", "capitalised word start"),
        ("q", "word continuation"),
        ("z", "word continuation"),
        (")", "punctuation"),
        (" ", "white space"),
        ("19", "number"),
        ("th", "word continuation"),
    ]


@given(st.text("abcXYZ 019.,('-\n", max_size=30))
def test_words_begin_where_the_text_has_no_letter_before(text):
    done = ""
    for piece, name in classes_in(text) if text else []:
        bare = piece.lstrip("'")[:1].isalpha()
        assert (name == "word continuation") == (bare and done[-1:].isalnum()), (done, piece)
        done += piece
    assert done == text


def test_words_go_on_after_half_a_character():
    """A tokenizer that spells é in two bytes does not begin a word behind it."""
    spelled = train_tokenizer(["abc abd " * 20], 262)
    found = classes_in("béa 中 b", spelled)
    assert [name for _, name in found] == [
        *("word start", "other", "other", "word continuation", "white space"),
        *("other", "other", "other", "white space", "word start"),
    ]


def test_special_tokens_are_other_and_end_words():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True)])
    user, a = tokenizer.token_to_id("<|user|>"), tokenizer.token_to_id("a")
    batch = Batch(torch.tensor([[a, user, a]]), torch.tensor([[user, a, a]]), None)
    sliced = by_class(Positions.of([batch]), tokenizer)
    assert [CLASSES[number] for number in sliced.number] == ["other", "word start", "word continuation"]


# --- arms ---------------------------------------------------------------------------------------------------


def made_up(gains: list[float], tokens: np.ndarray, seed: int = 0) -> dict:
    """What `slice_losses` would give for an arm that gains so much a token in each slice; tokens [S, D]."""
    base = 3 + np.random.default_rng(0).random(tokens.shape)
    noise = np.random.default_rng(seed).normal(0, 0.01, tokens.shape) if seed else 0.0
    nats = tokens * (base - np.array(gains)[:, None] + noise)
    return {"labels": [f"slice {i}" for i in range(len(tokens))], "nats": nats.tolist(), "tokens": tokens.tolist()}


TOKENS = np.random.default_rng(5).integers(1, 50, (3, 20))


def test_gains_lie_where_they_were_put():
    arms = {
        "base": [made_up([0, 0, 0], TOKENS)] * 2,
        "engram": [made_up([0.5, 0, 0.1], TOKENS, seed) for seed in (1, 2)],
    }
    found = compare_slices(arms)
    sizes = TOKENS.sum(1)
    assert found["labels"] == ["slice 0", "slice 1", "slice 2"]
    np.testing.assert_allclose(found["share"], sizes / sizes.sum())
    engram = found["arms"]["engram"]
    for number, gain in enumerate([0.5, 0, 0.1]):
        change = np.mean([np.subtract(own["nats"], arms["base"][0]["nats"])[number] for own in arms["engram"]], 0)
        difference = change.sum() / sizes[number]
        assert engram["less_base"][number]["difference"] == pytest.approx(difference)
        assert engram["less_base"][number]["interval"] == pytest.approx(ratio_interval(change, TOKENS[number]))
        assert difference == pytest.approx(-gain, abs=0.01)
        base_loss = np.sum(arms["base"][0]["nats"][number]) / sizes[number]
        assert found["arms"]["base"]["loss"][number] == pytest.approx(base_loss)
        assert engram["loss"][number] == pytest.approx(base_loss + difference)
    assert sum(engram["part"]) == pytest.approx(1)
    gained = np.array([0.5, 0, 0.1]) * sizes
    np.testing.assert_allclose(engram["part"], gained / gained.sum(), atol=0.02)
    assert found["arms"]["base"]["part"] == [None] * 3
    assert found["arms"]["base"]["less_base"][0]["difference"] == 0


def test_the_slices_gains_add_up_to_the_whole_gain():
    arms = {"base": [made_up([0, 0, 0], TOKENS)], "engram": [made_up([0.3, -0.1, 0.2], TOKENS, 1)]}
    found = compare_slices(arms)
    parts = [of["difference"] for of in found["arms"]["engram"]["less_base"]]
    whole = (np.sum(arms["engram"][0]["nats"]) - np.sum(arms["base"][0]["nats"])) / TOKENS.sum()
    assert np.dot(parts, found["share"]) == pytest.approx(whole)
    assert found["arms"]["engram"]["part"][1] < 0


@pytest.mark.parametrize("gains", [[-0.2, 0.0, 0.1], [0.0, 0.0, 0.0]])
def test_without_a_gain_it_has_no_parts(gains):
    found = compare_slices({"base": [made_up([0, 0, 0], TOKENS)], "ffn": [made_up(gains, TOKENS, 7)]})
    assert found["arms"]["ffn"]["part"] == [None] * 3


def test_empty_slices_and_slices_of_one_document():
    tokens = TOKENS.copy()
    tokens[1] = 0
    tokens[2, 1:] = 0
    found = compare_slices({"base": [made_up([0, 0, 0], tokens)], "engram": [made_up([0.5, 0.5, 0.5], tokens)]})
    engram = found["arms"]["engram"]
    assert engram["loss"][1] is engram["less_base"][1] is None
    assert found["share"][1] == engram["part"][1] == 0
    assert engram["less_base"][2] == {"difference": pytest.approx(-0.5), "interval": None}
    assert engram["less_base"][0]["interval"] == pytest.approx((-0.5, -0.5))


def test_what_was_seen_may_differ_between_seeds():
    """Other seeds read other windows: tokens of all of them together are the slice."""
    other = TOKENS[::-1]
    arms = {
        arm: [made_up(gains, TOKENS), made_up(gains, other)]
        for arm, gains in {"base": [0, 0, 0], "engram": [0.4, 0.1, 0]}.items()
    }
    found = compare_slices(arms)
    np.testing.assert_allclose(found["share"], (TOKENS + other).sum(1) / (2 * TOKENS.sum()))
    for of, gain in zip(found["arms"]["engram"]["less_base"], [0.4, 0.1, 0], strict=True):
        assert of["difference"] == pytest.approx(-gain)


def test_arms_of_other_slices_are_refused():
    base, other = [made_up([0, 0, 0], TOKENS)], [made_up([0, 0, 0], TOKENS[::-1])]
    renamed = [base[0] | {"labels": ["a", "b", "c"]}]
    for wrong in (other, renamed, base * 2, [made_up([0, 0, 0], TOKENS[:, :5])]):
        with pytest.raises(MismatchError, match="engram and base were not measured on the same slices"):
            compare_slices({"base": base, "engram": wrong})
    with pytest.raises(MismatchError, match="no arm base among engram"):
        compare_slices({"engram": base})


def test_slices_of_a_model_that_was_measured():
    """From batches to parts: the slices of two models compare, and JSON keeps them."""
    evaluation, training = list(windows(HELD_OUT, 2, 16)), read(4)
    seen, _ = seen_counts(training, evaluation, CanonicalVocabulary.identity(VOCABULARY), (2,))
    per_arm = {
        arm: [slice_losses(measure_tokens(*live(config), evaluation), by_count(seen[:, 0]))]
        for arm, config in {"base": BASE, "engram": ENGRAM}.items()
    }
    found = compare_slices(per_arm)
    losses: dict[str, Losses] = {
        arm: measure(*live(config), evaluation, SIZES) for arm, config in {"base": BASE, "engram": ENGRAM}.items()
    }
    for arm, whole in losses.items():
        means = [(loss or 0) * share for loss, share in zip(found["arms"][arm]["loss"], found["share"], strict=True)]
        assert sum(means) == pytest.approx(whole.mean, rel=1e-5)
