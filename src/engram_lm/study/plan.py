"""A table on many ranks, on paper: bytes a step over each wire, time at given bandwidths, memory a rank, price of each tier.

Rows are owned by contiguous ranges, equal over the ranks. In a step each rank asks for the distinct rows of its batch:

    out    numbers of the rows, within the owner's range     4 bytes each (8 where a range has more than 2^31 rows)
    back   the rows as they are encoded                      row_bytes each
    out    their gradients, in training                      4 bytes a number

(W - 1) / W of its rows belong to others, on average over W ranks. All figures are of one rank and one step, averages unless
they say otherwise; GB are 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError
from ..hashing import HashConfig
from ..memory import EngramConfig
from ..model.count import count
from ..model.lm import ModelConfig
from ..tables import RowFormat
from .growth import Growth, distinct_rows, head_sizes, owner_shares

TierName = Literal["HBM", "DRAM", "NVMe"]
PAGE = 4096  # bytes that a disk reads at least
GRADIENT = 4  # bytes of a number's gradient
NUMBER = 8  # bytes of a row's number in the journal of a table on disk
COUNT = 8  # bytes by which a rank tells another how many rows it asks of it


@dataclass(frozen=True)
class Tables:
    """The tables of a memory, and what surrounds them.

    vocab_size: tokens of its tokenizer. dense: parameters whose gradients all ranks sum, neither rows nor routed experts; None
    where that is not known.
    """

    name: str
    hash: HashConfig
    form: RowFormat
    vocab_size: int
    dense: int | None = None

    @staticmethod
    def deepseek_v41() -> Tables:
        """DeepSeek-V4.1-Flash's: 2 layers x 384 M rows of 264 bytes. How many of its parameters are dense is not published."""
        form = RowFormat(EngramConfig.deepseek_v41().row_dim, "fp8_e8m0")
        return Tables("deepseek-v41", HashConfig.deepseek_v41(), form, 129_280)

    @staticmethod
    def of(name: str, model: ModelConfig) -> Tables:
        """A model's, with rows in float32. Raises ConfigError for one without a memory."""
        if model.memory is None:
            raise ConfigError(f"{name} has no memory, so no rows that could be spread over ranks.")
        counted = count(model)
        dense = counted.total - counted.tables - counted.experts
        return Tables(name, model.memory.hash, RowFormat(model.memory.engram.row_dim), model.vocab_size, dense)

    def scaled(self, factor: float) -> Tables:
        """The same with so many times the rows of every head."""
        if factor == 1:
            return self
        rows = tuple(round(rows * factor) for rows in self.hash.rows_by_order)
        return replace(self, name=f"{self.name} x {factor:g}", hash=replace(self.hash, rows_per_head=rows))

    @property
    def num_rows(self) -> int:
        """Of all layers."""
        return int(head_sizes(self.hash).sum())

    @property
    def nbytes(self) -> int:
        """Of all rows, with their accumulators if they are trained."""
        return self.num_rows * self.form.stride

    @property
    def reads(self) -> int:
        """Rows that a token reads, in all layers."""
        return len(self.hash.layers) * self.hash.rows_per_token


@dataclass(frozen=True)
class Machine:
    """What one rank has of each wire: its share, where ranks share one. GB/s in one direction.

    node: ranks that a node holds, between which nothing goes over the network.
    """

    node: int = 8
    """Ranks a node; what they send one another does not go over the network."""
    network: float = 50.0
    """GB/s of network a rank: 400 Gb/s, one adapter a GPU."""
    inside: float = 300.0
    """GB/s between ranks of a node: round figure for GPUs joined by NVLink. Without it, as much as the bus."""
    bus: float = 55.0
    """GB/s between host RAM and GPU: PCIe 5.0 x 16, about 64 less what protocol takes."""
    ram: float = 40.0
    """GB/s of host RAM a rank at random rows: round figure for an eighth of a two-socket node at half of its streaming rate."""
    disk: float = 7.0
    """GB/s of NVMe a rank: one PCIe 4.0 x 4 drive."""
    iops: float = 1.0
    """Million random reads a second of NVMe a rank: one such drive, round figure."""

    def __post_init__(self) -> None:
        speeds = (self.network, self.inside, self.bus, self.ram, self.disk, self.iops)
        if self.node < 1 or min(speeds) <= 0:
            raise ConfigError(f"a machine has ranks a node and speeds above 0, got {self}.")

    def ranks_a_node(self, ranks: int) -> int:
        """How many of `ranks` share a node. Raises ConfigError when they do not fill their nodes."""
        node = min(self.node, ranks)
        if ranks < 1 or ranks % node:
            raise ConfigError(f"{ranks} ranks do not fill nodes of {self.node}: traffic between them would be wrong.")
        return node


@dataclass(frozen=True)
class Prices:
    """Assumed prices of a GB: round figures to compare by, not quotations."""

    hbm: float = 200.0
    """$ a GB of HBM. Assumption: it comes only with an accelerator, here one of 100 GB for $ 20,000. Put in yours."""
    dram: float = 10.0
    """$ a GB of DRAM. Assumption: a twentieth of HBM's, modules alone, for a host that is there anyway. Put in yours."""
    nvme: float = 0.2
    """$ a GB of NVMe. Assumption: a fiftieth of DRAM's, drives alone, for a host that is there anyway. Put in yours."""

    def __post_init__(self) -> None:
        if min(self.hbm, self.dram, self.nvme) < 0:
            raise ConfigError(f"prices are at least 0, got {self}.")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends to others in a step, averaged over ranks; it receives as many."""

    ids: float  # numbers of the rows that it asks for
    rows: float  # that it owns and others asked for
    grads: float
    counts: float  # how many rows it asks of each

    @property
    def total(self) -> float:
        """All of them."""
        return self.ids + self.rows + self.grads + self.counts


def traffic(rows: float, ranks: int, form: RowFormat, *, id_bytes: int = 4) -> Traffic:
    """What a step of `ranks` ranks sends in which each asks for `rows` rows; no gradients if these are only read.

    Where rows have a spread, records travel whole: an accumulator of zero tells the reader that a row was never written.
    """
    others = rows * (ranks - 1) / ranks
    return Traffic(
        ids=others * id_bytes,
        rows=others * (form.stride if form.std else form.row_bytes),
        grads=others * GRADIENT * form.dim * form.trainable,
        counts=COUNT * (ranks - 1),
    )


def id_bytes(num_rows: int, ranks: int) -> int:
    """Of a row's number within its owner's range."""
    return 4 if -(-num_rows // ranks) <= 2**31 else 8


@dataclass(frozen=True)
class Seconds:
    """What a step waits for if nothing overlaps. The busiest owner counts, since all wait for it."""

    network: float  # between nodes
    inside: float  # between ranks of a node
    bus: float  # between host RAM and GPU
    ram: float
    disk: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.network + self.inside + self.bus + self.ram + self.disk


@dataclass(frozen=True)
class Tier:
    """The table in one kind of memory."""

    name: TierName
    price: float  # $ of all of it
    seconds: Seconds


@dataclass(frozen=True)
class Placement:
    """A table on `ranks` ranks that read `tokens` tokens each a step."""

    name: str
    num_rows: int
    table_bytes: int
    ranks: int
    tokens: int
    reads: int  # of rows, each counted as often as a token names it
    distinct: float  # rows that a rank asks for
    everywhere: float  # rows that any rank asks for
    distinct_extrapolated: bool  # whether `distinct` rests on larger batches than were counted
    everywhere_extrapolated: bool
    busiest: float  # rows asked of the busiest owner, over the mean
    rank_bytes: float  # of the table
    step_bytes: float  # of a step's distinct rows in float32, and of their gradients
    sent: Traffic
    sent_undeduplicated: Traffic  # if each read were sent for itself
    network_bytes: float  # of `sent`, what goes to other nodes
    bus_bytes: float  # rows from host RAM to the GPU, and gradients back; not from HBM
    disk_reads: float  # rows that are not in RAM; not from HBM or DRAM
    disk_written: float  # bytes of changed rows
    dense_bytes: float | None  # that a rank sends to sum the dense parameters' gradients (ring)
    tiers: tuple[Tier, ...]


def place(
    tables: Tables,
    growth: Growth,
    *,
    ranks: int,
    tokens: int,
    machine: Machine | None = None,
    prices: Prices | None = None,
    cached: float = 0.0,
) -> Placement:
    """Spread `tables` over `ranks` ranks that read `tokens` tokens of text like `growth`'s each a step.

    cached: share of a step's rows that RAM holds already, of a table on NVMe. Raises ConfigError when ranks do not fill nodes.
    """
    machine, prices, form = machine or Machine(), prices or Prices(), tables.form
    node = machine.ranks_a_node(ranks)
    if not 0 <= cached <= 1:
        raise ConfigError(f"a share of rows in RAM lies between 0 and 1, got {cached}.")
    sizes = head_sizes(tables.hash)
    rows = distinct_rows(sizes, growth.at(tokens))
    distinct = float(rows.sum())
    of_all = distinct_rows(sizes, growth.at(tokens * ranks))
    everywhere = float(of_all.sum())
    busiest, fullest = (float(owner_shares(sizes, asked, ranks).max() * ranks) for asked in (rows, of_all))

    wide = id_bytes(tables.num_rows, ranks)
    sent = traffic(distinct, ranks, form, id_bytes=wide)
    away = (ranks - node) / (ranks - 1) if ranks > 1 else 0.0  # of the others, the share on other nodes
    gradients = GRADIENT * form.dim * form.trainable
    bus = distinct * (form.row_bytes + gradients)
    mine = everywhere / ranks  # rows of a rank's range that somebody asks for
    disk_reads, disk_written = mine * (1 - cached), mine * (form.stride + NUMBER) * form.trainable
    in_ram = distinct * form.row_bytes + 2 * mine * form.stride * form.trainable  # an update reads a row and writes it

    in_hbm = Seconds(
        network=busiest * sent.total * away / (1e9 * machine.network),
        inside=busiest * sent.total * (1 - away) / (1e9 * machine.inside),
        bus=0.0,
        ram=0.0,
        disk=0.0,
    )
    in_dram = replace(in_hbm, bus=busiest * bus / (1e9 * machine.bus), ram=busiest * in_ram / (1e9 * machine.ram))
    reading = max(disk_reads / (1e6 * machine.iops), disk_reads * PAGE / (1e9 * machine.disk))
    on_disk = replace(in_dram, disk=fullest * (reading + disk_written / (1e9 * machine.disk)))
    return Placement(
        name=tables.name,
        num_rows=tables.num_rows,
        table_bytes=tables.nbytes,
        ranks=ranks,
        tokens=tokens,
        reads=tokens * tables.reads,
        distinct=distinct,
        everywhere=everywhere,
        distinct_extrapolated=not growth.reaches(tokens),
        everywhere_extrapolated=not growth.reaches(tokens * ranks),
        busiest=busiest,
        rank_bytes=tables.nbytes / ranks,
        step_bytes=distinct * 4 * form.dim * (1 + form.trainable),
        sent=sent,
        sent_undeduplicated=traffic(tokens * tables.reads, ranks, form, id_bytes=wide),
        network_bytes=sent.total * away,
        bus_bytes=bus,
        disk_reads=disk_reads,
        disk_written=disk_written,
        dense_bytes=None if tables.dense is None else 2 * (ranks - 1) / ranks * GRADIENT * tables.dense,
        tiers=(
            Tier("HBM", tables.nbytes * prices.hbm / 1e9, in_hbm),
            Tier("DRAM", tables.nbytes * prices.dram / 1e9, in_dram),
            Tier("NVMe", tables.nbytes * prices.nvme / 1e9, on_disk),
        ),
    )
