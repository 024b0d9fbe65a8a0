"""Training steps of a backbone of 120 M parameters: with the table in host memory, on the device, and without a memory.

Tokens are random, and as uneven as words are. Steps are taken in blocks, since what one step leaves on its way ends under the next one;
the first two of a block are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engram_lm.hashing import HashConfig
from engram_lm.memory import EngramConfig
from engram_lm.model import AttentionConfig, MemoryConfig, ModelConfig, get_preset
from engram_lm.model.lookup import Lookup, address_digest, build_plan
from engram_lm.tables import DeviceTable, TableConfig, build_table
from engram_lm.tables.pinned import PinnedTable
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.loader import Batch, LoaderState
from engram_lm.train.loop import TrainConfig, Training

from .bench import Bench
from .equal import deterministic, same
from .samples import Samples, at_most

ARMS = ("none", "device", "host", "host, hot rows")
HOT = 0.25  # GB
BLOCK, SETTLE, BLOCKS = 8, 2, 3
TINY = ModelConfig(
    vocab_size=48,
    dim=16,
    layers=2,
    attention=AttentionConfig("gqa", heads=2, kv_heads=1, head_dim=8),
    ffn_width=24,
    memory=MemoryConfig(
        HashConfig(orders=(2,), heads=2, rows_per_head=97, layers=(1,), pad_id=0),
        EngramConfig(row_dim=4, conv_kernel=0),
    ),
)


def run(bench: Bench) -> None:
    """How long a step takes, and that what is learned does not depend on where the rows are."""
    with runs(bench, ARMS) as training:
        passes = [one_pass(bench, training) for _ in range(2)]
    times = {name: Samples(tuple(tuple(one[name]) for one in passes)) for name in ARMS}
    for name in ARMS:
        bench.figure(f"step, table: {name}", times[name].map(lambda seconds: 1e3 * seconds), "ms")
    bench.figure(
        "step with the table in host memory, against on the device",
        times["host"].over(times["device"]),
        "x",
        bar=at_most(1.02),
    )
    bench.figure(
        f"the same with {HOT} GB of hot rows on the device", times["host, hot rows"].over(times["device"]), "x"
    )
    bench.figure("step with the table on the device, against no memory", times["device"].over(times["none"]), "x")
    equal_losses(bench)


def one_pass(bench: Bench, training: dict[str, Training]) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in training}
    block, blocks = bench.size((BLOCK, BLOCKS), (1, 1))
    for _ in range(blocks):
        for name, run in training.items():
            lines = [run.step() for _ in range(bench.size(SETTLE, 0) + block)]
            taken[name] += [line["seconds"] for line in lines[-block:]]
            bench.synchronize()
    return taken


def equal_losses(bench: Bench) -> None:
    """With torch's determinism switch on: loss, norm and every record, to the bit."""
    with deterministic(), runs(bench, ("device", "host"), exact=True) as training:
        steps = range(bench.size(8, 2))
        lines = {arm: [run.step() for _ in steps] for arm, run in training.items()}
        curves = {arm: [(line["loss"], line["norm"]) for line in own] for arm, own in lines.items()}
        near, far = (run.lookup.table for run in training.values() if run.lookup)
        assert isinstance(near, DeviceTable)
        assert isinstance(far, PinnedTable)
        bench.check(
            "losses are the same, bit for bit",
            curves["device"] == curves["host"],
            f"{curves['device'][-1]}, {curves['host'][-1]}",
        )
        bench.check("so are all records of the table", same(near.records, far.settled()))


@contextmanager
def runs(bench: Bench, arms: Sequence[str], *, exact: bool = False) -> Iterator[dict[str, Training]]:
    """Runs that differ in where their table is. exact: by deterministic operations, from now on in this process."""
    with TemporaryDirectory() as directory:
        training = {
            arm: begin(bench, arm, Path(directory, str(number)), exact=exact) for number, arm in enumerate(arms)
        }
        try:
            yield training
        finally:
            for run in training.values():
                run.close()
                if run.lookup:
                    run.lookup.table.close()


def begin(bench: Bench, arm: str, directory: Path, *, exact: bool) -> Training:
    model = bench.size(get_preset("small"), TINY)
    hot = bench.size(HOT, 1e-6) if arm == "host, hot rows" else 0.0
    batch_size, length = bench.size((16, 512), (1, 4))
    config = TrainConfig(
        model=replace(model, memory=None) if arm == "none" else model,
        table=TableConfig(tier="host" if arm.startswith("host") else "device", device_memory=hot),
        batch_size=batch_size,
        length=length,
        steps=100_000,  # more than are taken: the last one would leave a checkpoint
        eval_every=0,
        checkpoint_every=0,
        precision=bench.size("bfloat16", "float32"),
        device=str(bench.device),
        deterministic=exact,
        prefetch=not bench.dry,  # Triton's interpreter takes one thread
    )
    directory.mkdir()
    batches = RandomText(model.vocab_size, batch_size, length, bench.seed)
    return Training(config, directory, batches, lookup_of(config, directory))


def lookup_of(config: TrainConfig, directory: Path) -> Lookup | None:
    memory = config.model.memory
    if memory is None:
        return None
    vocabulary = CanonicalVocabulary.identity(config.model.vocab_size)
    plan = build_plan(memory.hash, vocabulary)
    digest = address_digest(vocabulary, plan)
    table = build_table(
        config.table, plan.num_rows, memory.engram.row_dim, digest=digest, directory=directory, device=config.device
    )
    return Lookup(vocabulary, plan, table)


@dataclass(frozen=True)
class RandomText:
    """Batches in which the n-th token is as frequent as 1 / n (Zipf)."""

    vocab_size: int
    batch_size: int
    length: int
    seed: int

    def next(self, state: LoaderState) -> tuple[Batch, LoaderState]:
        generator = torch.Generator().manual_seed(self.seed + state.index)
        even = torch.rand(self.batch_size, self.length + 1, generator=generator, dtype=torch.float64)
        tokens = (self.vocab_size**even).long() - 1
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None), LoaderState(0, state.index + 1)
