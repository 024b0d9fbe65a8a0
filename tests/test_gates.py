import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engram_lm import config
from engram_lm.analysis.gates import GateView, Ngram, displayable, gate_view
from engram_lm.analysis.ngrams import Ngrams, views
from engram_lm.analysis.probes import pieces_of, view_of
from engram_lm.hashing import HashConfig
from engram_lm.model import LanguageModel
from engram_lm.model.lookup import Lookup, build_plan
from engram_lm.report.gates import gate_section
from engram_lm.tables import DeviceTable
from engram_lm.tables.rows import RowFormat
from engram_lm.tokens import CanonicalVocabulary, piece_bytes


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at the given places, taken modulo its length."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(st.text(), st.lists(st.integers(0, 200), max_size=40))
def test_text_cut_anywhere_is_shown_whole(text, cuts):
    spans = displayable(split(text.encode(), cuts))
    assert "".join(span.text for span in spans) == text


@given(st.lists(st.binary(max_size=6), max_size=20))
def test_spans_tile_the_tokens_and_decode_like_the_whole(pieces):
    spans = displayable(pieces)
    assert [token for span in spans for token in range(span.start, span.stop)] == list(range(len(pieces)))
    assert "".join(span.text for span in spans) == b"".join(pieces).decode("utf-8", "replace")


def test_whole_tokens_stay_apart_and_fragments_are_joined():
    panda = "🐼".encode()
    spans = displayable([b"a", b" b", panda[:1], panda[1:3], panda[3:], "中".encode()])
    assert [(span.text, span.stop - span.start) for span in spans] == [
        ("a", 1),
        (" b", 1),
        ("🐼", 3),
        ("中", 1),
    ]


def test_piece_bytes_inverts_the_byte_level_alphabet():
    text = "def f():\n\treturn 'naïve 中文 🐼'\x00\x7f\xad"
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert b"".join(piece_bytes(piece) for piece, _ in pieces) == text.encode()
    assert {piece_bytes(letter) for letter in pre_tokenizers.ByteLevel.alphabet()} == {bytes([b]) for b in range(256)}


def test_piece_bytes_leaves_added_tokens_as_they_are():
    assert piece_bytes("<|endoftext|>") == b"<|endoftext|>"
    assert piece_bytes("<｜end▁of▁sentence｜>").decode() == "<｜end▁of▁sentence｜>"


def test_a_joined_token_shows_its_last_fragment():
    wide = "中".encode()
    gates = torch.arange(4 * 2 * 1).reshape(4, 2, 1) / 10
    view = gate_view(
        [b"x", wide[:2], wide[2:], b"y"],
        gates,
        layers=(1, 3),
        orders=(2, 3),
        source="a file",
        seen=[[0, 0], [1, 0], [2, 3], [4, 5]],
    )
    assert [token.text for token in view.tokens] == ["x", "中", "y"]
    assert [token.joined for token in view.tokens] == [1, 2, 1]
    assert np.allclose(view.tokens[1].gates, gates[2])
    assert view.tokens[0].ngrams == ()
    assert view.tokens[1].ngrams == (Ngram(2, "中", 2), Ngram(3, "x中", 3))
    assert view.tokens[2].ngrams == (Ngram(2, "中y", 4), Ngram(3, "中y", 5))


def test_ngrams_say_where_they_lead_and_who_else_is_there():
    view = gate_view(
        [b"a", b"b"],
        torch.zeros(2, 1, 1),
        layers=(0,),
        orders=(2,),
        source="",
        seen=[[0], [5]],
        rows=[[[1, 2]], [[3, 4]]],
        collides=np.array([[0], [7]]),
    )
    assert view.tokens[1].ngrams == (Ngram(2, "ab", seen=5, rows=(3, 4), collides=7),)
    assert config.from_dict(GateView, config.to_dict(view)) == view
    for line in (
        "2-gram “ab”, seen 5 times",
        "rows 3, 4",
        "shares a row with up to 7 other n-grams of the training text",
    ):
        assert line in gate_section(view)


def test_a_chinese_text_in_bytes_is_shown_in_whole_characters():
    """A byte-level tokenizer without merges cuts every character into three; a canonical vocabulary keeps the parts apart."""
    text = "记忆，memory记忆"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    hashing = HashConfig(orders=(2, 3), heads=2, rows_per_head=997, layers=(1,), pad_id=0)
    vocabulary = CanonicalVocabulary.from_tokenizer(tokenizer, cache=False)
    plan = build_plan(hashing, vocabulary)
    lookup = Lookup(vocabulary, plan, DeviceTable(plan.num_rows, RowFormat(4)))
    memory = replace(tiny.ENGRAM.memory, hash=hashing)
    model = LanguageModel.build(replace(tiny.ENGRAM, vocab_size=len(alphabet), memory=memory)).eval()
    tokens = torch.tensor(tokenizer.encode(text).ids)
    training = Ngrams.of(views(lookup, tokens[None]), plan.vocab_size)
    view = view_of(model, lookup, tokens, pieces_of(tokenizer), training, "")

    assert [token.text for token in view.tokens] == list(text)
    assert [token.joined for token in view.tokens] == [len(letter.encode()) for letter in text]
    last = view.tokens[-1]  # its last byte, with the one and the two before it, which the first 忆 has as well
    assert [(ngram.text, ngram.seen) for ngram in last.ngrams] == [("忆", 2), ("忆", 2)]
    assert last.ngrams == view.tokens[1].ngrams
    ids = lookup.ids(tokens[None])[0][0, -1, 0].tolist()
    assert [ngram.rows for ngram in last.ngrams] == [tuple(ids[:2]), tuple(ids[2:])]
    assert [(ngram.text, ngram.seen) for ngram in view.tokens[4].ngrams] == [("me", 1), ("，me", 1)]


def test_gates_of_another_text_are_refused():
    with pytest.raises(ValueError, match="colours would belong to other tokens"):
        gate_view([b"a", b"b"], torch.zeros(3, 1, 1), layers=(0,), orders=(2,), source="")
    with pytest.raises(ValueError, match="rows must be"):
        gate_view([b"a"], torch.zeros(1, 1, 1), layers=(0,), orders=(2,), source="", rows=[[[1], [2]]])
    with pytest.raises(ValueError, match="seen must be"):
        gate_view([b"a", b"b"], torch.zeros(2, 1, 1), layers=(0,), orders=(2, 3), source="", seen=[[1], [2]])
