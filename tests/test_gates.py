import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from engram_lm.analysis.gates import Ngram, count_ngrams, displayable, gate_view
from engram_lm.tokens import piece_bytes


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


def test_gates_of_another_text_are_refused():
    with pytest.raises(ValueError, match="colours would belong to other tokens"):
        gate_view([b"a", b"b"], torch.zeros(3, 1, 1), layers=(0,), orders=(2,), source="")
    with pytest.raises(ValueError, match="seen must be"):
        gate_view([b"a", b"b"], torch.zeros(2, 1, 1), layers=(0,), orders=(2, 3), source="", seen=[[1], [2]])


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(0, 4), max_size=12),
    st.sampled_from([(2,), (2, 3), (4, 1)]),
)
def test_count_ngrams_counts_what_a_loop_counts(training, text, orders):
    def count(end: int, order: int) -> int:
        ngram = text[end - order + 1 : end + 1] if end >= order - 1 else None
        return sum(training[i : i + order] == ngram for i in range(len(training) - order + 1))

    counted = count_ngrams(np.array(training, dtype=np.int64), np.array(text, dtype=np.int64), orders)
    assert counted == [[count(end, order) for order in orders] for end in range(len(text))]


def test_count_ngrams_does_not_overflow_with_a_large_vocabulary():
    ids = np.array([2**31, 2**31 - 1, 2**31, 2**31 - 1, 2**31])
    assert count_ngrams(ids, ids, (4,)) == [[0], [0], [0], [1], [1]]
