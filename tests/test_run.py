"""From text to a run directory and back: nothing is made twice, nothing is mixed up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ENGRAM, WORDS, config, finish, write_texts

from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.model.lookup import build_plan, build_vocabulary
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.loader import Loader, LoaderState
from engram_lm.train.loop import Training
from engram_lm.train.run import beside, build_lookup, fit_vocabulary, load_run, prepare_text
from engram_lm.train.tokenizer import tokenizer_digest, train_tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def prepare(source: object, directory: Path, **options):
    said: list[str] = []
    data, tokenizer = prepare_text(str(source), directory, vocab_size=280, say=said.append, **options)
    return data, tokenizer, said


def trained(directory: Path, texts: Path, shared: bool = False) -> Training:
    """A finished run; its text in its own directory or, shared, one above."""
    data, tokenizer, _ = prepare(texts, directory.parent if shared else directory)
    settings = fit_vocabulary(config(ENGRAM), tokenizer)
    batches = Loader(data.train, settings.batch_size, settings.length)
    facts = {"tokenizer_digest": tokenizer_digest(tokenizer)}
    return finish(Training(settings, directory, batches, build_lookup(settings, tokenizer, directory), facts=facts))


# --- text ---------------------------------------------------------------------------------------------------


def test_text_is_prepared_once(tmp_path, texts):
    data, tokenizer, said = prepare(texts, tmp_path)
    assert [line.split()[0] for line in said] == ["Training", "Tokenizing"]
    assert data.meta.tokenizer == tokenizer_digest(tokenizer)
    again, same, said = prepare(texts, tmp_path)
    assert said == []
    assert tokenizer_digest(same) == tokenizer_digest(tokenizer)
    assert again.meta == data.meta
    assert prepare("", tmp_path)[0].meta == data.meta  # a resumed run need not name its text


@pytest.mark.parametrize("name", ["tokenizer.json", "shards/meta.json", "shards/train.bin"])
def test_what_a_kill_left_out_is_made_again(tmp_path, texts, name):
    """The tokenizer is written last, and whole."""
    data, tokenizer, _ = prepare(texts, tmp_path)
    (tmp_path / name).unlink()
    if name == "shards/train.bin":
        with pytest.raises(DataError, match=r"train\.bin: missing"):
            prepare(texts, tmp_path)
        return
    again, same, said = prepare(texts, tmp_path)
    assert len(said) == 2
    assert tokenizer_digest(same) == tokenizer_digest(tokenizer)
    assert again.meta == data.meta


def test_files_without_text_are_told(tmp_path, texts):
    (tmp_path / "in").mkdir()
    for path in texts.iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "binary.txt").write_bytes(b"\x00\xff" * 50)
    said = prepare(tmp_path / "in", tmp_path / "out")[2]
    assert "Skipped 1 files" in said[-1]
    assert "binary.txt" in said[-1]


def test_another_text_is_refused(tmp_path, texts):
    prepare(texts, tmp_path)
    with pytest.raises(DataError, match=f"holds the tokens of {texts}, not of elsewhere; choose another --out"):
        prepare("elsewhere", tmp_path)


def test_a_tokenizer_may_be_given_and_then_only_the_same_one(tmp_path, texts):
    given = train_tokenizer(WORDS * 9, 300)
    given.save(str(tmp_path / "given.json"))
    train_tokenizer(["other words"] * 9, 270).save(str(tmp_path / "other.json"))
    _, found, said = prepare(texts, tmp_path / "run", tokenizer=str(tmp_path / "given.json"))
    assert tokenizer_digest(found) == tokenizer_digest(given)
    assert len(said) == 1
    prepare(texts, tmp_path / "run", tokenizer=str(tmp_path / "given.json"))
    with pytest.raises(MismatchError, match=r"holds tokens of another tokenizer than .*other\.json"):
        prepare(texts, tmp_path / "run", tokenizer=str(tmp_path / "other.json"))


def test_no_text_at_all(tmp_path):
    with pytest.raises(DataError, match="holds no text yet: name a source with --data"):
        prepare("", tmp_path)
    with pytest.raises(DataError, match="nothing-there"):
        prepare(tmp_path / "nothing-there", tmp_path / "run")


def test_the_vocabulary_fits_the_tokenizer(tmp_path, texts):
    _, tokenizer, _ = prepare(texts, tmp_path)
    fitted = fit_vocabulary(config(ENGRAM), tokenizer)
    assert fitted.model.vocab_size == tokenizer.get_vocab_size()
    assert replace(fitted.model, vocab_size=ENGRAM.vocab_size) == ENGRAM


# --- back to a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_loads_as_it_was_left(tmp_path, texts, shared):
    run = trained(tmp_path / "run", texts, shared)
    loaded = load_run(tmp_path / "run", "cpu")
    assert loaded.step == 6
    assert loaded.config == run.config
    assert not loaded.model.training
    batch, _ = run.batches.next(LoaderState())
    with torch.no_grad():
        one, other = (
            part.model.loss(batch.tokens, batch.targets, part.lookup.rows(batch.tokens)[0]) for part in (run, loaded)
        )
    assert torch.equal(one, other)
    ids = torch.arange(run.lookup.table.num_rows)
    assert torch.equal(loaded.lookup.table.fetch(ids), run.lookup.table.fetch(ids))
    assert beside(tmp_path / "run", "shards").is_dir()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match="holds no checkpoint: it is not a run directory, or the run has not saved"
    ):
        load_run(tmp_path)


def test_a_run_without_its_tokenizer_is_refused(tmp_path, texts):
    trained(tmp_path / "run", texts)
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"without a tokenizer\.json"):
        load_run(tmp_path / "run")


def test_a_run_with_another_tokenizer_is_refused(tmp_path, texts):
    trained(tmp_path / "run", texts)
    train_tokenizer(["other words"] * 9, 270).save(str(tmp_path / "run" / "tokenizer.json"))
    with pytest.raises(MismatchError, match=r"was trained with tokenizer .*every token would mean another string"):
        load_run(tmp_path / "run")


def test_a_run_whose_addresses_moved_is_refused(tmp_path, texts, monkeypatch):
    """As they would if the rules of folding changed between two versions."""
    trained(tmp_path / "run", texts)
    moved = lambda tokenizer: CanonicalVocabulary.identity(tokenizer.get_vocab_size())  # noqa: E731
    monkeypatch.setattr(CanonicalVocabulary, "from_tokenizer", moved)
    with pytest.raises(
        MismatchError, match=r"address digest is .* every memory row would be read from the wrong place"
    ):
        load_run(tmp_path / "run")


def test_a_damaged_run_is_refused(tmp_path, texts):
    trained(tmp_path / "run", texts)
    newest = tmp_path / "run" / "checkpoints" / "step-000006"
    (newest / "facts.json").write_text(json.dumps({"step": 6}))
    with pytest.raises(CheckpointError, match=r"facts\.json"):
        load_run(tmp_path / "run")


# --- addresses ----------------------------------------------------------------------------------------------


def test_the_pad_is_a_token_of_the_tokenizer(texts, tmp_path):
    _, tokenizer, _ = prepare(texts, tmp_path)
    vocabulary = build_vocabulary(HashConfig(), tokenizer)
    token = next(token for token, folded in enumerate(vocabulary.lookup) if folded != token)
    assert build_plan(HashConfig(pad_id=token), vocabulary).pad == vocabulary.lookup[token]
    raw = build_vocabulary(HashConfig(scheme="ple"), tokenizer)
    assert build_plan(HashConfig(pad_id=token, scheme="ple"), raw).pad == token
    for outside in (-1, tokenizer.get_vocab_size()):
        with pytest.raises(ConfigError, match=f"pad id {outside} lies outside"):
            build_plan(HashConfig(pad_id=outside), vocabulary)
