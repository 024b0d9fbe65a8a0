"""The command line as a person types it: help that teaches, text to text, errors that show the way."""

import json
import sys
from pathlib import Path

import pytest
from tiny import copy, write_texts

from engram_lm.cli import main
from engram_lm.config import to_json
from engram_lm.errors import EngramError
from engram_lm.model.presets import PRESETS
from engram_lm.train.checkpoint import Checkpoint, latest
from engram_lm.train.loop import TrainConfig, read_metrics
from engram_lm.train.tokenizer import encode_texts, load_tokenizer

COMMANDS = ("quickstart", "train", "eval", "generate", "count")
SMALL = (
    "--model.vocab-size 280 --model.dim 16 --model.layers 2 --model.ffn-width 24 "
    "--model.memory.hash.rows-per-head 97 --steps 4 --batch-size 2 --length 8 --optim.lr 0.01 "
    "--threads 1 --device cpu --precision float32"
)


def call(*arguments: object) -> int:
    """The exit code of `engram-lm ARGUMENTS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["engram-lm", *map(str, arguments)])
        patch.setenv("COLUMNS", "500")
        patch.setenv("TERM", "dumb")
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture
def engram(capfd):
    """Calls the command; returns its exit code and all that it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        code = call(*arguments)
        output, errors = capfd.readouterr()
        assert "Traceback" not in errors
        return code, output + errors

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, texts) -> Path:
    """A finished run."""
    directory = tmp_path_factory.mktemp("run") / "one"
    assert call("train", "tiny", "--data", texts, "--out", directory, *SMALL.split()) == 0
    return directory


# --- help ---------------------------------------------------------------------------------------------------


def test_help_names_every_command_with_an_example(engram):
    code, said = engram("--help")
    assert code == 0
    for command in COMMANDS:
        assert f"engram-lm {command}" in said
    assert "engram-lm COMMAND --help" in said


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "quickstart",
            (
                "without a download",
                "--data",
                "--budget {short,standard,long}",
                "--out",
                "--seed",
                "report.html",
            ),
        ),
        (
            "train",
            (
                "--data",
                ".jsonl",
                "hf:DATASET",
                "--resume",
                "--steps",
                "--model.dim",
                "--optim.lr",
                "bit-identically",
            ),
        ),
        ("eval", ("held-out", "95 % interval", "--data", "Run directory")),
        ("generate", ("--prompt", "--temperature", "--top-k", "--max-new-tokens", "Run directory")),
        ("count", ("FLOPs", "Preset or configuration file", "--context")),
    ],
)
def test_help_teaches(engram, command, words):
    code, said = engram(command, "--help")
    assert code == 0
    for word in words:
        assert word in said


def test_the_help_of_train_shows_the_presets_own_values(engram):
    tiny, small = engram("train", "tiny", "--help")[1], engram("train", "small", "--help")[1]
    assert "(default: 128)" in tiny
    assert "(default: 768)" in small


@pytest.mark.parametrize(
    "arguments", [(), ("bogus",), ("train", "tiny", "--bogus", "1"), ("train", "tiny", "--steps", "x")]
)
def test_what_is_no_command_is_a_usage_error(engram, arguments):
    assert engram(*arguments)[0] == 2


# --- from text to text --------------------------------------------------------------------------------------


def test_training_leaves_a_run_with_every_override(run):
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["dim"] == 16
    assert config["model"]["vocab_size"] <= 280
    assert config["model"]["memory"]["hash"]["rows_per_head"] == 97
    assert config["optim"]["lr"] == 0.01
    assert config["steps"] == 4
    assert config["model"]["attention"]["heads"] == PRESETS["tiny"].attention.heads  # what was not overridden
    assert Checkpoint(latest(run / "checkpoints")).facts["step"] == 4
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"val_loss", "bits_per_byte"} <= lines[-1].keys()


def test_training_ends_with_the_held_out_loss(engram, texts, tmp_path):
    code, said = engram("train", "tiny", "--data", texts, "--out", tmp_path / "run", *SMALL.split())
    assert code == 0
    loss = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["val_loss"]
    assert f"{loss:.4f}" in said
    assert "nats a token" in said
    assert "bits a byte" in said


def test_evaluation_repeats_the_held_out_loss(engram, run, texts):
    code, said = engram("eval", run)
    assert code == 0
    assert f"{read_metrics(run / 'metrics.jsonl')[-1]['val_loss']:.4f}" in said
    assert "step 4" in said


def test_evaluation_on_other_text_counts_all_of_it(engram, run, tmp_path):
    texts = ["the quick brown fox " * 30, "looks up what it has seen " * 30, "the lazy dog jumps over " * 30]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    code, said = engram("eval", run, "--data", tmp_path)
    assert code == 0
    tokens = sum(map(len, encode_texts(load_tokenizer(run / "tokenizer.json"), texts)))
    assert f"({tokens:,} tokens, " in said


def test_generation_continues_the_prompt(engram, run):
    said = [
        engram("generate", run, "--prompt", "the quick", "--max-new-tokens", 12, "--seed", seed) for seed in (0, 0, 1)
    ]
    assert all(code == 0 and text.startswith("the quick") for code, text in said)
    assert said[0] == said[1]
    assert said[0] != said[2]
    greedy = [engram("generate", run, "--temperature", 0, "--max-new-tokens", 5, "--seed", seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    assert engram("generate", run, "--prompt", "größer 语言 🧠", "--max-new-tokens", 3)[1].startswith("größer 语言 🧠")


def test_a_finished_run_resumes_to_the_same(engram, run):
    before = read_metrics(run / "metrics.jsonl")
    code, said = engram("train", "--resume", "--out", run)
    assert code == 0
    assert f"{before[-1]['val_loss']:.4f}" in said
    assert read_metrics(run / "metrics.jsonl") == before


@pytest.mark.parametrize("where", ["--out=runs/train", ""])  # without it, where runs go by default
def test_resuming_finds_the_run(engram, run, tmp_path, monkeypatch, where):
    copy(run, tmp_path / "runs" / "train")
    monkeypatch.chdir(tmp_path)
    assert engram("train", "--resume", *where.split())[0] == 0


def test_a_run_trains_from_its_own_configuration_file(engram, run, texts, tmp_path):
    code, _ = engram("train", run / "config.json", "--data", texts, "--out", tmp_path / "again")
    assert code == 0
    losses = [
        [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]
        for directory in (run, tmp_path / "again")
    ]
    assert losses[0] == losses[1]


# --- counting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_counting_says_what_a_model_is_made_of(engram, preset):
    code, said = engram("count", preset)
    assert code == 0
    for word in ("parameters", "active parameters", "FLOPs a token", "attention"):
        assert word in said
    assert ("table bytes read a token" in said) == (PRESETS[preset].memory is not None)


def test_a_file_is_counted_like_its_preset(engram, tmp_path):
    (tmp_path / "tiny.json").write_text(to_json(TrainConfig(model=PRESETS["tiny"])))
    assert engram("count", tmp_path / "tiny.json") == engram("count", "tiny")


# --- errors -------------------------------------------------------------------------------------------------


def refused(answer: tuple[int, str], *words: str) -> None:
    code, said = answer
    assert code == 1
    for word in words:
        assert word in said


def test_an_unknown_preset_names_the_nearest(engram):
    refused(engram("count", "engram-27"), "'engram-27'", "Did you mean 'engram-27b'?")
    refused(engram("train", "tinny", "--data", "x"), "'tinny'", "Did you mean 'tiny'?", "dense-4b")


def test_training_nothing_names_the_presets(engram):
    refused(engram("train", "--data", "x"), "tiny", "small", "engram-lm train tiny")


def test_an_unknown_key_in_a_file_names_the_nearest(engram, tmp_path):
    path = tmp_path / "run.json"
    data = json.loads(to_json(TrainConfig(model=PRESETS["tiny"])))
    data["optim"]["warmpu"] = data["optim"].pop("warmup")
    path.write_text(json.dumps(data))
    refused(engram("train", path, "--data", "x"), "run.json.optim", "unknown key 'warmpu'", "mean 'warmup'")
    path.write_text("{")
    refused(engram("count", path), "run.json", "not a JSON file")
    refused(engram("count", tmp_path / "none.json"), "none.json", "No such file")


def test_settings_that_cannot_be_are_refused(engram, texts, tmp_path):
    refused(engram("train", "tiny", "--data", texts, "--out", tmp_path, "--steps", 0), "steps must be at least 1")


def test_text_that_is_not_there_is_named(engram, tmp_path):
    refused(
        engram("train", "tiny", "--data", tmp_path / "none", "--out", tmp_path / "run"),
        str(tmp_path / "none"),
    )
    refused(engram("train", "tiny", "--out", tmp_path / "run"), "name a source with --data")


def test_a_text_shorter_than_a_batch_says_so(engram, tmp_path):
    (tmp_path / "short.txt").write_text("the quick brown fox " * 20)
    arguments = (
        "train",
        "tiny",
        "--data",
        tmp_path / "short.txt",
        "--out",
        tmp_path / "run",
        *SMALL.split(),
        "--length",
        512,
    )
    refused(engram(*arguments), "one batch needs 1,025")


def test_what_is_no_run_is_named(engram, tmp_path):
    for command in ("eval", "generate"):
        refused(engram(command, tmp_path), str(tmp_path), "holds no checkpoint")
    refused(engram("train", "--resume", "--out", tmp_path), str(tmp_path / "config.json"))


def test_a_run_is_never_overwritten(engram, run, texts):
    before = Checkpoint(latest(run / "checkpoints")).facts
    arguments = ("train", "tiny", "--data", texts, "--out", run, *SMALL.split())
    refused(engram(*arguments), "already holds a run, which would be overwritten", "--resume", "--out")
    refused(engram(*arguments, "--resume", "--steps", 8), "steps: 4 then, 8 now")
    assert Checkpoint(latest(run / "checkpoints")).facts == before


def test_a_damaged_run_is_refused(engram, run, tmp_path):
    damaged = copy(run, tmp_path / "run")
    path = latest(damaged / "checkpoints") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for command in (("eval", damaged), ("generate", damaged), ("train", "--resume", "--out", damaged)):
        refused(engram(*command), "model.safetensors", "truncated or altered")


def test_impossible_sampling_is_refused(engram, run):
    refused(engram("generate", run, "--temperature", -1), "temperature -1.0")


def test_an_error_is_printed_to_the_letter(engram, monkeypatch):
    """Square brackets are no markup: `pip install 'engram-lm[data]'` must arrive whole."""

    def fail(name):
        raise EngramError("pip install 'engram-lm[data]' for [/tmp/x]")

    monkeypatch.setattr("engram_lm.cli.get_preset", fail)
    refused(engram("count", "tiny"), "pip install 'engram-lm[data]' for [/tmp/x]")
