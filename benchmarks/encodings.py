"""What the encoding of rows costs in loss: the quickstart's language act with rows in fp32, bf16, fp8 and int8.

    python benchmarks/encodings.py [--seeds 0 1] [--steps 180] [--json FILE]

All encodings train side by side on the same batches, from the same weights; printed is each one's held-out loss over fp32's,
with the paired 95 % interval over held-out files.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engram_lm.evaluate import loss as losses
from engram_lm.model.presets import get_preset
from engram_lm.tables import TableConfig
from engram_lm.tables.rows import ENCODINGS
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.loader import Loader, windows
from engram_lm.train.loop import TrainConfig, Training, train_together
from engram_lm.train.precision import autocast
from engram_lm.train.run import build_lookup, fit_vocabulary, prepare_text
from engram_lm.train.sources import standard_library


def train(data, tokenizer, directory, seed, steps):
    """Losses of every encoding on the held-out files."""
    config = TrainConfig(get_preset("tiny"), steps=steps, seed=seed, eval_every=0, checkpoint_every=0)
    config = fit_vocabulary(config, tokenizer)
    runs = {}
    for encoding in ENCODINGS:
        placed = replace(config, table=TableConfig(encoding=encoding, seed=seed))
        out = directory / f"{encoding}-{seed}"
        batches = Loader(data.train, config.batch_size, config.length, seed)
        runs[encoding] = Training(placed, out, batches, build_lookup(placed, tokenizer, out))
    train_together(runs)
    sizes = losses.bytes_of_tokens(tokenizer)
    measured = {}
    for encoding, run in runs.items():
        with autocast(run.config.precision, run.device):
            measured[encoding] = losses.measure(run.model, run.lookup, windows(data.val, 32, config.length), sizes)
    return measured, {encoding: run.lookup.table.form.stride for encoding, run in runs.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        data, tokenizer = prepare_text(standard_library(), directory / "text", vocab_size=get_preset("tiny").vocab_size)
        for seed in options.seeds:
            measured, strides = train(data, tokenizer, directory, seed, options.steps)
            for encoding, loss in measured.items():
                over, interval = losses.difference(loss, measured["fp32"])
                results.append(
                    {
                        "seed": seed,
                        "encoding": encoding,
                        "record_bytes": strides[encoding],
                        "loss": loss.mean,
                        "over_fp32": over,
                        "interval": interval,
                    }
                )
    table = Table("seed", "rows", "bytes a record", "held-out loss", "over fp32", box=None)
    for result in results:
        table.add_row(
            str(result["seed"]),
            result["encoding"],
            str(result["record_bytes"]),
            f"{result['loss']:.4f}",
            f"{result['over_fp32']:+.4f} ± {result['interval']:.4f}",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
