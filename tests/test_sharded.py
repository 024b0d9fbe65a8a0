"""Rows divided among 1 to 4 ranks are those of one table, bit for bit, on every tier; any number of ranks reads what any other saved."""

from itertools import product
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from engram_lm.errors import CheckpointError, MismatchError
from engram_lm.tables import DeviceTable, HostTable, RowFormat, Table, TableConfig, build_table
from engram_lm.tables.pieces import load_table
from engram_lm.tables.rows import ENCODINGS
from engram_lm.tables.sharded import Lanes, ShardedTable, part_of

ROWS, DIM, STEPS = 301, 12, 4
TIERS = ("device", "host", "disk", "disk without cache")


def divided(form: RowFormat, tier: str, directory: Path) -> ShardedTable:
    rank, size = dist.get_rank(), dist.get_world_size()
    part, rows = part_of(form, ROWS, rank, size)
    config = TableConfig(
        tier=tier.split()[0],  # type: ignore[arg-type]
        encoding=form.encoding,
        std=form.std,
        seed=form.seed,
        memory=0 if tier == "disk without cache" else 1e-5,
        file=str(directory / f"shard-{rank}-of-{size}.safetensors") if tier.startswith("disk") else "",
    )
    shard = build_table(config, rows, DIM, digest="plan", directory=directory, first=part.first)
    table = ShardedTable(shard, ROWS, Lanes(*(dist.new_group() for _ in range(3))))
    table.bind("plan", ROWS)
    return table


def batch(step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids of one rank, some of which others have too, and gradients whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randperm(ROWS, generator=generator)[: 40 // size + 3 * rank].sort().values
    return ids, torch.randint(-8, 9, (len(ids), DIM), generator=generator) / 4


def everything(table: Table) -> torch.Tensor:
    return table.fetch(torch.arange(ROWS))


def truth(form: RowFormat, size: int, steps: int) -> DeviceTable:
    """One table that has taken the same steps."""
    table = DeviceTable(ROWS, form)
    for step in range(steps):
        ids, grads = zip(*(batch(step, rank, size) for rank in range(size)), strict=True)
        unique, inverse = torch.cat(ids).unique(return_inverse=True)
        table.update(unique, torch.zeros(len(unique), DIM).index_add_(0, inverse, torch.cat(grads)), lr=0.5)
    return table


# --- rows and updates -----------------------------------------------------------------------------------------------


def train(form: RowFormat, tier: str, directory: Path) -> list[torch.Tensor]:
    """Rows as each step fetched them ahead, and all of them at the end."""
    table, rank, size = divided(form, tier, directory), dist.get_rank(), dist.get_world_size()
    table.begin()
    found, fetch = [], table.prefetch(batch(0, rank, size)[0])
    for step in range(STEPS):
        ids, grads = batch(step, rank, size)
        fetch.begin()
        found.append(fetch.rows())
        coming = table.prefetch(batch(step + 1, rank, size)[0])
        table.apply(*fetch.collect(ids, grads), lr=0.5)
        fetch = coming
    assert table.clock == STEPS
    rows = everything(table)
    table.close()
    return [*found, rows]


FORMS = [*((encoding, 0.0) for encoding in ENCODINGS), ("bf16", 0.3)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("encoding", "std", "tier"),
    [
        (*form, tier)
        for form, tier in product(FORMS, TIERS)
        if tier in ("device", "host") or form[1] or form[0] == "fp8_e8m0"
    ],
)
def test_any_number_of_ranks_has_the_rows_of_one(
    processes: ForkServerContext, encoding: Any, std: float, tier: str, size: int, tmp_path: Path
):
    form = RowFormat(DIM, encoding, std=std, seed=3)
    results = run_ranks(processes, size, train, form, tier, tmp_path)
    tables = [truth(form, size, steps) for steps in range(STEPS + 1)]
    for rank, found in enumerate(results):
        for step in range(STEPS):
            assert torch.equal(found[step], tables[step].fetch(batch(step, rank, size)[0]))
        assert torch.equal(found[-1], everything(tables[-1]))


def odd_requests(form: RowFormat) -> tuple[bool, ...]:
    """Repeats, no order, no ids at all, ids of one owner alone; rows set from any rank."""
    table, rank, size = divided(form, "host", Path()), dist.get_rank(), dist.get_world_size()
    table.update(*batch(0, rank, size), lr=0.5)
    one = truth(form, size, 1)
    shaped = torch.tensor([[[300, 3], [3, 0]], [[rank, rank], [7, 150]]])
    nothing = torch.empty(0, 2, dtype=torch.int64)
    ids = nothing.flatten() if rank else torch.tensor([5, 1, 300])
    rows = torch.arange(len(ids) * DIM, dtype=torch.float32).view(-1, DIM)
    answers = [torch.equal(table.fetch(shaped), one.fetch(shaped)), table.fetch(nothing).shape == (0, 2, DIM)]
    mine = nothing.flatten() if rank == 0 else torch.arange(4)
    answers.append(torch.equal(table.fetch(mine), one.fetch(mine)))
    table.write(ids, rows)
    one.write(torch.tensor([5, 1, 300]), torch.arange(3 * DIM, dtype=torch.float32).view(-1, DIM))
    table.update(ids, rows, lr=0.1)
    one.update(torch.tensor([5, 1, 300]), torch.arange(3 * DIM, dtype=torch.float32).view(-1, DIM), lr=0.1)
    answers.append(torch.equal(everything(table), everything(one)))
    with pytest.raises(IndexError, match="301"):
        table.fetch(torch.tensor([301]))
    return tuple(answers)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ids_of_any_order_number_and_owner(processes: ForkServerContext, size: int):
    for answers in run_ranks(processes, size, odd_requests, RowFormat(DIM, "bf16", seed=1)):
        assert answers == (True, True, True, True)


def bytes_sent(form: RowFormat) -> tuple[int, int, int, int]:
    table, rank, size = divided(form, "host", Path()), dist.get_rank(), dist.get_world_size()
    ids, grads = batch(0, rank, size)
    fetch = table.prefetch(ids)
    fetch.rows()
    fetch.collect(ids, grads)
    sent = table.sent
    return sent.counts, sent.ids, sent.rows, sent.grads


@pytest.mark.parametrize("size", [1, 2, 4])
def test_only_distinct_ids_and_rows_travel(processes: ForkServerContext, size: int):
    form = RowFormat(DIM, "fp8_e8m0")
    owner = torch.tensor([rank for rank in range(size) for _ in range(part_of(form, ROWS, rank, size)[1])])
    asked = [owner[batch(0, rank, size)[0]].bincount(minlength=size) for rank in range(size)]
    for rank, sent in enumerate(run_ranks(processes, size, bytes_sent, form)):
        away = int(asked[rank].sum() - asked[rank][rank])
        served = int(sum(each[rank] for each in asked) - asked[rank][rank])
        assert sent == (8 * (size - 1), 4 * away, form.row_bytes * served, 4 * DIM * away)


def test_a_shard_of_other_rows_is_refused(processes: ForkServerContext):
    with pytest.raises(RuntimeError, match="where they are not"):
        run_ranks(processes, 2, wrong_shard)


def wrong_shard() -> None:
    form = RowFormat(DIM)
    ShardedTable(HostTable(150, form), ROWS, Lanes(*(dist.new_group() for _ in range(3))))


# --- saved and loaded -----------------------------------------------------------------------------------------------


def save(form: RowFormat, tier: str, directory: Path, as_if: int) -> None:
    """Two commits of the steps of `as_if` ranks, all of whose batches rank 0 has."""
    table = divided(form, tier, directory)
    table.begin()
    for step in range(4):
        ids, grads = zip(*(batch(step, rank, as_if) for rank in range(as_if)), strict=True)
        unique, inverse = torch.cat(ids).unique(return_inverse=True)
        grads = torch.zeros(len(unique), DIM).index_add_(0, inverse, torch.cat(grads))
        none = slice(None if dist.get_rank() == 0 else 0)
        table.update(unique[none], grads[none], lr=0.5)
        if step in (1, 2):
            (directory / str(step)).mkdir(exist_ok=True)
            table.save(directory / str(step))
    table.close()


def load(form: RowFormat, tier: str, directory: Path, saved: Path, as_if: int) -> torch.Tensor:
    """The rows after going on with step 2 from the first commit."""
    table, rank = divided(form, tier, directory), dist.get_rank()
    table.load(saved, 2)
    ids, grads = zip(*(batch(2, rank, as_if) for rank in range(as_if)), strict=True)
    unique, inverse = torch.cat(ids).unique(return_inverse=True)
    none = slice(None if rank == 0 else 0)
    table.update(unique[none], torch.zeros(len(unique), DIM).index_add_(0, inverse, torch.cat(grads))[none], lr=0.5)
    assert table.clock == 3
    rows = everything(table)
    table.close()
    return rows


@pytest.mark.parametrize(
    ("tier", "before", "after"),
    [
        *product(["host"], (1, 2, 3, 4), (1, 2, 3, 4)),
        *(("disk", *pair) for pair in ((1, 1), (1, 4), (2, 3), (3, 3), (4, 2))),
    ],
)
def test_saved_by_so_many_ranks_and_read_by_others(
    processes: ForkServerContext, tier: str, before: int, after: int, tmp_path: Path
):
    form = RowFormat(DIM, "bf16", std=0.2, seed=9)
    run_ranks(processes, before, save, form, tier, tmp_path, 2)
    expected = everything(truth(form, 2, 3))
    for other in {tier, "host" if tier == "disk" else "device"}:
        for rows in run_ranks(processes, after, load, form, other, tmp_path, tmp_path / "1", 2):
            assert torch.equal(rows, expected)


def test_one_process_reads_the_pieces_and_misses_those_that_are_gone(processes: ForkServerContext, tmp_path: Path):
    form = RowFormat(DIM, "int8", seed=9)
    run_ranks(processes, 3, save, form, "host", tmp_path, 2)
    table = HostTable(ROWS, form)
    table.bind("plan", ROWS)
    load_table(table, tmp_path / "1", 2)
    assert torch.equal(everything(table), everything(truth(form, 2, 2)))
    assert table.clock == 2
    with pytest.raises(MismatchError, match="holds 2 updates"):
        load_table(table, tmp_path / "1", 2)
    with pytest.raises(MismatchError, match="other numbers"):
        load_table(HostTable(ROWS, form), tmp_path / "1", 2)
    for file in (tmp_path / "1" / "table-1-of-3").iterdir():
        file.unlink()
    (tmp_path / "1" / "table-1-of-3").rmdir()
    again = HostTable(ROWS, form)
    again.bind("plan", ROWS)
    with pytest.raises(CheckpointError, match="100 of 301 rows"):
        load_table(again, tmp_path / "1", 2)
