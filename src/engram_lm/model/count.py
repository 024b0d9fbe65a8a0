"""Parameters, floating-point operations and bytes of a model, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..hashing import HashPlan
from .lm import LanguageModel, ModelConfig

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("embedding", "head", "attention", "ffn", "experts", "connections", "norms", "memory")


@dataclass(frozen=True)
class Count:
    """The size and cost of a model. Parameter counts of the parts add up to `total`."""

    embedding: int  # token embedding
    head: int  # 0 when it is the embedding's matrix
    attention: int
    ffn: int  # dense feed-forward layers, shared experts and routers
    experts: int  # routed experts
    connections: int  # hyper-connections
    norms: int
    memory: int  # Engram layers: projections, gains, convolution
    tables: int  # the memory's rows
    total: int
    active: int  # what one token passes: neither the embedding nor the tables nor experts that are not chosen
    inference_flops: int  # for a token that sees `context` tokens
    training_flops: int  # a token, in sequences of `context` tokens
    context: int
    table_bytes: int
    table_bytes_per_token: int  # read from the tables for one token

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for label, value in self.lines():
            table.add_row(label, value)
        return table

    def lines(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed table, without the parts that the model lacks."""
        parts = [(f"  {name}", _short(getattr(self, name))) for name in (*PARTS, "tables") if getattr(self, name)]
        lines = [
            ("parameters", _short(self.total)),
            *parts,
            ("active parameters", _short(self.active)),
            (f"FLOPs a token, inference at {self.context:,} tokens", _short(self.inference_flops)),
            (f"FLOPs a token, training on {self.context:,} tokens", _short(self.training_flops)),
        ]
        if self.tables:
            lines += [
                ("table bytes", _short(self.table_bytes) + "B"),
                ("table bytes read a token", f"{self.table_bytes_per_token:,} B"),
            ]
        return lines


def count(config: ModelConfig, *, context: int = 4096, bytes_per_value: int = 4) -> Count:
    """Count the model; `bytes_per_value` is the width of a number in a table's rows.

    A matrix costs 2 FLOPs a parameter, attention 2 for each channel of key and of value that a query meets
    (counted in MLA's expanded form). Training is three times the forward, and on average a token sees half
    the context.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parts[_part(name, parameter)] += parameter.numel()

    tables = row_bytes = 0
    if config.memory is not None:
        hashing, row_dim = config.memory.hash, config.memory.engram.row_dim
        tables = HashPlan.build(hashing, vocab_size=config.vocab_size, pad=0).num_rows * row_dim
        row_bytes = len(hashing.layers) * hashing.rows_per_token * row_dim * bytes_per_value

    total = sum(parts.values()) + tables
    assert total == sum(p.numel() for p in model.parameters()) + tables, "the parts do not add up"
    idle = parts["experts"] - _chosen(config, parts["experts"])
    lookup = 0 if config.tie_embeddings else parts["embedding"]  # a tied embedding also works as the head
    active = total - tables - idle - lookup

    attention = config.attention
    per_key = 2 * config.layers * attention.heads * (attention.query_width + attention.value_width)
    matrices = 2 * (active - parts["norms"])
    return Count(
        **parts,
        tables=tables,
        total=total,
        active=active,
        inference_flops=matrices + per_key * context,
        training_flops=3 * (matrices + per_key * context // 2),
        context=context,
        table_bytes=tables * bytes_per_value,
        table_bytes_per_token=row_bytes,
    )


def _part(name: str, parameter: nn.Parameter) -> str:
    """The part that a parameter of LanguageModel belongs to."""
    if name.startswith(("embedding.", "head.")):
        return name.partition(".")[0]
    if ".memory." in name:
        return "memory"
    if "_connection." in name:
        return "connections"
    if "norm." in name:
        return "norms"
    if ".attention." in name:
        return "attention"
    return "experts" if parameter.ndim == 3 else "ffn"


def _chosen(config: ModelConfig, experts: int) -> int:
    """Of the routed experts' parameters, those that one token passes."""
    return 0 if config.moe is None else experts * config.moe.active // config.moe.experts


def _short(number: int) -> str:
    """Four digits and the metric prefix: 26.75 G."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {prefix}"
    return f"{number} "
