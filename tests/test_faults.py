"""Whatever ends a run, nothing is lost: kills, Ctrl-C, a full disk, NaN, damage, the wrong directory."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    BASE,
    ENGRAM,
    EVERYTHING,
    assert_same,
    config,
    copy,
    exit_code,
    finish,
    killed_at,
    lookup_of,
    outcome,
    run_in_process,
    split,
    training,
    watch_file_operations,
    write_texts,
)

from engram_lm.errors import CheckpointError, MismatchError, TrainingError
from engram_lm.model.lookup import Lookup
from engram_lm.tables import DeviceTable, RowFormat, TableConfig
from engram_lm.train import checkpoint as checkpoints
from engram_lm.train.checkpoint import Checkpoint, latest
from engram_lm.train.loader import Loader
from engram_lm.train.loop import TrainConfig, Training, train

KILLS = int(os.environ.get("ENGRAM_KILLS", "4"))  # of each kind; 20 is the bar
SETTINGS = config(EVERYTHING, steps=5, checkpoint_every=1, keep_checkpoints=2)
ON_DISK = replace(  # a cache that must evict, and a journal that is applied at every checkpoint
    SETTINGS, table=TableConfig("disk", "fp8_e8m0", memory=2e-6, journal=0.0)
)
TIERS = {"memory": SETTINGS, "disk": ON_DISK}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    finish(training(directory, SETTINGS))
    return directory


@pytest.fixture(scope="module", params=TIERS)
def tier(request, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """Settings for a table in memory and for one on disk, and a run of each that nothing happened to."""
    settings, directory = TIERS[request.param], tmp_path_factory.mktemp(request.param)
    finish(training(directory, settings))
    return settings, directory


# --- kill -9 ------------------------------------------------------------------------------------------------


def counted(directory: str, settings: TrainConfig, answer) -> None:
    """Train to the end and say how many file operations that took."""

    def note() -> None:
        answer.value += 1

    watch_file_operations(note)
    run_in_process(directory, settings)


def test_killed_before_any_file_operation_a_run_ends_the_same(tmp_path, processes, tier):
    """Each run is killed twice: before an operation on a file, and again after it was resumed."""
    settings, whole = tier
    total = processes.Value("i", 0)
    assert exit_code(processes, counted, str(tmp_path / "counted"), settings, total) == 0
    assert total.value > 100
    rng = random.Random(0)
    share = range(0, total.value, -(-total.value // KILLS))  # spread, so that every kind of moment is met
    for kill, first in enumerate(share):
        directory = tmp_path / str(kill)
        numbers = (
            rng.randint(first + 1, min(first + share.step, total.value)),
            rng.randint(1, total.value // 2),
        )
        for number in numbers:
            code = exit_code(processes, killed_at, number, run_in_process, str(directory), settings)
            assert code in (0, -signal.SIGKILL)
            for path in checkpoints.checkpoints(directory / "checkpoints"):
                Checkpoint(path)  # is whole
        finish(training(directory, settings, resume=True))
        assert_same(outcome(directory), outcome(whole))
        names = sorted(path.name for path in (directory / "checkpoints").iterdir())
        assert names == ["step-000004", "step-000005"]


def test_killed_at_any_time_a_run_ends_the_same(tmp_path, processes, tier):
    settings, whole = tier
    rng = random.Random(1)
    for _ in range(KILLS):
        process = processes.Process(target=run_in_process, args=(str(tmp_path), settings))
        process.start()
        process.join(rng.uniform(0.02, 0.3))
        process.kill()
        process.join()
    finish(training(tmp_path, settings, resume=True))
    assert_same(outcome(tmp_path), outcome(whole))


def test_killed_before_the_first_checkpoint_a_run_begins_again(tmp_path):
    run = training(tmp_path, config(checkpoint_every=0))
    run.step()
    run.claim.close()  # what a kill leaves: no checkpoint
    other = config(checkpoint_every=0, steps=3)
    finish(training(tmp_path, other, resume=True))
    finish(training(tmp_path.with_name("fresh"), other))
    assert_same(outcome(tmp_path), outcome(tmp_path.with_name("fresh")))
    assert '"steps": 3' in (tmp_path / "config.json").read_text()


def test_a_run_that_lost_its_config_file_still_resumes(tmp_path, whole):
    copy(whole, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"already holds a run"):
        training(tmp_path / "run", SETTINGS)
    assert finish(training(tmp_path / "run", SETTINGS, resume=True)).done_steps == 5


# --- Ctrl-C -------------------------------------------------------------------------------------------------


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_on_the_command_line(tmp_path):
    texts, out = write_texts(tmp_path / "texts"), tmp_path / "run"
    metrics = out / "metrics.jsonl"
    options = "--model.vocab-size 280 --model.dim 16 --model.layers 2 --model.ffn-width 16 --steps 100000"
    options += " --batch-size 2 --length 8 --threads 1 --device cpu"
    begin = ["train", "tiny", "--data", str(texts), "--out", str(out), *options.split()]
    resume = ["train", "--resume", "--out", str(out)]
    steps = 0
    for arguments in (begin, resume):
        process = subprocess.Popen(
            [sys.executable, "-m", "engram_lm", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda at=steps: metrics.exists() and metrics.read_text().count('"loss"') > at + 2, process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        said = " ".join(output.split())
        assert f"engram-lm train --resume --out {out}".replace(" ", "") in said.replace(" ", "")
        newest = latest(out / "checkpoints")
        assert newest is not None
        assert Checkpoint(newest).facts["step"] > steps
        steps = Checkpoint(newest).facts["step"]
        assert steps == metrics.read_text().count('"loss"')


# --- a loss that is not finite ------------------------------------------------------------------------------


def poison(run: Training) -> None:
    with torch.no_grad():
        run.model.embedding.weight[:] = float("nan")


def test_nan_stops_the_run_and_the_last_checkpoint_is_good(tmp_path):
    settings = config(steps=5)
    finish(training(tmp_path / "whole", settings))
    run = training(tmp_path / "run", settings)
    for _ in range(3):
        run.step()
    rows = run.lookup.table.rows.clone()
    healthy = [parameter.clone() for parameter in run.model.blocks.parameters()]
    poison(run)
    with pytest.raises(
        TrainingError, match=r"run, step 4: the loss is nan .*last good checkpoint is .*step-000002.*Lower"
    ):
        train(run)
    assert torch.equal(rows, run.lookup.table.rows)
    assert all(map(torch.equal, healthy, run.model.blocks.parameters()))
    assert run.done_steps == 3
    assert latest(tmp_path / "run" / "checkpoints").name == "step-000002"
    finish(training(tmp_path / "run", settings, resume=True))
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_nan_before_the_first_checkpoint(tmp_path):
    run = training(tmp_path, config())
    poison(run)
    with pytest.raises(TrainingError, match=r"step 1: .*There is no checkpoint yet\."):
        run.step()
    run.close()


def test_a_learning_rate_that_explodes(tmp_path):
    run = training(tmp_path, config(optim=replace(config().optim, lr=1e30), steps=12))
    with pytest.raises(TrainingError, match=r"Lower --optim\.lr"):
        train(run)
    assert all(line["loss"] == line["loss"] < float("inf") for line in run.metrics.lines)
    kept = latest(tmp_path / "checkpoints")
    for tensor in Checkpoint(kept).part("model").values() if kept else ():
        assert tensor.isfinite().all()


# --- a full disk --------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch):
    finish(training(tmp_path / "whole", config()))
    run = training(tmp_path / "run", config())
    for _ in range(3):
        run.step()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(CheckpointError, match=r"step-000004: .*No space left.*step-000002, is intact"):
            train(run)
    assert train(training(tmp_path / "run", config(), resume=True))
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_files_that_are_written_again_survive_a_full_disk(tmp_path, monkeypatch, name):
    finish(training(tmp_path, config(checkpoint_every=0)))
    if name == "config.json":  # as after a kill before the first checkpoint: this file is written again
        shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / name).read_text()

    def truncated(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode()[:10])
        if path.name.startswith(name):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", truncated)
        with pytest.raises(CheckpointError, match=f"{name}: cannot be written .*No space left"):
            training(tmp_path, config(checkpoint_every=0), resume=True)
    assert (tmp_path / name).read_text() == before
    training(tmp_path, config(checkpoint_every=0), resume=True).close()


# --- the wrong directory ------------------------------------------------------------------------------------


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path):
    run = training(tmp_path, config())
    run.step()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
            training(tmp_path, config(), resume=resume)
    finish(run)
    assert outcome(tmp_path)["step"] == 6


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path, whole):
    copy(whole, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"already holds a run, which would be overwritten\. Add --resume"):
        training(tmp_path / "run", SETTINGS)
    assert_same(outcome(tmp_path / "run"), outcome(whole))
    training(tmp_path / "run", SETTINGS, resume=True).close()  # the refusal let go of the directory


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (config(steps=8), r"\(steps: 6 then, 8 now\)"),
        (config(optim=replace(config().optim, lr=1e-4)), r"\(optim\.lr: 0\.005 then, 0\.0001 now\)"),
        (config(BASE), r"\(model\.memory: .*'rows_per_head': 97.* then, None now\)"),
        (config(replace(ENGRAM, dim=32), seed=2), r"\(model\.dim: 16 then, 32 now; seed: 0 then, 2 now\)"),
        (
            config(replace(ENGRAM, memory=replace(ENGRAM.memory, hash=replace(ENGRAM.memory.hash, orders=(2, 4))))),
            r"\(model\.memory\.hash\.orders: \[2, 3\] then, \[2, 4\] now\)",
        ),
    ],
)
def test_another_configuration_is_refused(tmp_path, changed, message):
    finish(training(tmp_path, config()))
    before = outcome(tmp_path)
    with pytest.raises(MismatchError, match=f"step-000006: was trained with another configuration {message}"):
        training(tmp_path, changed, resume=True)
    assert_same(outcome(tmp_path), before)
    training(tmp_path, config(), resume=True).close()


def test_another_tokenizer_is_refused(tmp_path):
    finish(training(tmp_path, config(), facts={"tokenizer_digest": "one"}))
    with pytest.raises(MismatchError, match=r"tokenizer digest is one, this run's is two.*every token would mean"):
        training(tmp_path, config(), facts={"tokenizer_digest": "two"}, resume=True)


def test_another_plan_is_refused(tmp_path):
    finish(training(tmp_path, config()))
    known = lookup_of(ENGRAM)
    other = Lookup(
        known.vocabulary,
        replace(known.plan, multipliers=known.plan.multipliers + 2),
        DeviceTable(known.plan.num_rows, RowFormat(4)),
    )
    with pytest.raises(MismatchError, match=r"address digest is .*every memory row would be read from the wrong place"):
        Training(config(), tmp_path, Loader(split(), 4, 10), other, resume=True)


def test_another_text_is_refused(tmp_path):
    finish(training(tmp_path, config(), facts={"text": 1}))
    with pytest.raises(MismatchError, match="its text was 1, now it is 2"):
        training(tmp_path, config(), facts={"text": 2}, resume=True)


def test_another_machine_is_a_warning(tmp_path, monkeypatch):
    finish(training(tmp_path, config()))
    monkeypatch.setattr("engram_lm.train.loop.__version__", "9.0")
    with pytest.warns(UserWarning, match=r"with engram_lm = .*, this run has 9\.0: .*the last bits may differ"):
        training(tmp_path, config(), resume=True).close()


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "table.safetensors", "facts.json"])
def test_a_damaged_newest_checkpoint_is_refused_with_a_way_on(tmp_path, whole, name):
    run = copy(whole, tmp_path / "run")
    newest = latest(run / "checkpoints")
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*Remove {re.escape(str(newest))} to go on from step-000004"):
        training(run, SETTINGS, resume=True)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # the advice, followed
    finish(training(run, SETTINGS, resume=True))
    assert_same(outcome(run), outcome(whole))
