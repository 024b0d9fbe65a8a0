"""Sweeps: points that differ in one thing, interrupted ones that end as if they had not been, configurations that never mix."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tyro
from rich.console import Console

from engram_lm.cli.sweep import Allocation, Memory, Sweep, print_results, with_interval
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.model import MoEConfig
from engram_lm.model.count import count
from engram_lm.study import sweep as sweeps
from engram_lm.study.sweep import ALLOCATION, MEMORY, AllocationSweep, MemorySweep, reallocated, require_equal, sweep
from engram_lm.train.loop import Training

ENGRAM = replace(tiny.ENGRAM, vocab_size=300)  # the least that spells every byte, and some words
MIXTURE = replace(ENGRAM, ffn_width=96, moe=MoEConfig(experts=22, active=2, shared=1, width=8))
ROWS = MemorySweep(tiny.config(ENGRAM, steps=3, batch_size=2), rows_per_head=(10, 30, 100, 300), eval_windows=8)
SHARES = AllocationSweep(tiny.config(MIXTURE, steps=2, batch_size=2), shares=(1.0, 0.9, 0.7, 0.5), eval_windows=8)


def quiet(asked: sweeps.Sweep, texts: Path, out: Path, **options: Any) -> dict[str, Any] | None:
    return sweep(asked, str(texts), out, say=lambda line: None, **options)


def shown(results: dict[str, Any]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        print_results(results, console)
    return captured.get()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_texts(tmp_path_factory.mktemp("sweep") / "texts", files=30, words=20)


@pytest.fixture(scope="module")
def done(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sweep") / "memory"
    results = quiet(replace(ROWS, bigram=True), texts, out)
    assert results is not None
    return out, results


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each training step that is taken."""
    taken: list[int] = []
    step = Training.step

    def counting(run: Training) -> dict[str, float]:
        taken.append(run.done_steps)
        return step(run)

    monkeypatch.setattr(Training, "step", counting)
    return taken


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_takes_its_options() -> None:
    asked = tyro.cli(
        Sweep, args=["memory", "--budget", "gpu", "--seeds", "3", "4", "5", "--bigram", "--out", "there"]
    ).what
    assert isinstance(asked, Memory)
    assert (asked.budget, asked.seeds, asked.bigram, asked.out) == ("gpu", (3, 4, 5), True, Path("there"))
    assert tyro.cli(Sweep, args=["allocation"]).what == Allocation(seeds=(0, 1), budget="cpu")


def test_a_single_document_has_no_interval() -> None:
    assert with_interval(4.12341, None) == "4.1234"
    assert with_interval(-0.5, [-0.75, -0.25], sign="+") == "-0.5000 ± 0.2500"


# --- points ---------------------------------------------------------------------------------------------------------


def test_a_memory_sweep_varies_rows_and_nothing_else() -> None:
    base, *points = replace(ROWS, bigram=True).points(ROWS.train)
    assert base.config.model.memory is None
    engram, bigram = ([point for point in points if point.arm == arm] for arm in ("engram", "bigram"))
    first = engram[0].config
    for point, other, rows in zip(engram, bigram, ROWS.rows_per_head, strict=True):
        assert point.config.model == sweeps.with_rows(first.model, rows)
        assert replace(point.config, model=first.model) == first
        ours, theirs = count(point.config.model), count(other.config.model)
        assert theirs.tables == pytest.approx(
            ours.tables, rel=0.15
        )  # a bigram row is as wide as the model: primes are coarse
        assert ours.active == count(first.model).active


def test_an_allocation_keeps_parameters_and_flops() -> None:
    pure, *points = SHARES.points(SHARES.train)
    target = count(pure.config.model, context=10)
    assert pure.rho == 1
    assert pure.config.model.memory is None
    for point, experts in zip(points, (20, 16, 12), strict=True):
        model = point.config.model
        assert model.moe is not None
        assert model.moe.experts == experts
        assert point.rho == (experts - 2) / 20  # of the experts that a token does not pass
        assert count(model).total == pytest.approx(target.total, rel=sweeps.TOTAL_TOLERANCE)
        assert count(model, context=10).training_flops == pytest.approx(
            target.training_flops, rel=sweeps.FLOPS_TOLERANCE
        )


def test_points_that_cannot_be_equal_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"of the pure mixture, more than 1% away"):
        require_equal(MIXTURE, replace(MIXTURE, memory=None), 10, "half")
    with pytest.raises(ConfigError, match="more than the leading dense FFN of width 8 could give up"):
        reallocated(replace(MIXTURE, ffn_width=8), 0.5)


@pytest.mark.parametrize("budget", ["quick", "cpu", "gpu"])
def test_every_budget_has_points_enough(budget: sweeps.Budget) -> None:
    memory, allocation = MEMORY[budget], ALLOCATION[budget]
    assert len(memory.rows_per_head) >= 6
    assert math.log10(max(memory.rows_per_head) / min(memory.rows_per_head)) >= 2.49
    shares = [point.rho for point in allocation.points(allocation.train)]  # which refuses unequal ones
    assert len(set(shares)) >= 6
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(ROWS, train=tiny.config(tiny.BASE)), "none whose rows could vary"),
        (lambda: replace(ROWS, rows_per_head=(10, 20, 30)), "fewer than 4 sizes"),
        (lambda: replace(SHARES, train=tiny.config()), "starts from a model with experts"),
        (lambda: replace(SHARES, shares=(0.9, 0.8, 0.7, 0.6)), "with 1 among them"),
        (lambda: replace(SHARES, shares=(1.0, 0.8, 0.7, 1.6)), "between 0 and 1"),
    ],
)
def test_sweeps_that_would_mean_nothing_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# --- running --------------------------------------------------------------------------------------------------------


def test_results_hold_what_the_report_needs(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [point["rows"] for point in results["points"]] == sorted(point["rows"] for point in results["points"])
    assert results["base"]["rows"] == 0
    for point in [results["base"], *results["points"], *results["bigram"]["points"]]:
        assert len(point["seeds"]) == 2
        assert point["loss"] == pytest.approx(sum(point["seeds"]) / 2)
        assert point["interval"][0] <= point["loss"] <= point["interval"][1]
        assert point["less"]["difference"] == pytest.approx(point["loss"] - results["base"]["loss"], abs=1e-9)
    assert results["fit"]["coefficients"] != results["bigram"]["fit"]["coefficients"]
    assert results["paper"]["fit"]["coefficients"][1] == pytest.approx(-0.0284, abs=1e-4)
    assert results["data"]["read_tokens"] == 3 * 2 * 10
    assert results["minutes"] > 0
    assert results["data"]["held_out_documents"] > 1
    text = shown(results)
    assert "engram-300" in text
    assert text.count("nats a decade") == 4  # here, the bigram's, and two of the paper's


def test_runs_of_a_seed_share_their_batches(done: tuple[Path, dict[str, Any]]) -> None:
    """At the first step no row has learned anything: every size has the loss of the base, to rounding."""
    out, _ = done
    first = {
        path.parts[-3]: json.loads(path.read_text().splitlines()[0])["loss"]
        for path in out.glob("points/*/seed-0/metrics.jsonl")
    }
    assert len(first) == 9
    assert list(first.values()) == pytest.approx([first["base"]] * 9, abs=1e-5)


def test_an_interrupted_sweep_ends_as_if_it_had_not_been(
    done: tuple[Path, dict[str, Any]], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = done
    step = Training.step

    def interrupted(run: Training) -> dict[str, float]:
        if run.directory.parts[-2:] == ("engram-30", "seed-0") and run.done_steps == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        assert quiet(ROWS, texts, tmp_path) is None
    assert not (tmp_path / "results.json").exists()
    resumed = quiet(ROWS, texts, tmp_path)
    assert resumed is not None
    assert [point["seeds"] for point in resumed["points"]] == [point["seeds"] for point in whole["points"]]
    assert resumed["fit"] == whole["fit"]


def test_finished_runs_are_kept_when_seeds_or_points_are_added(texts: Path, tmp_path: Path, steps: list[int]) -> None:
    one = quiet(ROWS, texts, tmp_path, seeds=(0,))
    assert one is not None
    assert len(steps) == 5 * 3
    more = quiet(replace(ROWS, rows_per_head=(*ROWS.rows_per_head, 1000)), texts, tmp_path, seeds=(0,))
    assert more is not None
    assert len(steps) == 6 * 3
    assert [point["seeds"] for point in more["points"]][:4] == [point["seeds"] for point in one["points"]]
    assert one["fit"]["seed_interval"] is None


def test_another_configuration_is_refused_by_name(
    done: tuple[Path, dict[str, Any]], texts: Path, tmp_path: Path, steps: list[int]
) -> None:
    out, _ = done
    with pytest.raises(MismatchError, match=r"train\.steps: 3 then, 4 now"):
        quiet(replace(ROWS, train=replace(ROWS.train, steps=4)), texts, out)
    with pytest.raises(MismatchError, match="kind: 'memory' then, 'allocation' now"):
        quiet(SHARES, texts, out)
    with pytest.raises(MismatchError, match="eval_windows: 8 then, 9 now"):
        quiet(replace(ROWS, eval_windows=9), texts, out)
    with pytest.raises(DataError, match="holds the tokens of"):
        quiet(ROWS, tiny.write_texts(tmp_path / "other"), out)
    with pytest.raises(ConfigError, match="different numbers"):
        quiet(ROWS, texts, out, seeds=(1, 1))
    assert not steps


def test_an_allocation_sweep_runs_and_says_what_is_equal(texts: Path, tmp_path: Path) -> None:
    results = quiet(SHARES, texts, tmp_path)
    assert results is not None
    assert [point["rho"] for point in results["points"]] == [1.0, 0.9, 0.7, 0.5]
    for point in results["points"]:
        assert point["ratios"]["total"] == pytest.approx(1, abs=sweeps.TOTAL_TOLERANCE)
        assert point["ratios"]["flops"] == pytest.approx(1, abs=sweeps.FLOPS_TOLERANCE)
    assert results["base"] is None
    assert results["fit"]["optimum"]["best"]["rho"] in (1.0, 0.9, 0.7, 0.5)
    assert results["paper"]["fit"]["optimum"]["rho"] == pytest.approx(0.738, abs=0.005)
    assert "the best measured point is" in shown(results)
