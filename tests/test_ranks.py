"""The helper that runs several ranks: answers in order, failures by rank, nobody left behind."""

import os
import signal
import time
from multiprocessing.context import ForkServerContext

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def total(value: int) -> tuple[int, int]:
    tensor = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return dist.get_rank(), int(tensor)


def fail_in(rank: int, how: str) -> None:
    if dist.get_rank() == rank:
        if how == "raise":
            raise ValueError("no such thing")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_come_in_the_order_of_ranks(processes: ForkServerContext, world: int):
    expected = 5 * world * (world + 1) // 2
    assert run_ranks(processes, world, total, 5) == [(rank, expected) for rank in range(world)]


@pytest.mark.parametrize(("how", "message"), [("raise", "no such thing"), ("kill", "without an answer")])
def test_a_rank_that_fails_is_named_and_the_others_end(processes: ForkServerContext, how: str, message: str):
    with pytest.raises(RuntimeError, match=rf"rank 1[\s\S]*{message}"):
        run_ranks(processes, 2, fail_in, 1, how)


def test_ranks_that_hang_are_killed(processes: ForkServerContext):
    with pytest.raises(RuntimeError, match=r"\[0, 1\] did not answer"):
        run_ranks(processes, 2, fail_in, 5, "none", timeout=1)
