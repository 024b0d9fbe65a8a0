"""Under torchrun: a rank is killed, all start again and end with the same bits; and torchrun itself is told to stop."""

import os
import re
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from agent import begin, launch, outcome, prepare, statuses
from tiny import assert_same, write_texts

from engram_lm.train.checkpoint import latest
from engram_lm.train.loop import read_metrics

TESTS = Path(__file__).parent
COMMAND = """
import os, sys

import faults
from engram_lm.cli import main
from engram_lm.train.watch import Watch

Watch.__init__.__kwdefaults__["patience"] = 1.0
mishaps, start = sys.argv.pop(1).split(","), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if start < len(mishaps):
    what, place = mishaps[start].split(" ", 1)
    faults.happen(place, getattr(faults, what), int(os.environ["RANK"]))
main()
"""


def torchrun(folder: Path, restarts: int, *script: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of a script."""
    options = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {restarts}".split()
    return subprocess.run(
        [sys.executable, *options, *script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and a run directory in which nothing but that is prepared; and the command to which things happen."""
    place = tmp_path_factory.mktemp("text")
    prepare(write_texts(place / "texts", files=24), place / "run")
    (place / "command.py").write_text(COMMAND)
    return place


@pytest.fixture(scope="module")
def whole(processes: ForkServerContext, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves behind that nothing happened to."""
    place = tmp_path_factory.mktemp("whole")
    run, command = begin(text, place)
    assert statuses(launch(processes, place, command)) == [0, 0]
    return outcome(run)


@pytest.mark.slow
def test_ranks_that_fail_start_again_and_end_the_same(text: Path, whole: dict[str, Any], tmp_path: Path):
    run, command = begin(text, tmp_path)
    done = torchrun(tmp_path, 1, str(text / "command.py"), "die while gradients travel", *command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Error: rank 1 \(.*\) was last seen in step .* and is gone", done.stderr, re.MULTILINE), (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert_same(outcome(run), whole)


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_lets_its_ranks_save(
    processes: ForkServerContext, text: Path, whole: dict[str, Any], tmp_path: Path
):
    run, command = begin(text, tmp_path)
    done = torchrun(tmp_path, 0, str(text / "command.py"), "stop_launcher a step", *command)
    assert "Stopped and saved" in done.stdout, done.stderr
    newest, last = latest(run / "checkpoints"), read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert newest == run / "checkpoints" / f"step-{last:06d}"
    assert statuses(launch(processes, tmp_path, [*command, "--resume"])) == [0, 0]
    assert_same(outcome(run), whole)
