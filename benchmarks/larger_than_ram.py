"""A table file larger than RAM, trained from disk, against the largest table of the same rows that RAM holds.

    python benchmarks/larger_than_ram.py --out DIR [--gigabytes 40] [--ram-gigabytes 6] [--memory 2] [--steps 500] [--fill]

Both arms train the tiny model with DeepSeek-V4.1's rows (256 fp8 numbers, 264 bytes, and an accumulator) on the same
batches of real text (Python's standard library), each in a process of its own, a hundred steps in turn, with a
checkpoint at the end of each hundred. `--fill` first writes every row of the file, so that each row that is not in RAM has to
come from the device; without it the file is sparse, as when a table is trained from its beginning. Printed are the medians
of a step, the wall time with checkpoints, and the memory of each process.

`--kill` then trains the disk arm once more in a process that is killed (kill -9) a few times on the way and resumed, and compares
the outcome with the uninterrupted run's, bit for bit.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from engram_lm.model.presets import get_preset
from engram_lm.tables import TableConfig
from engram_lm.tables.disk import FileStore
from engram_lm.tables.file import TableFile
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.checkpoint import checksum, latest
from engram_lm.train.loader import Loader
from engram_lm.train.loop import TrainConfig, Training
from engram_lm.train.run import build_lookup, fit_vocabulary, prepare_text
from engram_lm.train.sources import standard_library

TURN = 100  # steps in turn


def configure(gigabytes, table, steps, tokenizer):
    """The tiny model with a table of about `gigabytes` of V4.1's rows."""
    tiny = get_preset("tiny")
    rows = int(gigabytes * 1e9) // table.form(256).stride
    memory = replace(
        tiny.memory, hash=tiny.memory.hash.sized(rows=rows), engram=replace(tiny.memory.engram, row_dim=256)
    )
    model = replace(tiny, memory=memory)
    return fit_vocabulary(TrainConfig(model, steps=steps, eval_every=0, checkpoint_every=TURN, table=table), tokenizer)


def memory_of_process():
    """Resident bytes of this process: now, and the most there ever were."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def arm(pipe, text, out, gigabytes, table, steps):
    """Train as many steps as the pipe asks for; answer with their times."""
    keep_freed_memory()
    data, tokenizer = prepare_text("", text)
    config = configure(gigabytes, table, steps, tokenizer)
    before = memory_of_process()
    lookup = build_lookup(config, tokenizer, out)
    run = Training(config, out, Loader(data.train, config.batch_size, config.length), lookup, resume=True)
    pipe.send({"rows": lookup.table.num_rows, "bytes": lookup.table.nbytes, "before": before})
    while (turn := pipe.recv()) is not None:
        began = time.perf_counter()
        seconds = [run.step()["seconds"] for _ in range(min(turn, config.steps - run.done_steps))]
        pipe.send({"seconds": seconds, "wall": time.perf_counter() - began, **memory_of_process()})
    run.close()
    lookup.table.close()


def start(*arguments):
    """A process that trains an arm, the pipe to it, and what it says when it is ready."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=arm, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here, here.recv()


def fill(path, gigabytes, table, text):
    """Write every row of the file."""
    _, tokenizer = prepare_text("", text)
    build_lookup(configure(gigabytes, table, 1, tokenizer), tokenizer, path.parent).table.close()
    with TableFile.open(path, write=True) as file:
        rows = file.block_rows * 4096
        rng = np.random.default_rng(0)
        records = rng.integers(0, 100, (rows, file.form.stride), np.uint8)  # small numbers: scales near 2^-60, tame
        for first in track(range(0, file.num_rows, rows), "writing every row"):
            records[:, -4:] = np.frombuffer(np.float32(1.0 + first / file.num_rows).tobytes(), np.uint8)
            file.write(first, records[: min(rows, file.num_rows - first)])
        file.sync()
        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def outcome(out):
    """What a finished disk run leaves: checksums of its last checkpoint's tensors and of all rows it wrote."""
    files = {path.name: checksum(path) for path in sorted(latest(out / "checkpoints").glob("*.safetensors"))}
    store = FileStore(TableFile.open(out / "table.safetensors"))
    ids, _ = store.journal.newest(store.clock)
    rows = hashlib.sha256(ids.tobytes())
    for first in range(0, len(ids), 1 << 20):
        held = store.hold(ids[first : first + (1 << 20)])
        rows.update(held.records[held.slots].tobytes())
    store.close()
    return {**files, "rows": rows.hexdigest(), "changed": len(ids)}


def killed_and_resumed(options, text, out, table, kills):
    """Train in processes that die at random moments; how often they did."""
    died = 0
    random.seed(0)
    while True:
        process, pipe, _ = start(text, out, options.gigabytes, table, options.steps)
        pipe.send(options.steps)
        if died < kills and not pipe.poll(random.uniform(0.2, 0.8) * options.steps * 0.25 / kills):
            os.kill(process.pid, signal.SIGKILL)
            died += 1
            process.join()
            continue
        pipe.recv()
        pipe.send(None)
        process.join()
        return died


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=40.0)
    parser.add_argument("--ram-gigabytes", type=float, default=6.0)
    parser.add_argument("--memory", type=float, default=2.0, help="GB of RAM for hot rows of the table on disk")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--kill", type=int, default=0, help="how often to kill the second run of the disk arm")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a waiting arm must not spin
    multiprocessing.set_start_method("spawn")
    console = Console()

    text = options.out / "text"
    prepare_text(standard_library(), text, vocab_size=get_preset("tiny").vocab_size)
    tables = {
        "RAM": (options.ram_gigabytes, TableConfig("host", "fp8_e8m0")),
        "disk": (options.gigabytes, TableConfig("disk", "fp8_e8m0", memory=options.memory)),
    }
    for name in tables:
        (options.out / name).mkdir(exist_ok=True)
    if options.fill and not (options.out / "disk" / "table.safetensors").exists():
        fill(options.out / "disk" / "table.safetensors", *tables["disk"], text)

    arms = {name: start(text, options.out / name, *placed, options.steps) for name, placed in tables.items()}
    facts = {name: ready for name, (_, _, ready) in arms.items()}
    turns = {name: [] for name in arms}
    with Progress(console=console) as progress:
        bar = progress.add_task("steps", total=options.steps)
        for done in range(0, options.steps, TURN):
            for name in random.sample(list(arms), len(arms)):
                arms[name][1].send(TURN)
                turns[name].append(arms[name][1].recv())
            progress.update(bar, completed=done + TURN)
    for process, pipe, _ in arms.values():
        pipe.send(None)
        process.join()

    results = {}
    for name, done in turns.items():
        seconds = np.array([second for turn in done for second in turn["seconds"]])
        results[name] = {
            "table_gigabytes": facts[name]["bytes"] / 1e9,
            "rows": facts[name]["rows"],
            "median_ms": 1e3 * float(np.median(seconds)),
            "wall_ms_a_step": 1e3 * sum(turn["wall"] for turn in done) / len(seconds),
            "turns_ms": [1e3 * float(np.median(turn["seconds"])) for turn in done],
            "resident_gigabytes": done[-1]["VmHWM"] / 1e9,
            "resident_before_gigabytes": facts[name]["before"]["VmHWM"] / 1e9,
        }
    grid = Table("table", "GB", "ms a step", "x RAM", "with checkpoints", "x RAM", "resident GB at most", box=None)
    for name, result in results.items():
        ratio = {key: result[key] / results["RAM"][key] for key in ("median_ms", "wall_ms_a_step")}
        result["ratios"] = ratio
        grid.add_row(
            name,
            f"{result['table_gigabytes']:.1f}",
            f"{result['median_ms']:.1f}",
            f"{ratio['median_ms']:.3f}",
            f"{result['wall_ms_a_step']:.1f}",
            f"{ratio['wall_ms_a_step']:.3f}",
            f"{result['resident_gigabytes']:.2f}",
        )
    console.print(grid)

    if options.kill:
        whole = outcome(options.out / "disk")
        again = options.out / "killed"
        again.mkdir()
        (options.out / "disk" / "table.safetensors").rename(
            again / "table.safetensors"
        )  # its rows are those before training
        died = killed_and_resumed(options, text, again, tables["disk"][1], options.kill)
        identical = outcome(again) == whole
        results["killed"] = {"times": died, "identical": identical, "changed_rows": whole["changed"]}
        console.print(
            f"killed {died} times and resumed: {whole['changed']:,} changed rows, model and optimizer are "
            + ("identical" if identical else "DIFFERENT")
        )

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    console.print(f"{machine}, {ram:.0f} GB of RAM; {options.steps} steps, every row written first: {options.fill}")
    if options.json:
        facts = {"machine": machine, "ram_gigabytes": ram, "options": {k: str(v) for k, v in vars(options).items()}}
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
