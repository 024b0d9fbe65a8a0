"""How fast a released table comes in: V4.1's rows from safetensors shards to a table file, beside plain copies of the same bytes.

    python benchmarks/import_layouts.py --out DIR [--rows 20000000] [--rounds 2] [--memory 0.25] [--json FILE]

A shard of that many rows of random bytes is made (256 E4M3 numbers and 8 E8M0 scales each: 5.28 GB for 20 M rows; three times
that is needed in DIR, for the shard, a copy and the table). In each round, in turn and each in a process of its own:

    read      read the shard from its first byte to its last, 8 MiB at a time
    copy      read it so and write it to a new file, then fsync: what any import of it must do at least
    import    read its rows into a table file, as `engram-lm table import` does, checksums and fsync included
    export    write that table as shards again

Before each, the shard leaves the page cache (fsync, then POSIX_FADV_DONTNEED). Speeds are bytes of rows by wall time; memory
is the peak resident set of the process, which maps none of the files, and how much that is above the process before it began. The
shard that comes out of the export is compared with the one that went in, byte for byte.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engram_lm.hashing import HashConfig
from engram_lm.hf.layouts import DeepSeekV41, layout_of_table
from engram_lm.hf.shards import NewShards, Shards
from engram_lm.hf.stream import export_table, import_table
from engram_lm.machine import describe_machine
from engram_lm.memory import EngramConfig
from engram_lm.tables.file import TableFile
from engram_lm.tokens import CanonicalVocabulary

BUFFER = 8 << 20
VOCABULARY = CanonicalVocabulary.identity(1000)


def layout_for(rows):
    """V4.1's first layer with about so many rows."""
    hashing = replace(HashConfig.deepseek_v41(), layers=(1,)).sized(rows=rows)
    return DeepSeekV41.of(hashing, EngramConfig.deepseek_v41(), 5120, 4, VOCABULARY.size)


def make(directory, layout):
    """The shard, of random bytes."""
    [rows] = layout.row_tensors()
    rng = np.random.default_rng(0)
    with NewShards(directory, [{rows.name: rows.kind, rows.scale: rows.scale_kind}]) as shards:
        for name, kind in (rows.name, rows.kind), (rows.scale, rows.scale_kind):
            for start in track(range(0, kind.nbytes, BUFFER), f"making {name}", transient=True):
                size = min(BUFFER, kind.nbytes - start)
                shards.places[name].write(start, np.frombuffer(rng.bytes(size), np.uint8))
        shards.publish({"model_type": layout.model_type, "text_config": layout.config()})


def forget(path):
    """Have a file leave the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def stream(source, target=None):
    """Read a file in order, and write it to another one if there is one."""
    buffer = memoryview(bytearray(BUFFER))
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if target else None
    with open(source, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            left = buffer[:count]
            while out is not None and len(left):
                left = left[os.write(out, left) :]
    if out is not None:
        os.fsync(out)
        os.close(out)


def import_from(directory, target, memory, rows):
    """As `table import`."""
    with Shards([directory]) as shards:
        layout = layout_for(rows).found_in(shards)
        import_table(shards, layout, VOCABULARY, target, memory=memory).close()


def export_to(source, target):
    """As `table export`."""
    with TableFile.open(source) as table:
        export_table(table, layout_of_table(table), target)


def resident():
    """Bytes of this process that are resident: the most there ever were."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def in_process(pipe, function, arguments):
    """Call, and tell how long it took and what it took."""
    before, began = resident(), time.perf_counter()
    function(*arguments)
    pipe.send({"seconds": time.perf_counter() - began, "resident": resident(), "before": before})


def measured(function, *arguments):
    """What a call in a new process took."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=in_process, args=(there, function, arguments))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", type=float, default=0.25, help="GB of buffers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    console = Console()

    options.out.mkdir(parents=True, exist_ok=True)
    layout = layout_for(options.rows)
    released, copied, table, back = (
        options.out / name for name in ("released", "copy", "table.safetensors", "exported")
    )
    make(released, layout)
    [shard] = released.glob("*.safetensors")
    nbytes = 264 * sum(layout.layer_rows)
    arms = {
        "read": (stream, shard),
        "copy": (stream, shard, copied),
        "import": (import_from, released, table, int(options.memory * 1e9), options.rows),
        "export": (export_to, table, back),
    }
    runs = {name: [] for name in arms}
    for number in range(options.rounds):
        for name, (function, *arguments) in arms.items():
            forget(shard)
            if table.exists():
                forget(table)
            runs[name].append(measured(function, *arguments))
            copied.unlink(missing_ok=True)
        same = all(
            (back / file.name).read_bytes() == file.read_bytes()
            for file in [released / "config.json", released / "model.safetensors.index.json"]
        ) and identical(shard, back / shard.name)
        table.unlink()
        shutil.rmtree(back)
        if not same:
            raise SystemExit(f"round {number + 1}: what was exported is not what was imported")
    shutil.rmtree(released)

    results = {}
    for name, times in runs.items():
        speeds = [nbytes / 1e6 / run["seconds"] for run in times]
        results[name] = {
            "mb_per_second": statistics.median(speeds),
            "all": speeds,
            "resident_gb": max(run["resident"] for run in times) / 1e9,
            "above_start_gb": max(run["resident"] - run["before"] for run in times) / 1e9,
        }
    grid = Table("", "MB/s", "of a copy", "of a read", "resident GB", "above start", box=None)
    for name, result in results.items():
        for yardstick in ("copy", "read"):
            result[f"of_{yardstick}"] = result["mb_per_second"] / results[yardstick]["mb_per_second"]
        ratios = f"{result['of_copy']:.2f}", f"{result['of_read']:.2f}"
        grid.add_row(
            name,
            f"{result['mb_per_second']:,.0f}",
            *ratios,
            f"{result['resident_gb']:.2f}",
            f"{result['above_start_gb']:.2f}",
        )
    console.print(grid)
    console.print(
        f"{sum(layout.layer_rows):,} rows, {nbytes / 1e9:.2f} GB, {options.rounds} rounds; exported bytes are the imported ones"
    )
    if options.json:
        facts = {
            "machine": describe_machine(),
            "rows": sum(layout.layer_rows),
            "bytes": nbytes,
            "memory_gb": options.memory,
        }
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


def identical(one, other):
    """Whether two files hold the same bytes."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while part := first.read(BUFFER):
            if part != second.read(BUFFER):
                return False
        return not second.read(1)


if __name__ == "__main__":
    main()
