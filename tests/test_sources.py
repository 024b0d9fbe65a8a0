"""Every kind of source gives the same documents; what is no text is named."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError, DataError
from engram_lm.train import tokenizer as tokenizer_module
from engram_lm.train.sources import Document, read_documents, standard_library
from engram_lm.train.tokenizer import (
    END_OF_TEXT,
    encode_texts,
    id_limit,
    load_tokenizer,
    separator_id,
    tokenizer_digest,
    train_tokenizer,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may look beyond this machine

TEXTS = ["one\ntwo", "Grüße, 世界 🙂", 'quoted "text"\n']
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))


def texts(source, skipped=None):
    return [document.text for document in read_documents(str(source), skipped)]


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py", ".TXT"])
def test_a_text_file_is_one_document_with_plain_newlines(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", b"\xef\xbb\xbffirst\r\nsecond\n")
    assert list(read_documents(str(path))) == [Document(f"a{suffix}", "first\nsecond\n")]


def compressed(suffix: str, data: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".xz":
        return lzma.compress(data)
    if suffix == ".zst":
        return pytest.importorskip("zstandard").compress(data)
    return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", compressed(suffix, LINES.encode()))
    documents = list(read_documents(str(path)))
    assert [document.text for document in documents] == TEXTS
    assert documents[2].name == f"a.jsonl{suffix}:3"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_every_part_of_a_concatenated_archive_is_read(tmp_path, suffix):
    part = compressed(suffix, LINES.encode())
    assert texts(write(tmp_path / f"a.jsonl{suffix}", part + part)) == TEXTS * 2


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("fault", ["truncated", "overwritten"])
def test_a_damaged_archive_names_the_loss(tmp_path, suffix, fault):
    data = compressed(suffix, b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(20_000)))
    half = len(data) // 2
    damaged = data[:half] if fault == "truncated" else data[:half] + bytes(100) + data[half + 100 :]
    path = write(tmp_path / f"a.jsonl{suffix}", damaged)
    with pytest.raises(DataError, match=r"a\.jsonl.*(later documents would have been lost|not JSON)"):
        texts(path)


def test_parquet_streams_either_column(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for column in ("text", "content"):
        path = tmp_path / f"{column}.parquet"
        parquet.write_table(pa.table({"n": [1, 2, 3], column: TEXTS}), path, row_group_size=2)
        assert texts(path) == TEXTS
    parquet.write_table(pa.table({"title": TEXTS, "n": [1, 2, 3]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no field 'text' or 'content'; it has 'title', 'n'"):
        texts(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "int.parquet")
    with pytest.raises(DataError, match=r"row 0: the text is of type int"):
        texts(tmp_path / "int.parquet")


def test_a_damaged_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        texts(write(tmp_path / "a.parquet", b"PAR1 nonsense"))


def test_a_data_set_is_streamed_from_a_local_directory(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "set" / "train.jsonl", LINES)
    write(tmp_path / "set" / "test.jsonl", json.dumps({"text": "held out"}))
    assert texts(f"hf:{tmp_path / 'set'}") == TEXTS
    assert list(read_documents(f"hf:{tmp_path / 'set'}:test")) == [Document("set:test:0", "held out")]
    with pytest.raises(DataError, match="Available splits"):
        texts(f"hf:{tmp_path / 'set'}:nonsense")
    with pytest.raises(DataError, match="cannot be streamed"):
        texts(f"hf:{tmp_path / 'nothing'}")


def test_a_directory_is_read_in_order_and_only_where_text_belongs(tmp_path):
    for name in ("b.txt", "a/z.py", "a/b.md", "c.jsonl"):
        write(tmp_path / name, json.dumps({"content": name}) if name.endswith("l") else name)
    for name in (
        ".git/x.txt",
        "__pycache__/x.py",
        "lib/site-packages/x.py",
        "node_modules/x.md",
        "x.png",
        ".x.txt",
    ):
        write(tmp_path / name, "not wanted")
    skipped: list[str] = []
    documents = list(read_documents(str(tmp_path), skipped))
    assert [document.name for document in documents] == ["b.txt", "c.jsonl:1", "a/b.md", "a/z.py"]
    assert [document.text for document in documents] == ["b.txt", "c.jsonl", "a/b.md", "a/z.py"]
    assert skipped == []


FAULTS = {
    "empty": (b"", "empty"),
    "blank": (b" \r\n\t", "empty"),
    "binary": (b"ELF\0\0\1", "binary"),
    "latin1": (b"caf\xe9!", "not UTF-8 .byte 0xe9 at 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_text_is_skipped_in_a_directory_and_an_error_alone(tmp_path, fault):
    data, reason = FAULTS[fault]
    path = write(tmp_path / "bad.txt", data)
    with pytest.raises(DataError, match=rf"nothing to train on \(bad\.txt: {reason}"):
        texts(path)
    write(tmp_path / "good.txt", "good")
    skipped: list[str] = []
    assert texts(tmp_path, skipped) == ["good"]
    assert len(skipped) == 1
    assert skipped[0].startswith("bad.txt: ")


def test_empty_and_broken_rows_are_skipped(tmp_path):
    rows = [{"text": ""}, {"text": None}, {"text": "a\0b"}, {"text": "\ud800"}, {"text": "good"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    skipped: list[str] = []
    assert list(read_documents(str(path), skipped)) == [Document("a.jsonl:9", "good")]
    assert [line.split(": ")[0] for line in skipped] == [f"a.jsonl:{n}" for n in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"line 2: not JSON"),
        (b'{"text": "\xff"}', r"line 2: not JSON"),
        (b'["text"]', r"line 2: expected an object"),
        (b'{"body": "x", "id": 1}', r"line 2: no field 'text' or 'content'; it has 'body', 'id'"),
        (b'{"text": 3}', r"line 2: the text is of type int"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        texts(path)


def test_sources_that_cannot_be_read(tmp_path):
    for source in (
        tmp_path / "missing",
        write(tmp_path / "a.docx", "x"),
        tmp_path,
    ):  # no, unknown, no documents
        with pytest.raises(DataError, match=r"Supported: \.txt, .*hf:DATASET"):
            texts(source)


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'engram-lm\[data\]'"):
        texts(write(tmp_path / "a.parquet", "x"))


def test_the_standard_library_is_python_source():
    assert Path(standard_library(), "json", "decoder.py").is_file()


# The tokenizer.

# Hundreds of lines with many equally frequent pairs, so that an order of merges left to chance would show.
CODE = "\n".join(f"def area_{i}(x):\n    return x * {i}  # naïve 面積" for i in range(300)) + "\n"
TOKENIZER = train_tokenizer([CODE], 350)


def test_the_same_text_gives_the_same_tokenizer():
    again = train_tokenizer([CODE], 350)
    assert again.to_str() == TOKENIZER.to_str()
    assert tokenizer_digest(again) == tokenizer_digest(TOKENIZER)
    assert len(tokenizer_digest(again)) == 16
    assert tokenizer_digest(train_tokenizer([CODE], 349)) != tokenizer_digest(TOKENIZER)
    assert id_limit(TOKENIZER) == 350
    assert separator_id(TOKENIZER) == 0


def test_another_process_with_one_thread_trains_the_same_tokenizer(tmp_path):
    script = (
        "import sys; from engram_lm.train.tokenizer import train_tokenizer, tokenizer_digest\n"
        "print(tokenizer_digest(train_tokenizer([open(sys.argv[1], encoding='utf-8').read()], 350)))"
    )
    command = [sys.executable, "-c", script, str(write(tmp_path / "code.py", CODE))]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer_digest(TOKENIZER)


def test_only_the_first_bytes_train_the_tokenizer():
    head = CODE.encode()[:1000].decode(errors="ignore")
    unlike = train_tokenizer([CODE, "zzz qqq " * 99], 300)
    assert train_tokenizer([CODE, "zzz qqq " * 99], 300, max_bytes=1000).to_str() != unlike.to_str()
    assert train_tokenizer([CODE, "zzz"], 300, max_bytes=1000).to_str() == train_tokenizer([head], 300).to_str()


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_any_text_survives_the_round_trip(strings):
    encoded = encode_texts(TOKENIZER, strings)
    assert [TOKENIZER.decode(ids.tolist(), skip_special_tokens=False) for ids in encoded] == strings


def test_the_name_of_a_special_token_is_text():
    (ids,) = encode_texts(TOKENIZER, [f"a{END_OF_TEXT}b"])
    assert 0 not in ids
    assert TOKENIZER.decode(ids.tolist()) == f"a{END_OF_TEXT}b"


def test_a_long_text_has_the_same_tokens_in_pieces(monkeypatch):
    text = CODE + "\n\n   \n\tindented\n" + CODE + "x" * 999
    whole = TOKENIZER.encode(text).ids
    monkeypatch.setattr(tokenizer_module, "PIECE", 100)
    monkeypatch.setattr(tokenizer_module, "PIECES", 7)
    one, two, empty = encode_texts(TOKENIZER, [text, "short", ""])
    assert one.tolist() == whole
    assert two.tolist() == TOKENIZER.encode("short").ids
    assert empty.tolist() == []


def test_a_tokenizer_is_loaded_from_a_file_or_directory_without_truncation(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(TOKENIZER)
    cutting = load_tokenizer(tmp_path / "tokenizer.json")
    cutting.enable_truncation(3)
    cutting.enable_padding(length=9)
    cutting.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == TOKENIZER.to_str()


def test_tokenizers_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_tokenizer(write(tmp_path / "tokenizer.json", "{"))
    with pytest.raises(DataError, match="name of a model on the hub"):
        load_tokenizer("/no/such/tokenizer.json")
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer([CODE], 256)
    with pytest.raises(DataError, match="No text"):
        train_tokenizer([""], 300)


def test_another_tokenizers_separator_is_found_and_none_is_an_error():
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.BPE())
    with pytest.raises(DataError, match="run into one another"):
        separator_id(bare)
    bare.add_special_tokens(["<pad>", "</s>"])
    assert separator_id(bare) == 1
