"""Benchmarks: every one runs, checks what it times, and says what is missing. What they measure is not for a test."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import ENGRAM, write_texts

from engram_lm.bench import Case, Contender, Entry, Meter, Results, WrongResultError, peers
from engram_lm.bench.decode import bench_decode
from engram_lm.bench.gather import AS_IT_COMES, bench_gather
from engram_lm.bench.hash import bench_hash
from engram_lm.bench.step import arms, bench_step
from engram_lm.bench.update import bench_update
from engram_lm.cli.bench import Bench
from engram_lm.errors import ConfigError
from engram_lm.hashing import HashConfig, HashPlan, hash_ngrams
from engram_lm.model import ModelConfig
from engram_lm.train.loop import TrainConfig

MODEL = replace(ENGRAM, vocab_size=300)
CONFIG = TrainConfig(MODEL, batch_size=2, length=8, threads=1, device="cpu")


@pytest.fixture
def alone(monkeypatch):
    """Nothing of others is installed."""

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name) if "." in name else PackageNotFoundError(name)

    monkeypatch.setattr(peers, "distribution", absent)
    monkeypatch.setattr(peers, "import_module", absent)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return str(write_texts(tmp_path_factory.mktemp("texts"), files=40))


def names(results: Results, case: int = 0) -> list[str]:
    return [entry.name for entry in results.cases[case].entries]


def printed(results: Results) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(results)
    return capture.get()


# --- measuring ------------------------------------------------------------------------------------------------------


def recorder(name: str, calls: list[str]) -> Contender:
    return Contender(name, lambda: calls.append(name), lambda _: True)


def test_contenders_take_turns_and_nobody_is_always_first():
    calls: list[str] = []
    Meter("test", rounds=5).measure("turns", [recorder(name, calls) for name in "abc"])
    checks, *rounds = ["".join(calls[first : first + 3]) for first in range(0, len(calls), 3)]
    assert checks == "abc"
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]  # the first is for warmth


def test_the_round_for_warmth_does_not_count_and_preparing_is_not_timed(monkeypatch):
    clock = iter(np.cumsum(np.arange(100.0)))
    monkeypatch.setattr("engram_lm.bench.measure.time.perf_counter", lambda: next(clock))
    prepared: list[int] = []

    def prepare() -> tuple[int]:
        prepared.append(len(prepared))
        return (prepared[-1],)

    run = Contender("one", lambda number: number, lambda result, number: result == number == 0, prepare)
    meter = Meter("test", rounds=3)
    case = meter.measure("times", [run])
    assert prepared == [0, 1, 2, 3, 4]
    assert meter.calibration == [1.0, 5.0, 9.0, 13.0]  # the clock gains a second more at each look
    assert case.entries[0].seconds == (7.0, 11.0, 15.0)


def test_who_computes_something_else_is_refused():
    right = Contender("right", lambda: 4, lambda result: result == 4)
    wrong = Contender("wrong", lambda: 5, lambda result: result == 4)
    with pytest.raises(WrongResultError, match="bench sums, 2 \\+ 2: wrong does not compute"):
        Meter("sums", rounds=1).measure("2 + 2", [right, wrong])


def test_ratios_are_taken_in_each_round():
    """The machine was three times as slow in the last round: for both."""
    case = Case("sizes", (Entry("ours", (1.0, 1.0, 3.0)), Entry("theirs", (2.0, 2.5, 6.0))), "rows", 100)
    line = case.json()["entries"][1]
    assert line["ratio"] == 2
    assert line["ratio_quartiles"] == [2, 2.25]
    assert line["median_seconds"] == 2.5
    assert line["quartiles_seconds"] == [2.25, 4.25]
    assert line["per_second"] == 40


def test_the_table_says_what_was_measured():
    entries = (Entry("ours", (0.001, 0.002, 0.003), "a note"), Entry("[theirs]", (0.004, 0.004, 0.004)))
    noise = Entry("the same work", (0.001, 0.002, 0.003, 0.008))
    meter = Meter("test", rounds=3)
    both = Case("as speeds", entries, "rows", 8000), Case("as times", entries, work=2)
    text = printed(Results("test", both, noise, {"another": "not installed (pip install another)"}, meter.machine))
    speeds, times = text.split("as times")
    assert "as speeds; 3 rounds" in speeds
    assert "rows/s" in speeds
    assert "4 M" in speeds  # 8000 in 2 ms
    assert "3.2 M - 5.33 M" in speeds
    assert "[theirs]" in speeds
    assert " 1 " in times  # two in 2 ms
    assert "ours: a note." in text
    assert "another: not installed (pip install another)." in text
    assert f"torch {torch.__version__}" in text
    assert "the slowest x 3.2" in text


# --- peers ----------------------------------------------------------------------------------------------------------


@given(
    orders=st.sampled_from([(2,), (2, 3), (2, 3, 4), (1, 3)]),
    heads=st.integers(1, 3),
    layers=st.sampled_from([(1,), (3, 0)]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12)),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_numpy_form_gives_our_addresses(orders, heads, layers, shape, seed):
    config = HashConfig(orders=orders, heads=heads, rows_per_head=1009, layers=layers, seed=seed)
    plan = HashPlan.build(config, vocab_size=500, pad=2)
    canonical = torch.randint(500, shape, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(peers.numpy_hash(plan, canonical.numpy()), hash_ngrams(plan, canonical)[0].numpy())


def test_a_missing_peer_is_said(alone):
    results = bench_hash(tokens=[32], rounds=1)
    assert names(results) == ["engram-lm", "engram-lm, the slow truth", "numpy, the demo's form"]
    assert "engram-peft: not installed (pip install --no-deps engram-peft==1.2.7)." in printed(results)
    assert results.json()["left_out"].keys() == {"engram-peft"}


def test_peers_that_are_installed_take_part():
    pytest.importorskip("fbgemm_gpu")
    assert names(bench_hash(tokens=[32], rounds=1))[-1] == "engram-peft"
    gathered = bench_gather(gigabytes=0.001, row_bytes=[264], rows=[64], rounds=1)
    assert {"FBGEMM, fp32 rows", "FBGEMM, int8 rows"} <= set(names(gathered))
    assert names(bench_update(table_rows=[500], rows=20, rounds=1), case=1)[-1] == "FBGEMM"


# --- each benchmark -------------------------------------------------------------------------------------------------


def test_gather(alone):
    results = bench_gather(gigabytes=0.001, row_bytes=[264, 320], rows=[64, 100], rounds=1)
    assert len(results.cases) == 2 * 2 * (1 if AS_IT_COMES in results.left_out else 2)
    assert "not installed" in results.left_out["FBGEMM"]
    assert names(results)[0] == "engram-lm, into an array"
    assert {"F.embedding", "index_select(out=)", "numpy take(out=)", "reading alone"} <= set(names(results))


def test_gather_without_compiled_kernels_has_nothing_to_compare(monkeypatch):
    monkeypatch.setattr("engram_lm.kernels.compiled", lambda: False)
    with pytest.raises(ConfigError, match="Numba"):
        bench_gather(gigabytes=0.001, rounds=1)


def test_update(alone):
    results = bench_update(table_rows=[500, 700, 10**12], rows=20, dim=8, rounds=2)
    assert names(results) == ["500 rows", "700 rows"]
    assert names(results, 1) == names(results, 2) == ["engram-lm", "SparseAdam", "dense Adam"]
    assert "more than there is room for" in results.left_out["1,000,000,000,000 rows"]


def test_update_leaves_out_what_does_not_fit(alone, monkeypatch):
    monkeypatch.setattr("engram_lm.bench.update.ROOM", 100e3 / 1e9 / Meter("test", 1).machine["ram_gb"])
    results = bench_update(table_rows=[200, 500, 3000], rows=20, dim=8, rounds=1)  # 36 bytes a row of ours
    assert names(results) == ["200 rows", "500 rows"]
    assert [case.title for case in results.cases[1:]] == ["20 rows x 8 of a table of 200"]
    assert {"3,000 rows", "peers at 500 rows"} <= results.left_out.keys()


def test_step(texts, tmp_path):
    results = bench_step(CONFIG, texts, tmp_path, growth=[3], rounds=1)
    assert names(results) == ["base", "capacity 1", "engram", "engram, no prefetch", "engram, table x 3"]
    assert results.cases[0].work == 4


def test_arms_differ_in_one_thing():
    found = arms(CONFIG, growth=[2])
    assert found["base"] == replace(CONFIG, model=replace(MODEL, memory=None))
    assert found["engram"] == CONFIG
    assert found["engram, no prefetch"] == replace(CONFIG, prefetch=False)
    hashes = {name: arm.model.memory.hash for name, arm in found.items() if arm.model.memory}
    assert hashes["capacity 1"] == replace(MODEL.memory.hash, scheme="capacity_1")
    assert hashes["engram, table x 2"] == replace(MODEL.memory.hash, rows_per_head=(194, 194))


@pytest.mark.parametrize("bench", [bench_step, bench_decode])
def test_a_model_without_memory_has_nothing_to_measure(bench, texts, tmp_path):
    bare: ModelConfig | TrainConfig = replace(MODEL, memory=None)
    with pytest.raises(ConfigError, match="this model has none"):
        bench(TrainConfig(bare) if bench is bench_step else bare, texts, tmp_path, rounds=1)


def test_decode(texts, tmp_path):
    results = bench_decode(MODEL, texts, tmp_path, gigabytes=1e-4, cache=1e-5, tokens=4, rounds=1)
    assert names(results)[0] == "in RAM"
    assert set(names(results)) >= {"on disk, warm", "on disk, cold"}
    assert results.cases[0].work == 4


# --- command line ---------------------------------------------------------------------------------------------------


def test_quick_writes_json_and_a_plot(alone, tmp_path, capsys):
    plot, file = tmp_path / "bench.png", tmp_path / "bench.json"
    command = tyro.cli(Bench, args=["update", "--quick", "--json", str(file), "--plot", str(plot)])
    assert command.run(Console(width=200)) == 0
    assert "SparseAdam" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(file.read_text())
    assert found.keys() == {"bench", "machine", "noise", "cases", "left_out"}
    assert found["bench"] == "update"
    assert {"cpu", "cores", "threads", "ram_gb", "huge_pages", "load", "torch", "numba"} <= found["machine"].keys()
    assert {"median_seconds", "lower_quartile", "upper_quartile", "slowest"} == found["noise"].keys()
    for case in found["cases"]:
        assert case.keys() == {"title", "unit", "work", "entries"}
        assert case["entries"][0]["ratio"] == 1
        for entry in case["entries"]:
            assert len(entry["seconds"]) == 2
            assert entry["quartiles_seconds"][0] <= entry["median_seconds"] <= entry["quartiles_seconds"][1]


@pytest.mark.parametrize("what", ["hash", "gather", "update", "step", "decode"])
def test_every_benchmark_is_a_command(what):
    command = tyro.cli(Bench, args=[what, "--rounds", "3"])
    assert type(command.what).__name__ == what.capitalize()
    assert command.what.rounds == 3
    assert command.what.smallest.keys() <= vars(command.what).keys()
