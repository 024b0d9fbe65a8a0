"""What a mounted cartridge costs while a pretrained model decodes: time a token, and memory, on every tier of its table.

    python benchmarks/mounted_decode.py --model DIR_OR_NAME [--gguf-file F] --out DIR [--rows 20000000] [--rounds 9]

A cartridge of `--rows` random rows is made in DIR (its table is sparse: rows of a few n-grams are written) and mounted. One
token after another is decoded greedily by the bare model and by the mounted ones in turn, from the same prompt with the same cache
length. Printed are medians over rounds of the time a token, their ratio to the bare model's in the same round, and what the
table takes of RAM.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm.hashing import HashConfig
from engram_lm.hf.attach import attach, default_layers
from engram_lm.hf.cartridge import mount, save, unmount
from engram_lm.hf.decoder import find_decoder
from engram_lm.memory import EngramConfig
from engram_lm.tables import TableConfig

PROMPT = "The history of the town begins with a small settlement at the river, where"


def make(model, tokenizer, options):
    """A cartridge of that many rows, of which those of the prompt's n-grams are not zero."""
    layers = default_layers(len(find_decoder(model).layers))
    hash = HashConfig(orders=(2, 3), heads=8, layers=layers, pad_id=tokenizer.pad_token_id or 0).sized(
        rows=options.rows
    )
    config = EngramConfig(row_dim=32, conv_kernel=options.conv_kernel)
    table = TableConfig(tier="disk", memory=0.1)
    memory = attach(model, config, tokenizer, hash=hash, table=table, directory=options.out / "draft")
    unique = memory.lookup.ids(torch.tensor([tokenizer(PROMPT)["input_ids"]]))[0].unique()
    memory.lookup.table.write(unique, torch.randn(len(unique), config.row_dim) * 0.01)
    save(model, options.out / "cartridge", tokenizer)
    unmount(model)


@torch.no_grad()
def decode(model, prompt, tokens):
    """Seconds a token, after the prompt was read."""
    out = model(prompt, use_cache=True)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--conv-kernel", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = {"gguf_file": options.gguf_file} if options.gguf_file else {}

    def load():
        kind = getattr(torch, options.dtype)
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=kind, **file).eval()

    tokenizer = AutoTokenizer.from_pretrained(options.model, **file)
    models = {"bare": load()}
    if not (options.out / "cartridge").exists():
        make(models["bare"], tokenizer, options)
    resident = {"bare": 0}
    for name, table in {
        "disk, 50 MB": TableConfig(tier="disk", memory=0.05),
        "disk, nothing": TableConfig(tier="disk", memory=0.0),
        "host": TableConfig(tier="host"),
    }.items():
        models[name] = load()
        memory = mount(models[name], options.out / "cartridge", tokenizer=tokenizer, table=table)
        resident[name] = memory.lookup.table.resident
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    seconds = {name: [] for name in models}
    for turn in track(range(options.rounds + 1), "rounds"):
        for name in list(models)[turn % len(models) :] + list(models)[: turn % len(models)]:
            took = decode(models[name], prompt, options.tokens)
            if turn:  # the first one warms up
                seconds[name].append(took)
    grid, results = Table("model", "ms a token", "over bare", "quartiles", "table in RAM", box=None), {}
    for name, times in seconds.items():
        ratios = [took / bare for took, bare in zip(times, seconds["bare"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {"ms": 1e3 * statistics.median(times), "ratio": middle, "quartiles": [low, high]}
        results[name]["resident"] = resident[name]
        grid.add_row(
            name,
            f"{results[name]['ms']:.2f}",
            f"{middle:.3f} x",
            f"{low:.3f} to {high:.3f}",
            f"{resident[name] / 1e6:,.1f} MB",
        )
    Console().print(grid)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    settings = {name: str(value) for name, value in vars(options).items()}
    found = {"machine": machine, "settings": settings, "results": results}
    (options.out / "mounted_decode.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
