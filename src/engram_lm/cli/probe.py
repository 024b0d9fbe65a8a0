"""`engram-lm probe`: what the memory of a trained model does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid
from tyro.conf import Positional

from ..train.loader import Loader


@dataclass(frozen=True)
class Probe:
    """Look into a trained model's memory: knock-outs, gates, table usage and a gate view; with --against, representations.

    Losses and gates are measured on a sample of the held-out text, the table's usage on the text that training read.
    """

    directory: Positional[Path]
    """Run directory."""
    against: Path | None = None
    """Another run on the same text, with or without a memory: compare both models layer by layer."""
    tokens: int = 0
    """Training tokens that are counted, in the order in which training read them. 0: as many as are held out."""
    text: str = ""
    """Text for the gate view. Default: the beginning of a held-out document."""
    out: Path | None = None
    """JSON file. Default: DIRECTORY/probes.json."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def run(self, console: Console) -> int:
        """Load, probe, print, write."""
        from ..analysis.probes import compare_runs, probe
        from ..train.precision import autocast
        from ..train.run import beside, load_run
        from ..train.shards import open_shards
        from ..train.tokenizer import separator_id

        trained = load_run(self.directory, self.device)
        config, tokenizer = trained.config, trained.tokenizer
        data = open_shards(beside(self.directory, "shards"))
        viewed = None
        if self.text:
            ids = [separator_id(tokenizer), *tokenizer.encode(self.text, add_special_tokens=False).ids]
            viewed = torch.tensor(ids), "given text"
        with autocast(config.precision, trained.device):
            found = probe(
                trained.model,
                trained.lookup,
                data.val,
                Loader(data.train, config.batch_size, config.length, config.seed).first(trained.step),
                tokenizer,
                batch_size=config.batch_size,
                length=config.length,
                tokens=self.tokens or None,
                viewed=viewed,
            )
            show(console, found)
            if self.against:
                names = str(self.directory), str(self.against)
                found |= compare_runs(trained, load_run(self.against, self.device), data.val, names)
                show_against(console, found, *names)
        out = self.out or self.directory / "probes.json"
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"Wrote {out}", soft_wrap=True)
        return 0


def show(console: Console, found: dict[str, Any]) -> None:
    """Tables of what `probe` found."""
    knockout = found["knockout"]
    console.print(
        grid(
            f"Loss without a part ({knockout['tokens']:,} tokens, {knockout['documents']:,} documents)",
            ["", "nats a token", "above", "95 % interval"],
            [
                [name, f"{one['loss']:.4f}", f"{one['difference']:+.4f}", between(one["interval"])]
                for name, one in knockout["variants"].items()
            ],
        )
    )
    gates = found["gates"]
    console.print(
        grid(
            f"Gates ({gates['tokens']:,} tokens)",
            ["", "mean", "quartiles", "< 0.05", "> 0.95", "memory / hidden RMS"],
            [
                [
                    f"block {layer['layer']}, stream {number}",
                    f"{one['mean']:.3f}",
                    " ".join(f"{quartile:.3f}" for quartile in one["quartiles"]),
                    f"{one['closed']:.1%}",
                    f"{one['open']:.1%}",
                    f"{layer['relative']:.3f}",
                ]
                for layer in gates["layers"]
                for number, one in enumerate(layer["streams"])
            ],
        )
    )
    usage = found["usage"]
    console.print(
        grid(
            f"Table, read by {usage['tokens']:,} training tokens",
            [
                "",
                "rows",
                "read",
                "n-grams",
                "n-grams a row",
                "share a row",
                "reads of shared rows",
                "same rows as another",
            ],
            [
                [
                    f"block {one['layer']}, {one['order']}-grams",
                    f"{one['rows']:,}",
                    f"{one['coverage']:.1%}",
                    f"{one['ngrams']:,}",
                    f"{one['ngrams_per_row']:.2f}",
                    f"{one['shared']:.1%}",
                    f"{one['shared_reads']:.1%}",
                    f"{one['indistinguishable']:.1%}",
                ]
                for one in usage["blocks"]
            ],
        )
    )
    console.print(
        grid(
            f"Rows by how often they are read (median length; {usage['norms']['unmoved']:.1%} of those read never moved)",
            ["", *usage["histogram"]["reads"]],
            [
                ["rows", *(f"{rows:,}" for rows in usage["histogram"]["rows"])],
                ["share of reads", *(f"{share:.1%}" for share in usage["histogram"]["share_of_reads"])],
                ["length", *lengths(usage)],
            ],
        )
    )
    seconds = found["seconds"]
    parts = ", ".join(f"{name} {seconds[name]:.2f}" for name in ("knockout", "gates", "usage", "gate_view"))
    console.print(
        f"Seconds: {parts}; together {seconds['ratio']:.0%} of an evaluation of the held-out text ({seconds['evaluation']:.2f})."
    )


def show_against(console: Console, found: dict[str, Any], one: str, other: str) -> None:
    """A table of what `compare_runs` found, a row a layer."""
    lens, against, alignment = found["lens"][one], found["lens"][other], found["cka"]

    def cell(values: list[float | None], layer: int) -> str:
        value = values[layer] if layer < len(values) else None
        return "" if value is None else f"{value:.3f}"

    console.print(
        grid(
            f"Layer by layer, against {other} (0: the embedding; {lens['tokens']:,} tokens)",
            ["", "KL to the final prediction", "of the other", "is like the other's layer", "standard error"],
            [
                [
                    str(layer),
                    cell(lens["kl"], layer),
                    cell(against["kl"], layer),
                    cell(alignment["alignment"], layer),
                    cell(alignment["alignment_error"], layer),
                ]
                for layer in range(max(len(lens["layers"]), len(against["layers"])))
            ],
        )
    )


def lengths(usage: dict[str, Any]) -> list[str]:
    """Median length of the rows in each bucket of reads."""
    known = {one["reads"]: f"{one['norm']:.2f}" for one in usage["norms"]["by_reads"]}
    return [known.get(name, "") for name in usage["histogram"]["reads"]]


def between(interval: list[float] | None) -> str:
    """An interval, where there is one."""
    return "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def grid(title: str, columns: list[str], rows: list[list[str]]) -> Grid:
    """A table of text, numbers to the right."""
    table = Grid(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
