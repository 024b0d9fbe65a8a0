"""Ranks that measure together find what one process finds, whatever the number of batches."""

from multiprocessing.context import ForkServerContext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_parallel import divided_lookup, settings
from tiny import ENGRAM, split

from engram_lm.evaluate.loss import Losses, measure
from engram_lm.model import LanguageModel
from engram_lm.train.loader import windows
from engram_lm.train.ranks import Ranks
from engram_lm.train.sharding import shard_backbone


def losses(limit: int, shard: bool, together: bool) -> Losses:
    torch.manual_seed(0)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    lookup = divided_lookup(ENGRAM, None, settings(ENGRAM))
    everywhere = torch.arange(lookup.table.num_rows)
    lookup.table.write(
        everywhere if ranks.rank == 0 else everywhere[:0], torch.randn(len(everywhere) * (ranks.rank == 0), 4)
    )
    model = LanguageModel.build(ENGRAM).eval()
    if shard:
        shard_backbone(model, dist.device_mesh.init_device_mesh("cpu", (ranks.size,)))
    token_bytes = torch.ones(ENGRAM.vocab_size, dtype=torch.float64)
    return measure(model, lookup, windows(split(40), 3, 12, limit), token_bytes, ranks if together else None)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("limit", [1, 9, 12, 14])
@pytest.mark.parametrize("size", [2, 3])
def test_measured_together(processes: ForkServerContext, size: int, limit: int, shard: bool):
    [truth] = run_ranks(processes, 1, losses, limit, False, False)
    for found in run_ranks(processes, size, losses, limit, shard, True):
        for field in ("nats", "tokens", "bytes"):
            assert np.array_equal(getattr(found, field), getattr(truth, field))
