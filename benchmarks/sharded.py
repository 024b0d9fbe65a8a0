"""A training step on a table whose rows are divided among processes, beside TorchRec's, in the same processes.

    torchrun --nproc-per-node 2 benchmarks/sharded.py [--rows 1000000 20000000] [--data SOURCE] [--json FILE]

In a step every process has 16 sequences of 256 tokens of real text, whose n-grams are hashed as the tiny model hashes them:
32,768 reads of rows of 32 float32 numbers. Timed is all that a table has to do with them: the ids go to the processes that keep the
rows, the rows come back, a weighted sum of what was read gives each row a gradient, the gradients go to the rows, and
row-wise Adagrad is applied. The contenders, which all start from zeros and are compared row by row after every round:

    engram-lm           ShardedTable over host tables, each distinct id once
    TorchRec            EmbeddingCollection, row-wise, with FBGEMM's fused optimizer on the CPU
    TorchRec, distinct  the same behind our deduplication and expansion, so that it too sees each distinct id once
    TorchRec, bags      EmbeddingBagCollection, row-wise, a bag of one id for each read: the same rows by other kernels

The last is not what its manual says for rows, but FBGEMM's backward for unpooled rows is slow on a CPU, and for bags it is not.
TorchRec can deduplicate by itself (`use_index_dedup`), but only on a GPU: FBGEMM 1.8 has no `jagged_unique_indices` for a
CPU. Its pipelines overlap the exchange of ids with the step before on CUDA's streams; here nobody looks ahead. It is given
int32 ids, which are faster than int64. It is left out unless it is installed, beside a CPU build of torch with

    pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
    pip install pandas pyre-extensions tensordict tqdm

A round is `--steps` steps of each contender in turn, on the same batches; its figure is the median of the steps, each as long as its
slowest process took. Then engram-lm takes the steps once more while the loopback interface is read, and the bytes that passed
it are set beside those that the table counted and those that the plan foresees. Others may use the interface as
well, so the round in which it carried least is shown.
"""

import argparse
import importlib.util
import json
import logging
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from engram_lm.bench.measure import WrongResultError, fixed_work, timed
from engram_lm.bench.results import Case, Entry, Results
from engram_lm.hashing import hash_ngrams
from engram_lm.machine import describe_machine, installed
from engram_lm.model.lookup import build_plan, build_vocabulary
from engram_lm.model.presets import get_preset
from engram_lm.tables import HostTable, RowFormat, deduplicate, expand
from engram_lm.tables.sharded import Lanes, ShardedTable, part_of
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.loader import Loader
from engram_lm.train.shards import split_in_memory
from engram_lm.train.sources import read_documents, standard_library
from engram_lm.train.tokenizer import train_tokenizer

SEQUENCES, LENGTH = 16, 256  # of a process
TEXT = 8 << 20  # characters
LR = 0.01
WINDOWS = 5  # rounds in which the interface is read


class Ours:
    """A step is what `train/loop.py` does with a table."""

    name, note = "engram-lm", "ShardedTable over host tables"

    def __init__(self, num_rows, dim):
        lanes = Lanes(*(dist.new_group() for _ in Lanes._fields))
        form, rows = part_of(RowFormat(dim), num_rows, dist.get_rank(), dist.get_world_size())
        self.table = ShardedTable(HostTable(rows, form), num_rows, lanes)

    def step(self, ids, weights, lap):
        unique, inverse = deduplicate(ids)
        fetch = self.table.prefetch(unique)
        lap("ids")
        rows = fetch.rows().requires_grad_()
        read = expand(rows, inverse)
        lap("rows")
        (read * weights).sum().backward()
        self.table.apply(*fetch.collect(unique, rows.grad), LR)
        lap("gradients")
        return read.detach()

    def close(self):
        self.table.close()


class TorchRec:
    """A sharded module of its own, called as its pipelines call it.

    bags: an EmbeddingBagCollection with a bag for each read; otherwise an EmbeddingCollection.
    """

    def __init__(self, num_rows, dim, *, bags=False, distinct=False):
        import torchrec
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec.distributed.comm_ops import set_gradient_division
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv

        self.bags, self.distinct = bags, distinct
        self.name = "TorchRec" + ", bags" * bags + ", distinct" * distinct
        self.note = f"{'EmbeddingBagCollection' if bags else 'EmbeddingCollection'} of {installed('torchrec')}"
        set_gradient_division(False)  # summed over processes, as ours are
        world, group, cpu = dist.get_world_size(), dist.group.WORLD, torch.device("cpu")
        settings = {"name": "rows", "num_embeddings": num_rows, "embedding_dim": dim, "feature_names": ["ids"]}
        optimizer = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": LR, "eps": 1e-12}
        if bags:
            tables = [torchrec.EmbeddingBagConfig(**settings, pooling=torchrec.PoolingType.SUM)]
            whole = torchrec.EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
            sharder = EmbeddingBagCollectionSharder(fused_params=optimizer)
        else:
            tables = [torchrec.EmbeddingConfig(**settings)]
            whole = torchrec.EmbeddingCollection(tables=tables, device=torch.device("meta"))
            sharder = EmbeddingCollectionSharder(fused_params=optimizer)
        chosen = {"rows": row_wise(compute_kernel="fused")}
        plan = construct_module_sharding_plan(
            whole, chosen, sharder, world_size=world, local_size=world, device_type="cpu"
        )
        self.module = sharder.shard(whole, plan, ShardingEnv.from_process_group(group), cpu)
        with torch.no_grad():
            for rows in self.module.parameters():
                rows.zero_()

    def step(self, ids, weights, lap):
        from torchrec import KeyedJaggedTensor

        wanted, inverse = deduplicate(ids) if self.distinct else (ids, None)
        lengths = torch.ones(len(wanted), dtype=torch.int32) if self.bags else torch.tensor([len(wanted)]).int()
        context = self.module.create_context()
        asked = self.module.input_dist(context, KeyedJaggedTensor(["ids"], wanted.int(), lengths=lengths)).wait().wait()
        lap("ids")
        read = self.module.compute_and_output_dist(context, asked).wait()
        read = read.values() if self.bags else read["ids"].values()
        if self.distinct:
            read = expand(read, inverse)
        lap("rows")
        (read * weights).sum().backward()
        lap("gradients")
        return read.detach()

    def close(self):
        del self.module


def batches(source, num_rows, count):
    """Ids [SEQUENCES * LENGTH * K] that this process reads in each of `count` steps, and how many rows there are in all."""
    tiny = get_preset("tiny")
    hashing = tiny.memory.hash.sized(rows=num_rows)
    documents = beginning(source)
    tokenizer = train_tokenizer((document.text for document in documents), tiny.vocab_size)
    vocabulary = build_vocabulary(hashing, tokenizer)
    plan = build_plan(hashing, vocabulary)
    loader = Loader(split_in_memory(documents, tokenizer), SEQUENCES * dist.get_world_size(), LENGTH)
    mine = slice(dist.get_rank() * SEQUENCES, (dist.get_rank() + 1) * SEQUENCES)
    ids = [
        hash_ngrams(plan, vocabulary(batch.tokens[mine]), segments=batch.segments[mine])[0].flatten()
        for batch in loader.first(count)
    ]
    return ids, plan.num_rows


def beginning(source):
    """The first documents of a source, of TEXT characters or a little more."""
    documents, size = [], 0
    for document in read_documents(source):
        documents.append(document)
        size += len(document.text)
        if size >= TEXT:
            break
    return documents


class Laps(defaultdict):
    """Seconds of the parts of each step, by name."""

    def __init__(self):
        super().__init__(list)

    def start(self):
        self.began = self.last = time.perf_counter()

    def __call__(self, name):
        now = time.perf_counter()
        self[name].append(now - self.last)
        self.last = now

    def finish(self):
        self["step"].append(time.perf_counter() - self.began)


def take_steps(contender, ids, weights):
    """Times of the steps by part [steps], each of the slowest process, and what the last one read."""
    laps = Laps()
    for some in ids:
        dist.barrier()
        laps.start()
        read = contender.step(some, weights, laps)
        laps.finish()
    return {part: np.max(everyones(times), axis=0) for part, times in laps.items()}, read


def measure(contenders, ids, weights, options):
    """Medians of every round by contender and part, and of work that is always the same; the first round only warms up."""
    rounds, calibration = {contender.name: defaultdict(list) for contender in contenders}, []
    for number in range(options.rounds + 1):
        some = ids[number * options.steps :][: options.steps]
        calibration.append(timed(fixed_work))
        reads = {}
        for position in range(len(contenders)):
            contender = contenders[(number + position) % len(contenders)]
            times, reads[contender.name] = take_steps(contender, some, weights)
            for part, seconds in times.items() if number else ():
                rounds[contender.name][part].append(float(np.median(seconds)))
        agree(reads)
    return rounds, calibration


def agree(reads):
    """Raise WrongResultError unless all contenders have read the same rows."""
    (reference, right), *others = reads.items()
    for name, read in others:
        apart = max(everyones(float((read - right).abs().max())))
        if not apart <= 1e-5:
            raise WrongResultError(f"{name} and {reference} read rows that are {apart:.1e} apart: one does other work.")


def wire(ours, ids, weights):
    """Bytes that all processes sent in the steps: counted by the table, foreseen, and seen on the interface at least."""
    seen = []
    for _ in range(WINDOWS):
        dist.barrier()
        counted, before = ours.table.sent.total, on_loopback()
        for some in ids:
            ours.step(some, weights, lambda name: None)
        dist.barrier()
        seen.append(min(everyones(on_loopback() - before)))
        counted = ours.table.sent.total - counted
    return {
        "counted": sum(everyones(counted)),
        "foreseen": sum(everyones(foreseen(ours.table, ids))),
        "seen": min(seen),
    }


def foreseen(table, ids):
    """Bytes that a process sends for its distinct ids that others keep, those that they send back included; and counts."""
    total = 0
    first, end = table.edges[table.rank : table.rank + 2]
    for some in ids:
        unique = some.unique()
        others = int(((unique < first) | (unique >= end)).sum())
        total += others * (table.offset_type.itemsize + table.form.row_bytes + 4 * table.dim)
        total += 8 * (table.size - 1)
    return total


def on_loopback():
    """Bytes that the loopback interface has carried, TCP's headers included."""
    [line] = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


def everyones(value):
    """The value of every process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def show(title, split, sent, steps):
    """Where the time goes, and bytes a step."""
    grid = Table("", *(f"{part}, ms" for part in ("ids", "rows", "gradients")), title=title, box=None)
    for name, parts in split.items():
        grid.add_row(name, *(f"{1e3 * np.median(parts[part]):.2f}" for part in ("ids", "rows", "gradients")))
    processes = dist.get_world_size()
    per_step = {name: count / steps / processes for name, count in sent.items()}
    return grid, (
        f"Bytes a step and process: {per_step['counted']:,.0f} counted, {per_step['foreseen']:,.0f} foreseen, "
        f"{per_step['seen']:,.0f} on the interface ({100 * (sent['seen'] / sent['foreseen'] - 1):+.1f} %)."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 20_000_000])
    parser.add_argument("--data", default=standard_library())
    parser.add_argument("--steps", type=int, default=20, help="of each contender in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # TorchRec's
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    console = Console(quiet=not first)

    machine = describe_machine() | {"processes": dist.get_world_size(), "torchrec": installed("torchrec") or "none"}
    left_out = {}
    if importlib.util.find_spec("torchrec") is None:
        left_out["TorchRec"] = "not installed, see this script's first lines"
    dim = get_preset("tiny").memory.engram.row_dim
    cases, calibration, facts, remarks = [], [], {}, []
    for wanted in options.rows:
        ids, num_rows = batches(options.data, wanted, (options.rounds + 1) * options.steps)
        weights = torch.randn(len(ids[0]), dim, generator=torch.Generator().manual_seed(dist.get_rank()))
        contenders = [Ours(num_rows, dim)]
        if not left_out:
            contenders += [TorchRec(num_rows, dim, **how) for how in ({}, {"distinct": True}, {"bags": True})]
        rounds, fixed = measure(contenders, ids, weights, options)
        sent = wire(contenders[0], ids[-options.steps :], weights)
        distinct = float(np.mean(everyones(float(np.mean([len(some.unique()) for some in ids])))))
        title = f"{num_rows:,} rows x {dim}, {len(ids[0]):,} reads of {distinct:,.0f} rows a process"
        entries = [Entry(each.name, tuple(rounds[each.name]["step"]), each.note) for each in contenders]
        cases.append(Case(title, tuple(entries)))
        calibration += fixed
        split = {name: dict(parts) for name, parts in rounds.items()}
        facts[title] = {"distinct": distinct, "split_seconds": split, "bytes": sent, "bytes_steps": options.steps}
        remarks += show(title, split, sent, options.steps)
        for contender in contenders:
            contender.close()
        del contenders
    results = Results("sharded", tuple(cases), Entry("a matrix product", tuple(calibration)), left_out, machine)
    console.print(results, *remarks, sep="\n")
    if options.json and first:
        settings = {"data": Path(options.data).name, "steps": options.steps, "rounds": options.rounds}
        options.json.write_text(json.dumps({**results.json(), "options": settings, "parts": facts}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
