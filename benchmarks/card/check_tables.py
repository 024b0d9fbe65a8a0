"""Tables on the device and in pinned host memory: the rows of the slow truth, whatever is updated while they travel."""

from __future__ import annotations

import torch

from engram_lm.tables import DeviceTable, Table
from engram_lm.tables.base import Fetch
from engram_lm.tables.pinned import PinnedTable
from engram_lm.tables.rows import ENCODINGS, RowFormat

from .bench import Bench, without_kernels
from .equal import same


def rows_that_travel(bench: Bench) -> None:
    """Fetched ahead, updated meanwhile, written back: the truth's rows at every step, and its records in the end."""
    num_rows, count = bench.size((3000, 900), (30, 9))
    for encoding in bench.size(ENCODINGS, ("fp8_e8m0",)):
        form = RowFormat(64, encoding, std=0.1, seed=5)
        truth = DeviceTable(num_rows, form)
        tables: dict[str, Table] = {
            "device": DeviceTable(num_rows, form, bench.device),
            "pinned": PinnedTable(num_rows, form, bench.device),
        }
        tables["pinned, some hot"] = hot = PinnedTable(num_rows, form, bench.device)
        hot.keep(torch.arange(0, num_rows, 3).numpy(), 100 * form.stride)
        right = dict.fromkeys(tables, True)
        ahead: dict[str, Fetch] = {}
        ids = distinct(bench, num_rows, count)
        for _ in range(4):
            upcoming, grads = distinct(bench, num_rows, count), bench.normal(count, form.dim)
            with without_kernels():
                want = truth.fetch(ids.cpu())
                truth.update(ids.cpu(), grads.cpu(), 0.1)
            for name, table in tables.items():
                rows = (ahead[name] if name in ahead else table.prefetch(ids)).rows()
                right[name] &= same(rows, want)
                ahead[name] = table.prefetch(upcoming)  # begins before the update
                table.update(ids, grads, 0.1)
            ids = upcoming
        with without_kernels():
            want = truth.fetch(ids.cpu())
        for name, table in tables.items():
            right[name] &= same(ahead[name].rows(), want)
            bench.check(f"{encoding}, {name}", right[name] and same(table.settled(), truth.settled()))


def distinct(bench: Bench, limit: int, count: int) -> torch.Tensor:
    return torch.randperm(limit, device=bench.device, generator=bench.generator)[:count].sort().values


CHECKS = (rows_that_travel,)
