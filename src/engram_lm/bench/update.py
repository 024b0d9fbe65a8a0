"""A training step's work on the table: fetch distinct rows, apply the optimizer to their gradients, write them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam, SparseAdam

from ..tables import HostTable, RowFormat
from ..train.allocator import keep_freed_memory
from . import peers
from .measure import Contender, Meter
from .results import Results

LR = 0.01
ROOM = 0.6  # of RAM, that the tables of a measurement may take together
COPIES = 9  # of the rows that all contenders hold together: ours 1, SparseAdam 3, dense Adam 4, FBGEMM 1


def bench_update(
    *,
    table_rows: Sequence[int] = (1_000_000, 10_000_000, 100_000_000),
    rows: int = 20_000,
    dim: int = 32,
    rounds: int = 25,
) -> Results:
    """Time of a step on `rows` random rows of `dim` floats, in tables of `table_rows`.

    Our tables of all sizes are first measured together, which shows whether time depends on the size; then each beside
    its peers. Sizes that this machine has no room for are left out.
    """
    keep_freed_memory()
    meter = Meter("update", rounds)
    room = ROOM * meter.machine["ram_gb"]
    fbgemm = peers.FBGEMM.load(meter.left_out)
    what = f"{rows:,} rows x {dim}"

    sizes, taken = [], 0.0
    for size in table_rows:
        need = size * RowFormat(dim).stride / 1e9
        if taken + need <= room:
            sizes.append(size)
            taken += need
        else:
            meter.left_out[f"{size:,} rows"] = f"{need:.1f} GB more than there is room for"
    meter.measure(
        f"{what}, by size of the table", [ours(size, rows, dim, f"{size:,} rows") for size in sizes], awake=True
    )

    for size in sizes:
        need = COPIES * size * dim * 4 / 1e9
        if need > room:
            meter.left_out[f"peers at {size:,} rows"] = (
                f"with their optimizers' states {need:.1f} GB, for which there is no room"
            )
            continue
        contenders = [ours(size, rows, dim), sparse_adam(size, rows, dim), dense_adam(size, rows, dim)]
        if fbgemm is not None:
            contenders.append(rowwise_adagrad(fbgemm, size, rows, dim))
        meter.measure(f"{what} of a table of {size:,}", contenders, awake=True)
        del contenders  # and the tables, before the next ones are made
    return meter.results()


def ours(num_rows: int, rows: int, dim: int, name: str = "engram-lm") -> Contender:
    """A host table."""
    table = HostTable(num_rows, RowFormat(dim))

    def step(ids: Tensor, grads: Tensor) -> Tensor:
        before = table.fetch(ids)
        table.update(ids, grads, LR)
        return before

    def right(before: Tensor, ids: Tensor, grads: Tensor) -> bool:
        good = torch.allclose(table.fetch(ids), before - LR * normalised(grads), atol=1e-6)
        table.store.hold(np.empty(0, np.int64)).records.reshape(-1)[::4096] |= 0  # every page is in memory now
        return good

    return Contender(name, step, right, batches(num_rows, rows, dim), "row-wise Adagrad on a host table")


def sparse_adam(num_rows: int, rows: int, dim: int) -> Contender:
    """torch's lazy Adam, which touches the rows of a sparse gradient."""
    embedding = torch.nn.Embedding(num_rows, dim, sparse=True)
    return _torch(
        "SparseAdam", embedding, SparseAdam(list(embedding.parameters()), lr=LR), batches(num_rows, rows, dim)
    )


def dense_adam(num_rows: int, rows: int, dim: int) -> Contender:
    """torch's Adam, which walks the whole table."""
    embedding = torch.nn.Embedding(num_rows, dim)
    optimizer = Adam(embedding.parameters(), lr=LR, fused=True)
    return _torch("dense Adam", embedding, optimizer, batches(num_rows, rows, dim), "torch's fused one")


def _torch(
    name: str,
    embedding: torch.nn.Embedding,
    optimizer: torch.optim.Optimizer,
    prepare: Callable[[], tuple[Tensor, Tensor]],
    note: str = "",
) -> Contender:
    def step(ids: Tensor, grads: Tensor) -> Tensor:
        before = embedding(ids)
        before.backward(grads)
        optimizer.step()
        optimizer.zero_grad()
        return before.detach()

    def right(before: Tensor, ids: Tensor, grads: Tensor) -> bool:
        moved = (embedding.weight.detach()[ids] - before) / -LR  # Adam's first step: the gradient's sign
        good = torch.allclose(moved[grads.abs() > 1e-2], grads.sign()[grads.abs() > 1e-2], atol=1e-2)
        for state in optimizer.state[embedding.weight].values():
            if isinstance(state, Tensor):
                state.zero_()  # and so in memory, where zeros never written to are not
        return good

    return Contender(name, step, right, prepare, note)


def rowwise_adagrad(fbgemm: peers.FBGEMM, num_rows: int, rows: int, dim: int) -> Contender:
    """FBGEMM's table, with the same optimizer as ours."""
    table = fbgemm.rowwise_adagrad(num_rows, dim, LR)
    ends = torch.tensor([0, rows])

    def step(ids: Tensor, grads: Tensor) -> Tensor:
        before = table(ids, ends)
        before.backward(grads)
        return before.detach()

    def right(before: Tensor, ids: Tensor, grads: Tensor) -> bool:
        good = torch.allclose(table(ids, ends), before - LR * normalised(grads), atol=1e-6)
        for memory in (table.weights_host, table.momentum1_host):
            memory.data.zero_()  # in memory, likewise
        return good

    note = "1.8.0, table-batched embedding for training on a CPU, row-wise Adagrad; no pooling, no check of ids"
    return Contender("FBGEMM", step, right, batches(num_rows, rows, dim), note)


def batches(num_rows: int, rows: int, dim: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """New ids, distinct and ascending as deduplication gives them, and new gradients for every step."""

    def some() -> tuple[Tensor, Tensor]:
        ids = torch.randint(num_rows, (4 * rows,)).unique()
        chosen = torch.randperm(len(ids))[:rows].sort().values
        return ids[chosen], torch.randn(len(chosen), dim)

    return some


def normalised(grads: Tensor) -> Tensor:
    """A row's first step at a learning rate of one."""
    return grads / grads.square().mean(dim=1, keepdim=True).sqrt()
