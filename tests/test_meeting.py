"""Ranks agree on a name for each start, whatever an earlier start has left in their store."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from engram_lm.errors import TrainingError
from engram_lm.train.meeting import start_name


def names(
    store: dist.Store, size: int, absent: set[int] = frozenset(), seed: int = 0, timeout: float = 30
) -> list[str]:
    """What each rank that is there says, each coming when it likes."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        try:
            return start_name(store, rank, size, timeout)
        except TrainingError as error:
            return str(error)

    delays = [random.Random(seed + rank).random() / 20 for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(come, sorted(set(range(size)) - absent)))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_start_has_a_name_of_its_own(size: int):
    store = dist.HashStore()
    starts = [names(store, size, seed=seed) for seed in range(0, 40, 10)]
    assert all(len(set(start)) == 1 for start in starts)
    assert len({start[0] for start in starts}) == 4


def test_a_start_that_failed_leaves_nothing_that_misleads_the_next():
    store = dist.HashStore()
    assert names(store, 3, {2}, timeout=0.3)[0] == "rank 0: ranks [2] did not come within 0.3 s."
    assert names(store, 3, {0}, timeout=0.3) == [f"rank {rank}: rank 0 did not come within 0.3 s." for rank in (1, 2)]
    assert len(set(names(store, 3))) == 1
