"""benchmarks/gpu.py as a dry run: every section's code on tiny shapes, and figures that nobody can take for measurements."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
from card import sanitizing, tracing  # noqa: E402
from card.bench import Bench  # noqa: E402
from card.run import as_markdown, one, status  # noqa: E402
from card.samples import Samples, at_least, at_most  # noqa: E402
from card.tracing import Event  # noqa: E402

FIGURE = {"name", "value", "low", "high", "spread", "unit", "passes", "bar", "met", "note"}
MACHINE = {"gpu", "cpu", "cores", "ram_gb", "load", "libraries", "date", "commit"}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("ENGRAM_KERNELS", "triton")
    monkeypatch.setattr(sys, "path", list(sys.path))


def dry_run(out, *sections, **options):
    """The exit status and what was written."""
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code = gpu.main(["--device", "cpu", "--out", str(out), "--seed", "3", *given, "--only", *sections])
    written = out / f"gpu-dry-run-{'-'.join(sections)}.json"
    return code, json.loads(written.read_text(encoding="utf-8"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    words = "memory looks up what the quick brown fox has seen".split()
    documents = (" ".join(words[(i * k) % len(words)] for k in range(200)) for i in range(1, 60))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, in the interpreter, for the numbers that are meant to be odd
@pytest.mark.parametrize(
    "sections",
    [("ceilings", "fuse", "gather", "hash"), ("correct",), ("decode",), ("train",), ("trace",), ("loss", "sanitizer")],
    ids=lambda names: names[0],
)
def test_a_dry_run_executes_every_section_and_says_that_it_is_one(sections, tmp_path, text, capsys):
    code, results = dry_run(tmp_path / "out", *sections, data=text)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert results["schema"] == 1
    assert results["dry_run"] is True
    assert results["seed"] == 3
    assert results["machine"].keys() >= MACHINE
    assert list(results["sections"]) == list(sections)
    for name, section in results["sections"].items():
        assert section["status"] == ("skipped" if name == "sanitizer" else "done"), section["reason"]
        assert all(figure.keys() == FIGURE for figure in section["figures"])
        assert all(figure["met"] is None for figure in section["figures"])
        assert all(check["passed"] for check in section["checks"])
        assert section["figures"] or name in ("correct", "trace", "sanitizer")
    assert "DRY RUN" in printed
    assert as_markdown(results) in printed
    assert "DRY RUN" in (tmp_path / "out" / f"gpu-dry-run-{'-'.join(sections)}.md").read_text(encoding="utf-8")


def test_the_bars_of_the_issue_are_figures(tmp_path):
    """Of those sections whose dry run is quick."""
    _, results = dry_run(tmp_path, "gather", "hash")
    barred = {(name, figure["bar"]) for name, section in results["sections"].items() for figure in section["figures"]}
    assert {("gather", "≥ 80"), ("hash", "≥ 1")} <= barred


def test_a_dry_run_is_not_written_among_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr("card.run.ROOT", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    assert gpu.main(["--device", "cpu", "--only", "ceilings"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()} == before
    assert (tmp_path / "runs" / "gpu-dry-run" / "gpu-dry-run-ceilings.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- what a section's failure, its checks and the clock do ---------------------------------------------------------


def bench(out, *, minutes=9.0, tiny=True):
    import time

    return Bench(torch.device("cpu"), tiny, 0, out, "", time.monotonic() + 60 * minutes, 2**30)


def test_a_section_that_raises_is_failed_and_the_run_fails(tmp_path, monkeypatch, capsys):
    def broken(bench):
        bench.figure("half of it", Samples(((1.0, 2.0), (3.0,))), "ms")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("card.hashing.run", broken)
    code, results = dry_run(tmp_path, "hash", "ceilings")
    failed, after = results["sections"].values()
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert [figure["value"] for figure in failed["figures"]] == [2.0]
    assert after["status"] == "done"
    assert code == 1
    assert "no such kernel" in capsys.readouterr().err


def test_a_wrong_kernel_is_found(tmp_path, monkeypatch):
    from engram_lm.kernels.gpu import rows

    monkeypatch.setattr(
        rows, "gather", lambda records, slots, out: out[: len(out) - 1].copy_(records[slots.clamp(min=0)][:-1])
    )
    _, results = dry_run(tmp_path, "gather")
    assert [check["passed"] for check in results["sections"]["gather"]["checks"]] == [False, False]
    assert status(results) == 1


def test_what_does_not_fit_into_the_time_is_skipped(tmp_path):
    section = one(bench(tmp_path, minutes=0.05, tiny=False), "decode")
    assert section.status == "skipped"
    assert "3 s were left" in section.reason


def test_checks_that_were_asked_for_and_did_not_run_are_no_success():
    skipped = {"status": "skipped", "checks": []}
    assert status({"sections": {"correct": skipped}}) == 1
    assert status({"sections": {"sanitizer": skipped}}) == 0
    assert status({"sections": {"decode": {"status": "done", "checks": [{"passed": False}]}}}) == 1


def test_a_bar_is_met_or_missed_by_a_measurement_alone(tmp_path):
    for tiny, expected in ((True, [None, None]), (False, [True, False])):
        run = bench(tmp_path, tiny=tiny)
        run.figure("twice", Samples(((2.0, 2.1), (1.9, 2.3))), "x", bar=at_least(2))
        run.figure("lost", Samples(((2.0, 2.1), (1.9, 2.3))), "%", bar=at_most(1))
        assert [figure["met"] for figure in run.section.figures] == expected


def test_samples_pair_calls_of_the_same_round():
    slow, fast = Samples(((4.0, 6.0, 8.0), (5.0, 5.0, 5.0))), Samples(((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)))
    assert slow.over(fast).passes == ((2.0, 3.0, 4.0), (5.0, 5.0, 5.0))
    assert slow.over(fast).medians == [3.0, 5.0]
    assert fast.rate(6).median == 4.5
    assert slow.quartiles == (5.0, 5.75)


# --- traces and sanitizers ----------------------------------------------------------------------------------------


def test_the_hidden_share_of_a_fetch():
    moves = [Event("_move_rows", 10.0, 20.0), Event("_move_rows", 40.0, 44.0)]
    others = [Event("gemm", 0.0, 12.0), Event("gemm", 11.0, 15.0), Event("norm", 18.0, 30.0)]
    assert tracing.covered(moves, others) == 7.0
    assert tracing.spans(others) == [(0.0, 15.0), (18.0, 30.0)]
    assert tracing.spans(others, gap=3.0) == [(0.0, 30.0)]
    assert tracing.parted([*others, *moves]) == (moves, others)


def test_the_picture_shows_what_crossed_the_bus(tmp_path):
    pytest.importorskip("matplotlib")
    events = [Event("gemm", 100.0 * i, 100.0 * i + 90) for i in range(20)] + [Event("_move_rows", 120.0, 280.0)]
    tracing.draw({"decode": events, "train": []}, tmp_path / "trace.svg")
    picture = (tmp_path / "trace.svg").read_text(encoding="utf-8")
    assert "#c44e52" in picture
    assert "#4c72b0" in picture


def test_traces_are_kept(tmp_path):
    run = bench(tmp_path)
    events = tracing.profiled(run, "decode", lambda _, measured: measured(lambda: torch.ones(3).cumsum(0)))
    with gzip.open(tmp_path / "gpu-dry-run-trace-decode.json.gz", "rt", encoding="utf-8") as file:
        kept = json.load(file)["traceEvents"]
    assert any(event.name == "aten::cumsum" and event.end > event.start for event in events)
    assert {event["name"] for event in kept} >= {event.name for event in events}


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _move_rows+0x1f0 in rows.py:150
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x80
========= ERROR SUMMARY: 2 errors
"""


def test_what_a_sanitizer_finds_is_laid_at_the_right_door():
    names = sanitizing.kernel_names()
    assert {"_move_rows", "hash_positions"} <= names
    assert sanitizing.findings(MEMCHECK, names) == (2, 1)
    assert sanitizing.findings("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", names) == (
        0,
        0,
    )
    assert sanitizing.findings("Killed", names) == (None, 0)
