"""Runs of a study: resumed wherever they were stopped, measured once, and never mixed with others."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from engram_lm.errors import CheckpointError, MismatchError
from engram_lm.study.runs import Job, run_jobs, step_ratio
from engram_lm.train.loader import Loader
from engram_lm.train.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer([tiny.PANGRAM], 280)


def job(directory: Path, seed: int = 0, model=None, **changes) -> Job:
    config = tiny.config(replace(model or tiny.ENGRAM, vocab_size=280), seed=seed)
    settings = {"batches": Loader(tiny.split(), 4, 10, seed), "tokenizer": TOKENIZER, "measure": weights} | changes
    return Job(directory=directory, config=settings.pop("config", config), **settings)


def weights(run) -> dict:
    """A figure that any difference in training would change."""
    assert not run.model.training
    return {"sum": float(sum(p.double().abs().sum() for p in run.model.parameters())), "steps": run.done_steps}


def groups(directory: Path, **changes) -> list[list[Job]]:
    models = {"base": tiny.BASE, "engram": tiny.ENGRAM}
    return [
        [job(directory / name / f"seed-{seed}", seed, model, **changes) for name, model in models.items()]
        for seed in (0, 1)
    ]


def figures(results) -> list[list[float]]:
    return [[one["sum"] for one in group] for group in results]


def test_every_job_is_trained_and_measured(tmp_path):
    results = run_jobs(groups(tmp_path))
    assert [[one["steps"] for one in group] for group in results] == [[6, 6], [6, 6]]
    assert len({one for group in figures(results) for one in group}) == 4
    assert all(len(one["step_seconds"]) == 6 for group in results for one in group)


def test_finished_jobs_are_not_run_again(tmp_path):
    first = run_jobs(groups(tmp_path))

    def never(run):
        raise AssertionError("measured again")

    assert run_jobs(groups(tmp_path, measure=never)) == first


def test_checkpoints_go_unless_they_are_kept(tmp_path):
    run_jobs([[job(tmp_path / "a"), job(tmp_path / "b", keep=True)]])
    assert [len(list((tmp_path / name / "checkpoints").glob("step-*"))) for name in "ab"] == [0, 2]


@pytest.mark.parametrize("moment", [1, 3, 7])
def test_an_interrupted_study_goes_on_to_the_same_figures(tmp_path, moment):
    whole = figures(run_jobs(groups(tmp_path / "whole")))
    met = []

    def interrupt(model, lookup):
        met.append(1)
        if len(met) == moment:
            os.kill(os.getpid(), signal.SIGINT)
        return {"val_loss": 0.0}

    def asked(evaluate):
        configs = groups(tmp_path / "stopped", evaluate=evaluate)
        return [[replace(one, config=replace(one.config, eval_every=2)) for one in group] for group in configs]

    assert run_jobs(asked(interrupt)) is None
    assert figures(run_jobs(asked(lambda model, lookup: {"val_loss": 0.0}))) == whole


def test_another_configuration_is_refused_before_anything_is_trained(tmp_path):
    run_jobs([[job(tmp_path / "b")]])
    other = job(tmp_path / "b")
    other = replace(other, config=replace(other.config, steps=8))
    with pytest.raises(MismatchError, match=r"config.steps: 6 then, 8 now"):
        run_jobs([[job(tmp_path / "a")], [other]])
    assert not (tmp_path / "a").exists()


def test_an_unfinished_run_of_another_configuration_is_refused(tmp_path):
    def fail(run):
        raise RuntimeError("killed while measuring")

    with pytest.raises(RuntimeError):
        run_jobs([[job(tmp_path / "a", measure=fail)]])
    other = job(tmp_path / "a", facts={"text": 1})
    with pytest.raises(MismatchError, match="text"):
        run_jobs([[other]])


def test_a_damaged_measurement_is_named(tmp_path):
    run_jobs([[job(tmp_path / "a")]])
    path = tmp_path / "a" / "measured.json"
    path.write_text(json.dumps({"measured": {}}))
    with pytest.raises(CheckpointError, match="remove it to measure again"):
        run_jobs([[job(tmp_path / "a")]])


def test_step_ratio_compares_the_same_moment():
    base = np.array([1.0, 2.0, 10.0])
    assert step_ratio(base * 1.5, base) == 1.5
