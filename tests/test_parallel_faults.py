"""Whatever happens to one rank of the real command, all stop and say why, and the run ends bit-identical to one undisturbed."""

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from agent import SETTINGS, begin, launch, outcome, prepare, statuses
from faults import (
    KILLS,
    PLACES,
    WRITES,
    die,
    fill_disk,
    happen,
    happen_to_all,
    other_code,
    other_place,
    other_settings,
    stick,
    stop,
)
from tiny import assert_same, write_texts

from engram_lm import config as configs
from engram_lm.train.checkpoint import latest

PLACES_TO_BE_KILLED_IN = 2 * int(os.environ.get("ENGRAM_KILLS", "2"))  # all of them from 8 on
FULL = r"\[Errno 28\] No space left on device"
RANK = r"rank {} \(process \d+ on \S+\)"
SEEN = RANK + r" was last seen (in step \d+|before its first step)"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and a run directory in which nothing but that is prepared."""
    place = tmp_path_factory.mktemp("text")
    prepare(write_texts(place / "texts", files=24), place / "run")
    return place


@pytest.fixture(scope="module")
def whole(processes: ForkServerContext, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves behind that nothing happened to."""
    place = tmp_path_factory.mktemp("whole")
    run, command = begin(text, place)
    assert statuses(launch(processes, place, command)) == [0, 0]
    return outcome(run)


def test_killed_anywhere_again_and_again(
    processes: ForkServerContext, text: Path, whole: dict[str, Any], tmp_path: Path
):
    """One run is killed in each place in turn, and started again as torchrun does; each start takes at least two steps."""
    run, command = begin(text, tmp_path)
    for start, place in enumerate(list(KILLS)[:PLACES_TO_BE_KILLED_IN]):
        ended = launch(
            processes, tmp_path, command, befall=partial(happen, place, die), restarts=[start] * 2, patience=0.3
        )
        killed, other = PLACES[place][0], ended[1 - PLACES[place][0]]
        assert ended[killed].status == -signal.SIGKILL, place
        assert other.status == 1, (place, other)
        assert re.match(rf"Error: {SEEN.format(killed)} and is gone without a word: killed", other.errors), other
        assert "Traceback" not in other.errors, other.errors
    assert statuses(launch(processes, tmp_path, command, restarts=[99, 99])) == [0, 0]
    assert_same(outcome(run), whole)


def test_a_disk_that_is_full_for_one_rank(
    processes: ForkServerContext, text: Path, whole: dict[str, Any], tmp_path: Path
):
    run, command = begin(text, tmp_path)
    for start, place in enumerate(WRITES):
        ended = launch(processes, tmp_path, command, befall=partial(happen, place, fill_disk))
        command = [*command, "--resume"] if start == 0 else command
        assert statuses(ended) == [1, 1], (place, ended)
        said = [" ".join(rank.errors.split()) for rank in ended]
        if place == "metrics":
            assert re.match(rf"Error: \S+metrics.jsonl: cannot be written \({FULL}\). Checkpoints are intact", said[0])
            assert re.match(rf"Error: {RANK.format(0)} failed: \S+metrics.jsonl: cannot be written", said[1])
        else:
            step = f"step-{2 * start + 4:06d}"
            assert re.match(rf"Error: \S+{step}: cannot be written \(rank {PLACES[place][0]}: {FULL}\)", said[0])
            assert said[0].endswith(f"The checkpoint before it, step-{2 * start + 2:06d}, is intact.")
            assert said[0] == said[1]
        assert latest(run / "checkpoints") == run / "checkpoints" / f"step-{2 * start + 2:06d}"
    assert statuses(launch(processes, tmp_path, command)) == [0, 0]
    assert_same(outcome(run), whole)


def test_sigterm_stops_all_after_the_same_step(
    processes: ForkServerContext, text: Path, whole: dict[str, Any], tmp_path: Path
):
    """The signal comes after the sums of a step: all know of it in the next one, and save after that."""
    run, command = begin(text, tmp_path)
    for befall, step in ((partial(happen, "one rank", stop), 5), (partial(happen_to_all, "a step", stop), 9)):
        ended = launch(processes, tmp_path, command, befall=befall)
        assert statuses(ended) == [130, 130], ended
        assert "Stopped and saved. Go on with: engram-lm train --resume" in ended[0].output
        assert latest(run / "checkpoints") == run / "checkpoints" / f"step-{step:06d}"
        command = command if "--resume" in command else [*command, "--resume"]
    assert statuses(launch(processes, tmp_path, command)) == [0, 0]
    assert_same(outcome(run), whole)


def test_ranks_that_were_started_unequally_often_agree_to_go_on(
    processes: ForkServerContext, text: Path, tmp_path: Path
):
    """Each machine's torchrun counts only the failures that it saw."""
    run, command = begin(text, tmp_path)
    for step, restarts in ((5, [0, 0]), (10, [0, 1]), (15, [1, 0])):
        ended = launch(processes, tmp_path, command, befall=partial(happen, "one rank", stop), restarts=restarts)
        assert statuses(ended) == [130, 130], ended
        assert latest(run / "checkpoints") == run / "checkpoints" / f"step-{step:06d}"


def test_a_rank_that_is_too_slow_is_named(processes: ForkServerContext, text: Path, tmp_path: Path):
    """Loading happens on a thread of a pool, and what the others wait for there are ids of rows."""
    place = "loading"
    _, command = begin(text, tmp_path, parallel=replace(SETTINGS.parallel, timeout=4.0))
    ended = launch(processes, tmp_path, command, befall=partial(happen, place, stick), seconds=40)
    assert statuses(ended) == [1, 1], ended
    slow, where = PLACES[place][0], r"it was at \S+ \(.* > stick \(faults.py:\d+\) \(Timed out"
    for rank in ended:
        assert re.search(rf"^Error: {SEEN.format(slow)} and did not come: {where}", rank.errors, re.MULTILINE), ended


@pytest.mark.parametrize(
    ("befall", "difference"),
    [
        (other_settings, "the command.config.optim.lr is 0.005 on rank 0, 0.125 on rank 1"),
        (other_code, r"its source is '[0-9a-f]{64}' on rank 0, 'another' on rank 1"),
    ],
)
def test_ranks_that_are_not_alike_do_not_start(
    processes: ForkServerContext, text: Path, tmp_path: Path, befall: Callable[[int], None], difference: str
):
    run, command = begin(text, tmp_path)
    ended = launch(processes, tmp_path, command, befall=befall)
    assert statuses(ended) == [1, 1], ended
    for rank in ended:
        assert re.match(f"Error: The ranks were not started alike: {difference}", " ".join(rank.errors.split()))
    assert not (run / "config.json").exists()


def test_ranks_with_different_text_do_not_start(processes: ForkServerContext, tmp_path: Path):
    """Each has prepared what it found at the same path of its own disk."""
    texts = tmp_path / "texts"
    for rank, files in enumerate((24, 25)):
        (tmp_path / str(rank)).mkdir()
        prepare(write_texts(texts, files=files), tmp_path / str(rank) / "run")
    (tmp_path / "settings.json").write_text(configs.to_json(SETTINGS))
    command = ["train", str(tmp_path / "settings.json"), "--data", str(texts), "--out", "run"]
    ended = launch(processes, tmp_path, command, befall=partial(other_place, tmp_path))
    assert statuses(ended) == [1, 1], ended
    for rank in ended:
        assert re.search(r"text is \d+ on rank 0, \d+ on rank 1", " ".join(rank.errors.split())), rank
