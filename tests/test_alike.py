"""Ranks that were started differently all say so, alike, before anything else happens."""

from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from engram_lm.errors import MismatchError
from engram_lm.train.alike import require_equal, source_digest
from engram_lm.train.ranks import Ranks

FACTS = {"torch": "2.13", "config": {"steps": 400, "optim": {"lr": 0.01}}}


def compare(others: dict[int, dict[str, Any]]) -> str:
    rank = dist.get_rank()
    try:
        require_equal(Ranks(rank, dist.get_world_size(), dist.group.WORLD), others.get(rank, FACTS))
    except MismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equal_ranks_go_on(processes: ForkServerContext, world: int):
    assert run_ranks(processes, world, compare, {}) == [""] * world
    require_equal(Ranks(), FACTS)


def test_every_rank_names_ranks_facts_and_values(processes: ForkServerContext):
    slower = {"torch": "2.13", "config": {"steps": 400, "optim": {"lr": 0.02}}}
    older = {"torch": "2.11", "config": {"steps": 400, "optim": {"lr": 0.02}}}
    said = run_ranks(processes, 4, compare, {1: slower, 3: older})
    assert len(set(said)) == 1
    assert said[0].startswith(
        "The ranks were not started alike: config.optim.lr is 0.01 on rank 0, 0.02 on ranks 1, 3; "
        "torch is '2.13' on rank 0, '2.11' on rank 3."
    )


def test_a_rank_0_that_differs_and_facts_that_are_missing_show(processes: ForkServerContext):
    said = run_ranks(processes, 3, compare, {0: {**FACTS, "text": "ab"}})
    assert len(set(said)) == 1
    assert "text is 'ab' on rank 0, None on ranks 1, 2." in said[0]


def test_the_digest_is_of_names_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def digest_of(**files: str) -> str:
        for old in tmp_path.rglob("*.py"):
            old.unlink()
        (tmp_path / "train").mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / "train" / f"{name}.py").write_text(text)
        source_digest.cache_clear()
        return source_digest()

    monkeypatch.setattr("engram_lm.train.alike.__file__", str(tmp_path / "train" / "alike.py"))
    first = digest_of(a="x = 1\n", b="")
    assert digest_of(b="", a="x = 1\n") == first
    assert len({first, digest_of(a="x = 2\n", b=""), digest_of(a="x = 1\n"), digest_of(a="", b="x = 1\n")}) == 4
    source_digest.cache_clear()


def test_the_package_has_a_digest():
    assert len(source_digest()) == 64
