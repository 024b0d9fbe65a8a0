"""Rows divided among processes, each of which keeps a contiguous range of them, on any tier.

    ids      distinct and ascending, so what goes to each owner is a slice          all-to-all
    rows     come back as the bytes in which they are kept, in the order of ids     all-to-all
    grads    float32, one sum a distinct row and process, go to the owners          all-to-all
             which add them up in the order of ranks and apply the row-wise update

Nothing is padded and no row travels twice in a step. Fetching ahead sends the ids and starts the owners' reads; the rows
themselves wait for the last update (`Fetch.begin`) and then travel while the first blocks compute.

Every method but `check` is collective: all ranks call it, in the same order, each with ids of its own.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, MismatchError
from . import codec
from .base import Fetch, Table
from .dedup import deduplicate
from .expand import add_up
from .pieces import load_table, piece_name
from .rows import RowFormat
from .tiers import TableConfig, build_table

NEAR = torch.iinfo(torch.int32).max  # rows of a shard that four bytes tell apart


def first_row(num_rows: int, rank: int, size: int) -> int:
    """Where the range of a rank begins; that of rank `size` is the end."""
    return rank * num_rows // size


def part_of(form: RowFormat, num_rows: int, rank: int, size: int) -> tuple[RowFormat, int]:
    """Format and number of the rows that a rank keeps."""
    first = first_row(num_rows, rank, size)
    return replace(form, first=first), first_row(num_rows, rank + 1, size) - first


@dataclass
class Sent:
    """Bytes that this rank has sent to others."""

    counts: int = 0
    ids: int = 0
    rows: int = 0
    grads: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.counts + self.ids + self.rows + self.grads


class Lanes(NamedTuple):
    """Process groups of the same ranks, one for each thing that may be under way beside the others."""

    ids: dist.ProcessGroup
    rows: dist.ProcessGroup
    grads: dist.ProcessGroup


class ShardedTable(Table):
    """`num_rows` rows, of which each rank of the lanes keeps those of its `shard`.

    shard: this rank's rows, see `part_of`; a table in RAM or on disk delivers them to the CPU. device: where rows are delivered
    and exchanged. Raises MismatchError for a shard of other rows than this rank's.
    """

    def __init__(self, shard: Table, num_rows: int, lanes: Lanes, device: torch.device | str = "cpu") -> None:
        super().__init__(num_rows, replace(shard.form, first=0), device)
        self.address_device = shard.address_device
        self.shard, self.lanes = shard, lanes
        self.rank, self.size = dist.get_rank(lanes.ids), dist.get_world_size(lanes.ids)
        if (shard.form, shard.num_rows) != (expected := part_of(self.form, num_rows, self.rank, self.size)):
            raise MismatchError(
                f"rank {self.rank} of {self.size} keeps {expected[1]:,} rows from number {expected[0].first:,}, but was given "
                f"{shard.num_rows:,} from {shard.form.first:,}: others would have looked for rows where they are not."
            )
        self.edges = torch.tensor([first_row(num_rows, rank, self.size) for rank in range(self.size + 1)])
        self.edges = self.edges.to(self.address_device)
        self.offset_type = torch.int32 if -(-num_rows // self.size) <= NEAR else torch.int64
        self.sent = Sent()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="engram-rows")

    @property
    def resident(self) -> int:
        """Bytes of memory that this rank's rows take."""
        return self.shard.resident

    @property
    def clock(self) -> int:  # type: ignore[override]
        """Updates so far, the same on every rank."""
        return self.shard.clock

    def bind(self, digest: str, num_rows: int) -> None:
        """Tie every rank's rows to a plan."""
        super().bind(digest, num_rows)
        self.shard.bind(digest, self.shard.num_rows)

    def fetch(self, ids: Tensor, *, encoded: bool = False) -> Tensor:
        """Rows [..., d] of this rank's ids [...], or their bytes."""
        return self.prefetch(ids, encoded=encoded).rows()

    def prefetch(self, ids: Tensor, *, encoded: bool = False) -> Exchange:
        """Send the ids to their owners, which start to read."""
        return Exchange(self, ids, encoded=encoded)

    def update(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Row-wise Adagrad on the ids of all ranks, distinct on each, with the sums of their gradients."""
        self.apply(*self.prefetch(ids).collect(ids, grads), lr)

    def apply(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """The same with gradients that were collected; their ids count from this rank's first row."""
        self.shard.update(ids, grads, lr)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Set rows of ids that are distinct over all ranks."""
        exchange = self.prefetch(ids)
        self.shard.write(exchange.asked, exchange.give(rows))

    def restore(self, ids: Tensor, records: Tensor) -> None:
        """Set whole records of ids that are distinct over all ranks."""
        exchange = self.prefetch(ids)
        self.shard.restore(exchange.asked, exchange.give(records))

    def begin(self, *, again: bool = False) -> None:
        """Every rank's shard."""
        self.shard.begin(again=again)

    def save(self, directory: Path) -> None:
        """Every rank's shard, each in a folder of its own."""
        piece = directory / piece_name(self.rank, self.size)
        piece.mkdir()
        self.shard.save(piece)

    def load(self, directory: Path, clock: int) -> None:
        """What this or any other number of ranks has saved there; each reads no more than the rows that it keeps."""
        load_table(self.shard, directory, clock, piece_name(self.rank, self.size))

    def settle(self, clock: int) -> None:
        """Every rank's shard."""
        self.shard.settle(clock)

    def close(self) -> None:
        """Wait for rows under way and release the shard."""
        self.worker.shutdown()
        self.shard.close()


def build_sharded(
    config: TableConfig,
    num_rows: int,
    dim: int,
    *,
    digest: str,
    directory: Path,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup,
) -> ShardedTable:
    """A table of the configured tier divided among the ranks of a group, all of which call this; on disk a file each.

    Raises ConfigError for a table that is not exact, and what `build_table` raises.
    """
    if config.asynchronous:
        raise ConfigError(
            "table.asynchronous lets rows miss updates; among several ranks each would miss others of them."
        )
    device, rank, size = torch.device(device), dist.get_rank(group), dist.get_world_size(group)
    tier = config.tier_on(device)
    if tier == "disk":
        file = Path(config.file) if config.file else directory / "table.safetensors"
        config = replace(config, file=str(file.with_name(f"{file.stem}-{rank}-of-{size}{file.suffix}")))
    part, rows = part_of(config.form(dim), num_rows, rank, size)
    where = device if tier == "device" else "cpu"  # else rows go on to the device by themselves
    config = replace(config, tier=tier)
    shard = build_table(config, rows, dim, digest=digest, directory=directory, device=where, first=part.first)
    ranks = dist.get_process_group_ranks(group)
    return ShardedTable(shard, num_rows, Lanes(*(dist.new_group(ranks) for _ in Lanes._fields)), device)


class Exchange(Fetch):
    """Rows [..., d] that lie with their owners. The ids are there already: `asked` are those that all ranks want from this one."""

    def __init__(self, table: ShardedTable, ids: Tensor, *, encoded: bool = False) -> None:
        self.table, self.shape, self.encoded = table, ids.shape, encoded
        flat = table.check(ids.to(table.address_device))
        self.inverse: Tensor | None = None  # of ids that are distinct and ascending already, as those of a batch are
        if not bool((flat[1:] > flat[:-1]).all()):
            flat, self.inverse = deduplicate(flat)
        self.unique = flat
        wanted = torch.searchsorted(flat, table.edges).diff()  # [size] ids that each owner has
        offsets = flat - table.edges[:-1].repeat_interleave(wanted, output_size=len(flat))
        asked = torch.empty_like(wanted)
        dist.all_to_all_single(asked, wanted, group=table.lanes.ids)
        table.sent.counts += (table.size - 1) * wanted.element_size()
        self.wanted, self.served = wanted.tolist(), asked.tolist()
        there = self._exchange("ids", offsets.to(table.offset_type), self.wanted, self.served)
        self.asked = there.long()  # [R] from this rank's first row, rank after rank, each rank's ascending
        self.read = table.shard.prefetch(self.asked, encoded=True)
        self.travelling: Future[Tensor] | None = None

    def begin(self) -> None:
        """Read and send what was asked for, on a thread of its own."""
        self.travelling = self.table.worker.submit(self._travel)

    def rows(self) -> Tensor:
        """Wait for the rows."""
        data = self.travelling.result() if self.travelling else self._travel()
        rows = data if self.encoded else codec.decode(self.table.form, data, self.unique.to(data.device))
        if self.inverse is not None:
            rows = rows.index_select(0, self.inverse.to(rows.device))
        return rows.view(*self.shape, rows.shape[1])

    def collect(self, ids: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients [U, d] -> of this rank's rows that any rank has asked for, summed in the order of ranks."""
        unique, inverse = deduplicate(self.asked)
        return unique, add_up(self.give(grads.float()), inverse.to(self.table.device), len(unique))

    def give(self, data: Tensor) -> Tensor:
        """[U, ...] for the distinct ids, as they were asked for -> [R, ...] for `asked`."""
        data = data.to(self.table.device)
        if self.inverse is not None:
            data = torch.empty_like(data).index_copy_(0, self.inverse.to(data.device), data)
        return self._exchange("grads", data, self.wanted, self.served)

    def _travel(self) -> Tensor:
        """Bytes [U, wire] of the distinct ids."""
        return self._exchange("rows", self.read.rows().to(self.table.device), self.served, self.wanted)

    def _exchange(self, lane: str, data: Tensor, give: list[int], take: list[int]) -> Tensor:
        """data [sum of give, ...], so many for each rank -> [sum of take, ...] from each."""
        table, received = self.table, data.new_empty(sum(take), *data.shape[1:])
        dist.all_to_all_single(received, data.contiguous(), take, give, group=getattr(table.lanes, lane))
        others = (len(data) - give[table.rank]) * math.prod(data.shape[1:]) * data.element_size()
        setattr(table.sent, lane, getattr(table.sent, lane) + others)
        return received
