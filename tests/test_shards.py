"""Shards hold every document once, on its own side, and say so when they no longer do."""

import json
import resource
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.train import shards as shards_module
from engram_lm.train.shards import open_shards, split_in_memory, write_shards
from engram_lm.train.sources import Document
from engram_lm.train.tokenizer import tokenizer_digest, train_tokenizer

WORDS = [f"word{i} is {i * i}, naïve\n" for i in range(200)]
TOKENIZER = train_tokenizer(WORDS, 300)


def corpus(count: int, length: int = 3) -> list[Document]:
    return [Document(f"{i}.txt", "".join(WORDS[(i + j) % 200] for j in range(length))) for i in range(count)]


def documents_of(split) -> list[str]:
    """The texts of a split, each after its separator."""
    pieces = np.split(split.tokens, split.starts[1:])
    assert all(piece[0] == 0 and 0 not in piece[1:] for piece in pieces)
    return [TOKENIZER.decode(piece[1:].tolist()) for piece in pieces]


def files(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


COMPLETE = ["meta.json", "train.bin", "train.docs.npy", "val.bin", "val.docs.npy"]


def test_a_split_in_memory_holds_every_document_in_order():
    documents = corpus(40)
    split = split_in_memory(iter(documents), TOKENIZER)
    assert documents_of(split) == [document.text for document in documents]
    assert split.bytes.tolist() == [len(document.text.encode()) for document in documents]


def test_every_document_comes_back_on_one_side(tmp_path):
    documents = corpus(500)
    seen: list[int] = []
    data = write_shards(documents, TOKENIZER, tmp_path / "d", source="words", held_out=0.1, progress=seen.append)
    train, val = documents_of(data.split("train")), documents_of(data.split("val"))
    assert sorted(train + val) == sorted(document.text for document in documents)
    assert 20 <= len(val) <= 80
    for split, its_texts in ((data.train, train), (data.val, val)):
        assert split.bytes.tolist() == [len(text.encode()) for text in its_texts]
        assert split.tokens.dtype == np.uint16
        predicted = len(split.tokens) - len(its_texts)
        assert split.tokens_per_byte == pytest.approx(predicted / len("".join(its_texts).encode()))
    assert files(tmp_path / "d") == COMPLETE
    assert seen == sorted(seen)
    assert seen[-1] == data.meta.train.tokens + data.meta.val.tokens
    assert (data.meta.source, data.meta.tokenizer) == ("words", tokenizer_digest(TOKENIZER))


def test_a_document_stays_on_its_side_whatever_comes_with_it(tmp_path):
    few = write_shards(corpus(300), TOKENIZER, tmp_path / "few", held_out=0.1)
    many = write_shards(reversed(corpus(600)), TOKENIZER, tmp_path / "many", held_out=0.1)
    assert set(documents_of(few.val)) <= set(documents_of(many.val))


def test_batches_do_not_change_what_is_written(tmp_path, monkeypatch):
    whole = write_shards(corpus(100), TOKENIZER, tmp_path / "whole", held_out=0.1)
    monkeypatch.setattr(shards_module, "BATCH", 50)
    small = write_shards(iter(corpus(100)), TOKENIZER, tmp_path / "small", held_out=0.1)
    assert whole.meta == small.meta


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 30), st.sampled_from([0.02, 0.1, 0.5]))
def test_few_documents_are_cut_at_the_end_and_nothing_is_lost(tmp_path_factory, count, length, held_out):
    documents = corpus(count, length)
    data = write_shards(documents, TOKENIZER, tmp_path_factory.mktemp("few"), held_out=held_out)
    train, val = documents_of(data.train), documents_of(data.val)
    assert all(train)
    assert all(val)
    total = data.meta.train.tokens + data.meta.val.tokens
    assert held_out / 4 <= data.meta.val.tokens / total <= held_out * 4 or data.meta.val.tokens <= 5
    assert len(train) + len(val) in (count, count + 1)
    assert sum(data.train.bytes) + sum(data.val.bytes) == sum(len(d.text.encode()) for d in documents)
    joined = "".join(train) + "".join(val)
    assert sorted(joined) == sorted("".join(document.text for document in documents))
    if count == 1:
        assert joined == documents[0].text
        assert data.val.bytes.tolist() == [len(val[0].encode())]


def test_max_tokens_cuts_the_last_document(tmp_path):
    full = write_shards(corpus(50), TOKENIZER, tmp_path / "full", held_out=0.2)
    cut = write_shards(corpus(50), TOKENIZER, tmp_path / "cut", held_out=0.2, max_tokens=777)
    assert cut.meta.train.tokens + cut.meta.val.tokens == 777
    for short, long in ((cut.train, full.train), (cut.val, full.val)):
        assert np.array_equal(short.tokens, long.tokens[: len(short.tokens)])
        assert short.bytes.tolist() == [len(text.encode()) for text in documents_of(short)]


def test_a_corpus_without_end_is_read_only_as_far_as_needed(tmp_path):
    def endless():
        while True:
            yield from corpus(100, 3000)

    data = write_shards(endless(), TOKENIZER, tmp_path, max_tokens=1000)
    assert data.meta.train.tokens + data.meta.val.tokens == 1001  # one document, cut in two: two separators


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    vocabulary = {"<|endoftext|>": 0, "a": 70_000, "b": 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    data = write_shards([Document("x", "abba" * 50)], tokenizer, tmp_path)
    assert data.train.tokens.dtype == np.uint32
    assert data.train.tokens[:5].tolist() == [0, 70_000, 1, 1, 70_000]
    assert data.meta.vocab_size == 70_001


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("fault", [flip_a_byte, truncate, lambda path: path.unlink()])
def test_damage_to_any_file_is_noticed(tmp_path, name, fault):
    write_shards(corpus(100), TOKENIZER, tmp_path, source="x" * 999)  # so that the flip in meta.json hits the source
    if name == "meta.json" and fault is flip_a_byte:
        meta = json.loads((tmp_path / name).read_text())
        meta["train"]["tokens"] += 1
        (tmp_path / name).write_text(json.dumps(meta))
    else:
        fault(tmp_path / name)
    with pytest.raises(DataError, match=r"[Ww]rite the shards again|must be written first"):
        open_shards(tmp_path)


def test_a_quick_open_still_notices_a_cut_file(tmp_path):
    write_shards(corpus(100), TOKENIZER, tmp_path)
    truncate(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"val\.bin: .* bytes long instead of"):
        open_shards(tmp_path, verify=False)


def test_another_tokenizer_is_refused(tmp_path):
    write_shards(corpus(100), TOKENIZER, tmp_path)
    assert open_shards(tmp_path, tokenizer_digest(TOKENIZER)).train.tokens[0] == 0
    with pytest.raises(MismatchError, match="every token would mean another string"):
        open_shards(tmp_path, tokenizer_digest(train_tokenizer(WORDS, 290)))


def test_a_failing_source_leaves_the_old_shards(tmp_path):
    write_shards(corpus(100), TOKENIZER, tmp_path, source="old")

    def failing():
        yield from corpus(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), TOKENIZER, tmp_path, source="new")
    assert files(tmp_path) == COMPLETE
    assert open_shards(tmp_path).meta.source == "old"


def test_a_full_disk_leaves_the_old_shards(tmp_path):
    write_shards(corpus(100), TOKENIZER, tmp_path, source="old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow beyond 10 kB
    try:
        with pytest.raises(DataError, match=r"cannot be written .*Free some space"):
            write_shards(corpus(2000), TOKENIZER, tmp_path, source="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert files(tmp_path) == COMPLETE
    assert open_shards(tmp_path).meta.source == "old"


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "train.bin").write_bytes(b"half")
    with pytest.raises(DataError, match="must be written first"):
        open_shards(tmp_path)
    write_shards(corpus(100), TOKENIZER, tmp_path)
    assert files(tmp_path) == COMPLETE


@pytest.mark.parametrize("documents", [[], [Document("a", "x")], [Document("a", "")] * 9])
def test_too_little_text(tmp_path, documents):
    with pytest.raises(DataError, match="too few to hold some out"):
        write_shards(documents, TOKENIZER, tmp_path)
    assert files(tmp_path) == []


def test_impossible_requests(tmp_path):
    for request in ({"held_out": 0.0}, {"held_out": 1.0}, {"max_tokens": 3}):
        with pytest.raises(ConfigError, match="a split would be empty"):
            write_shards(corpus(10), TOKENIZER, tmp_path, **request)
    with pytest.raises(DataError, match="none of the tokens"):
        write_shards(corpus(10), Tokenizer(models.BPE()), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_shards(corpus(10), TOKENIZER, tmp_path / "file")
