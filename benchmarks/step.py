"""What a memory costs in a training step: base against engram, and against tables of growing size.

    python benchmarks/step.py [--steps 40] [--json FILE]

All arms take a step each in turn, on the same batches of real text (Python's standard library), so that whatever else the
machine does hits all of them alike. Printed are medians and, for each arm, the median over rounds of its ratio to base.
Nothing here checks results; the tests do.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engram_lm.evaluate.controls import model_of_arm
from engram_lm.model.presets import get_preset
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.loader import Loader
from engram_lm.train.loop import TrainConfig, Training
from engram_lm.train.run import build_lookup, prepare_text
from engram_lm.train.sources import standard_library


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--growth", type=int, nargs="*", default=[8, 64], help="table sizes, times the preset's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()

    tiny = get_preset("tiny")
    models = {arm: model_of_arm(tiny, arm) for arm in ("base", "capacity_1", "engram")}
    for growth in options.growth:
        hashing = replace(tiny.memory.hash, rows_per_head=tiny.memory.hash.rows_per_head * growth)
        models[f"engram, table x {growth}"] = replace(tiny, memory=replace(tiny.memory, hash=hashing))

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        data, tokenizer = prepare_text(standard_library(), directory / "text", vocab_size=tiny.vocab_size)
        runs = {}
        for name, model in models.items():
            config = TrainConfig(model=model, steps=options.steps + 3, eval_every=0, checkpoint_every=0)
            batches = Loader(data.train, config.batch_size, config.length)
            runs[name] = Training(config, directory / name, batches, build_lookup(model, tokenizer))
        seconds = {name: [] for name in runs}
        for step in track(range(options.steps + 2), "steps"):
            for name, run in runs.items():
                line = run.step()
                if step >= 2:
                    seconds[name].append(line["seconds"])
        rows = {name: run.lookup.table.num_rows if run.lookup else 0 for name, run in runs.items()}

    base = np.array(seconds["base"])
    results = {
        name: {
            "rows": rows[name],
            "median_ms": 1e3 * float(np.median(values)),
            "ratio_to_base": float(np.median(np.array(values) / base)),
            "quartiles": [float(q) for q in np.quantile(np.array(values) / base, [0.25, 0.75])],
        }
        for name, values in seconds.items()
    }
    table = Table("arm", "rows", "ms a step", "x base", "quartiles", box=None)
    for name, result in results.items():
        low, high = result["quartiles"]
        table.add_row(
            name,
            f"{result['rows']:,}",
            f"{result['median_ms']:.1f}",
            f"{result['ratio_to_base']:.3f}",
            f"{low:.3f} - {high:.3f}",
        )
    Console().print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    Console().print(f"{machine}; {options.steps} rounds")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "steps": options.steps, "arms": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
