"""512 sequences decoding a token each: a 4B-shaped dense model without a memory, and with V4.1's on either side of the bus.

A step is one CUDA graph, from the tokens to the likeliest next ones: hash, fetch on a side stream, blocks, head. Its context is
short, which is the hard case: the step is as short as it can be, and so is the first block, under which the rows arrive. Every
replay is given other tokens and histories, so its rows are anywhere in the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashConfig, HashPlan
from engram_lm.memory import EngramConfig
from engram_lm.model import AttentionConfig, LanguageModel, MemoryConfig, ModelConfig, ModelState, get_preset
from engram_lm.model.lookup import Lookup
from engram_lm.tables import DeviceTable, Table
from engram_lm.tables.pinned import PinnedTable
from engram_lm.tables.rows import RowFormat, decode, encode
from engram_lm.tokens import CanonicalVocabulary

from .bench import Bench
from .samples import at_most
from .timing import captured, compare

FORM = RowFormat(256, "fp8_e8m0", trainable=False)
PARAMETERS = 100_000_000_000
SHARE = 0.85  # of the host's memory
RESERVE = 16e9  # bytes of device memory that stay free beside model and table
PERIOD = 1 << 18  # rows after which a filled table repeats itself
CONTEXT = 16
SETS = 8  # of tokens and histories, in turn


def run(bench: Bench) -> None:
    """The largest table that host memory takes, up to 100 B parameters, and as much of it on the device as fits there."""
    decoder = Decoder.build(bench)
    host = largest_pinned(bench, decoder)
    free = torch.cuda.mem_get_info()[0] - RESERVE if not bench.dry else 1e12
    device = decoder.lookup(DeviceTable, min(host.table.num_rows, int(free / FORM.stride)))
    for name, lookup in {"host": host, "device": device}.items():
        rows = lookup.table.num_rows
        bench.note(f"{name} table: {rows * FORM.dim / 1e9:.1f} B parameters, {rows * FORM.stride / 1e9:.1f} GB")
    steps = {
        "off": decoder.step(decoder.without),
        "at hand": decoder.step(decoder.model, rows=decoder.some_rows()),
        "device": decoder.step(decoder.model, device),
        "host": decoder.step(decoder.model, host),
    }
    if device.plan == host.plan:
        bench.check(
            "the same tokens from either table",
            all(torch.equal(steps["device"](turn).clone(), steps["host"](turn)) for turn in range(bench.size(SETS, 2))),
        )
    times = compare(bench, steps)
    names = {
        "off": "step without a memory",
        "at hand": "step with the memory's layers, rows at hand",
        "device": "step with the table on the device",
        "host": "step with the table in host memory",
    }
    for name, what in names.items():
        bench.figure(what, times[name].map(lambda seconds: 1e3 * seconds), "ms")
    bench.figure("tokens with the table in host memory", times["host"].rate(decoder.batch), "tokens/s")

    for what, name, against, bar in (
        ("the table in host memory, against no memory", "host", "off", at_most(2)),
        ("the table in host memory, against the table on the device", "host", "device", at_most(1)),
        ("the table on the device, against no memory", "device", "off", None),
        ("the memory's layers alone, rows at hand, against no memory", "at hand", "off", None),
    ):
        lost = times[name].beside(times[against], lambda ours, theirs: 100 * (1 - theirs / ours))
        bench.figure(f"throughput lost to {what}", lost, "%", bar=bar)


@dataclass
class Decoder:
    """The two models, which share their weights, and where they are: at the end of a short context."""

    bench: Bench
    model: LanguageModel
    without: LanguageModel
    batch: int
    state: ModelState
    tokens: list[Tensor]  # [B, 1] each
    histories: list[Tensor]  # [B, N-1, 2] each

    @staticmethod
    def build(bench: Bench) -> Decoder:
        config, batch = backbone(bench), bench.size(512, 2)
        assert config.memory is not None
        model = LanguageModel.build(config, device=bench.device).to(torch.bfloat16).eval().requires_grad_(False)
        for parameter in model.parameters():  # some start as zeros, which are quicker to multiply
            parameter += 0.02 * bench.normal(*parameter.shape, dtype=torch.bfloat16)
        with torch.device("meta"):
            without = LanguageModel(replace(config, memory=None)).eval()
        shared = {name: tensor for name, tensor in model.state_dict().items() if ".memory." not in name}
        without.load_state_dict(shared, assign=True)
        with torch.no_grad():
            _, state = without(bench.integers(config.vocab_size, batch, CONTEXT), with_state=True)
        past = config.memory.hash.orders[-1] - 1
        histories = [torch.zeros(batch, past, 2, dtype=torch.int64, device=bench.device) for _ in range(SETS)]
        for history in histories:
            history[..., 0] = bench.integers(config.vocab_size, batch, past)
        tokens = [bench.integers(config.vocab_size, batch, 1) for _ in range(SETS)]
        assert state is not None
        if not bench.dry:
            torch.cuda.empty_cache()  # of the float32 weights: tables need the room
        return Decoder(bench, model, without, batch, state, tokens, histories)

    def lookup(self, kind: type[Table], rows: int) -> Lookup:
        """A filled table of at most so many rows, and the plan that addresses them."""
        memory, size = self.model.config.memory, self.model.config.vocab_size
        assert memory is not None
        plan = HashPlan.build(memory.hash.sized(rows=rows), vocab_size=size, pad=memory.hash.pad_id)
        lookup = Lookup(CanonicalVocabulary.identity(size), plan, kind(plan.num_rows, FORM, self.bench.device))
        fill(self.bench, lookup.table)
        return lookup

    def some_rows(self) -> Tensor:
        """[B, 1, L, K, d] as a fetch would give them."""
        memory = self.model.config.memory
        assert memory is not None
        return self.bench.normal(self.batch, 1, len(memory.hash.layers), memory.hash.rows_per_token, FORM.dim)

    def step(
        self, model: LanguageModel, lookup: Lookup | None = None, *, rows: Tensor | None = None
    ) -> Callable[[int], Tensor]:
        """Called with a round's number: the next tokens [B] after that round's."""
        tokens, history = self.tokens[0].clone(), self.histories[0].clone()

        @torch.no_grad()
        def work() -> Tensor:
            given = lookup.prefetch(tokens, history=history)[0] if lookup else rows
            hidden, _ = model(tokens, given, state=self.state)
            return model.logits(hidden[:, -1]).argmax(-1)

        replay = captured(self.bench, work)

        def call(turn: int) -> Tensor:
            tokens.copy_(self.tokens[turn % SETS])
            history.copy_(self.histories[turn % SETS])
            return replay()

        return call


def backbone(bench: Bench) -> ModelConfig:
    """Dense-4B with one residual stream, which is quicker than with four, and V4.1's memory in two of its blocks."""
    hash, engram = HashConfig.deepseek_v41(), EngramConfig.deepseek_v41()
    mla = AttentionConfig("mla", heads=2, nope_dim=4, rope_dim=4, value_dim=6, q_rank=8, kv_rank=6)
    model = bench.size(
        get_preset("dense-4b"), ModelConfig(vocab_size=64, dim=16, layers=3, attention=mla, ffn_width=24)
    )
    hash = bench.size(hash, replace(hash, orders=(2, 3), heads=1, layers=(1, 2)))
    return replace(model, streams=1, memory=MemoryConfig(hash, engram))


def largest_pinned(bench: Bench, decoder: Decoder) -> Lookup:
    """Pinned, filled and read: 100 B parameters, or what the host has room for."""
    rows = min(bench.size(PARAMETERS // FORM.dim, 400), int(SHARE * bench.ram / FORM.stride))
    began = time.monotonic()
    try:
        lookup = decoder.lookup(PinnedTable, rows)
    except ConfigError as error:
        bench.note(f"{error} Half of it was tried instead.")
        lookup = decoder.lookup(PinnedTable, rows // 2)
    bench.note(f"pinning and filling it took {time.monotonic() - began:.0f} s")
    if rows < PARAMETERS // FORM.dim:
        bench.note(
            f"smaller than {PARAMETERS / 1e9:.0f} B parameters: at most {SHARE:.0%} of the host's {bench.ram / 1e9:.0f} GB"
        )
    ids = torch.cat(
        [bench.integers(lookup.table.num_rows, 4096), torch.tensor([0, lookup.table.num_rows - 1], device=bench.device)]
    )
    bench.check("rows from anywhere in the host table", torch.equal(lookup.table.fetch(ids), expected(bench, ids)))
    return lookup


def fill(bench: Bench, table: Table) -> None:
    """Row i is row i mod PERIOD of a block of random numbers."""
    assert isinstance(table, DeviceTable | PinnedTable)
    block = block_of(bench)
    for first in range(0, table.num_rows, PERIOD):
        part = table.records[first : first + PERIOD]
        part.copy_(block[: len(part)], non_blocking=True)
    bench.synchronize()


def block_of(bench: Bench) -> Tensor:
    """[PERIOD, stride]: the same in all of a run."""
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    numbers = torch.randn(bench.size(PERIOD, 4000), FORM.dim, device=bench.device, generator=generator)
    return encode(FORM, numbers).repeat(bench.size(1, -(-PERIOD // 4000)), 1)[:PERIOD]


def expected(bench: Bench, ids: Tensor) -> Tensor:
    """What a filled table gives."""
    return decode(FORM, block_of(bench)[ids % PERIOD])
