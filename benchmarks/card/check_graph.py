"""Hash, fetch and fuse in one CUDA graph: what it replays is what is computed without it."""

from __future__ import annotations

import torch

from engram_lm.hashing import HashConfig, HashPlan
from engram_lm.memory import Engram, EngramConfig
from engram_lm.model.lookup import Lookup
from engram_lm.tables import DeviceTable, Table
from engram_lm.tables.pinned import PinnedTable
from engram_lm.tables.rows import RowFormat
from engram_lm.tokens import CanonicalVocabulary

from .bench import Bench
from .equal import same
from .timing import captured

VOCABULARY = 1000


def replayed(bench: Bench) -> None:
    """A graph that is captured once gives, for any tokens, the bits of the plain calls."""
    config = HashConfig(orders=(2, 3), heads=2, rows_per_head=500, layers=(0,))
    vocabulary = CanonicalVocabulary.identity(VOCABULARY)
    plan = HashPlan.build(config, vocab_size=VOCABULARY, pad=0)
    form = RowFormat(32, "fp8_e8m0", std=0.5)
    tables: dict[str, type[Table]] = {"device": DeviceTable, "pinned": PinnedTable}
    batch, length, streams, dim = bench.size((8, 64, 4, 256), (1, 4, 2, 16))
    module = Engram(EngramConfig(row_dim=32, conv_kernel=2), dim=dim, streams=streams, rows_per_token=4).to(
        bench.device
    )
    with torch.no_grad():
        module.conv_weight.normal_(generator=bench.generator)
    for name, kind in tables.items():
        lookup = Lookup(vocabulary, plan, kind(plan.num_rows, form, bench.device))
        tokens, hidden = bench.integers(VOCABULARY, batch, length), bench.normal(batch, length, streams, dim)

        @torch.no_grad()
        def work(lookup=lookup, tokens=tokens, hidden=hidden):
            fetch, history = lookup.prefetch(tokens)
            return module(hidden, fetch.rows()[:, :, 0])[0], history

        replay, right = captured(bench, work), True
        for _ in range(3):
            tokens.copy_(bench.integers(VOCABULARY, batch, length))
            hidden.copy_(bench.normal(batch, length, streams, dim))
            right &= all(map(same, [made.clone() for made in replay()], work()))
        bench.check(f"hash, fetch and fuse replayed, table in {name} memory", right)


CHECKS = (replayed,)
