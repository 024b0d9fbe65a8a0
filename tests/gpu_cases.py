"""What test_gpu_compiles.py compiles: calls of the functions that launch kernels, at realistic sizes, on the meta device.

A tensor of the CPU stands for one in pinned host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from engram_lm.hashing import HashConfig, HashPlan
from engram_lm.kernels.gpu import fuse, hashing, rows, sums
from engram_lm.memory import EngramConfig
from engram_lm.tables import codec
from engram_lm.tables.rows import ENCODINGS, RowFormat

META = torch.device("meta")
READS, ROWS, DISTINCT = 2**19, 2**28, 300_001  # of a batch, of a table, of a batch once each
V41 = HashConfig.deepseek_v41()
empty = partial(torch.empty, device=META)
int64 = partial(empty, dtype=torch.int64)


def hash_ngrams(config: HashConfig, batch: int, length: int, *, everything: bool) -> None:
    plan = HashPlan.build(config, vocab_size=100_000, pad=2)
    tokens, history = int64(batch, length), int64(batch, plan.history_length, 2)
    given = (tokens, tokens.bool(), history) if everything else (None, None, None)
    hashing.hash_ngrams(hashing.constants(plan, META), tokens, *given)


def read(form: RowFormat, dtype: torch.dtype) -> None:
    records = empty(ROWS, form.stride, dtype=torch.uint8)
    rows.read_rows(form, records, int64(DISTINCT), int64(DISTINCT), empty(DISTINCT, form.dim, dtype=dtype))


def read_from_host(form: RowFormat) -> None:
    records = torch.empty(100, form.stride, dtype=torch.uint8)
    rows.read_rows(form, records[:, : form.wire], int64(DISTINCT), int64(DISTINCT), empty(DISTINCT, form.dim))


def update(form: RowFormat, dtype: torch.dtype) -> None:
    """Once with a gradient for each row, and once with one for each read."""
    records, slots = empty(ROWS, form.stride, dtype=torch.uint8), int64(DISTINCT)
    rows.update_rows(form, records, slots, slots, empty(DISTINCT, form.dim, dtype=dtype), 0.1, 1)
    reads = sums.reads_of(int64(READS), DISTINCT)
    rows.update_rows(form, records, slots, slots, empty(READS, form.dim, dtype=dtype), 0.1, 1, reads)


def read_near_or_far(form: RowFormat) -> None:
    """From copies on the device where there are some."""
    records, near = torch.empty(100, form.stride, dtype=torch.uint8), empty(DISTINCT, form.stride, dtype=torch.uint8)
    copies = codec.Copies(int64(DISTINCT), near)
    rows.gather(records, int64(READS), empty(READS, form.stride, dtype=torch.uint8), copies)


def write_to_host(form: RowFormat) -> None:
    records = torch.empty(100, form.stride, dtype=torch.uint8)
    rows.scatter(records, int64(DISTINCT), empty(DISTINCT, form.stride, dtype=torch.uint8))


def encode(form: RowFormat) -> None:
    rows.encode(form, empty(DISTINCT, form.dim), empty(DISTINCT, form.row_bytes, dtype=torch.uint8))


def sum_rows(dim: int, dtype: torch.dtype) -> None:
    sums.sum_rows(empty(READS, dim, dtype=dtype), int64(READS), empty(DISTINCT, dim))


def fuse_both_ways(config: EngramConfig, streams: int, dim: int, dtype: torch.dtype, *, everything: bool) -> None:
    batch, length = 4, 4096
    learned = partial(empty, requires_grad=True)
    delta = fuse.fuse(
        None,
        learned(batch, length, streams, dim, dtype=dtype),
        learned(batch, length, streams + 1, dim, dtype=dtype),
        learned(streams, dim),
        learned(config.conv_kernel, streams, dim),
        segments=int64(batch, length) if everything else None,
        keep=empty(batch, length, dtype=torch.bool) if everything else None,
        config=config,
    )
    delta.backward(empty(delta.shape, dtype=dtype))


def cases() -> dict[str, Callable[[], Any]]:
    """A call by name."""
    named: dict[str, Callable[[], Any]] = {
        "hash a batch": lambda: hash_ngrams(V41, 8, 4096, everything=False),
        "hash with segments, dead and history": lambda: hash_ngrams(V41, 64, 1, everything=True),
        "hash with many heads": lambda: hash_ngrams(replace(V41, heads=43), 8, 4096, everything=True),
    }
    for dim in 64, 256:
        for encoding in ENCODINGS:
            frozen = RowFormat(dim, encoding, trainable=False)
            trained = RowFormat(dim, encoding, std=0.02)
            named |= {
                f"read {encoding} {dim}": partial(read, frozen, torch.bfloat16),
                f"read {encoding} {dim} in training": partial(read, trained, torch.float32),
                f"read {encoding} {dim} from the host": partial(read_from_host, trained),
                f"update {encoding} {dim}": partial(update, trained, torch.bfloat16),
                f"write {encoding} {dim} to the host": partial(write_to_host, trained),
                f"encode {encoding} {dim}": partial(encode, frozen),
            }
        named[f"read {dim} from copies or the host"] = partial(read_near_or_far, RowFormat(dim, "fp8_e8m0"))
        for dtype in torch.float32, torch.bfloat16:
            named[f"sum {dim} {dtype}"] = partial(sum_rows, dim, dtype)
    for gate, taps in ("signed_sqrt", 4), ("copysign_sqrt", 0):
        config = EngramConfig(gate=gate, conv_kernel=taps)
        for streams, dtype in (1, torch.bfloat16), (4, torch.bfloat16), (4, torch.float32):
            name = f"fuse {streams} streams {taps} taps {dtype}"
            named[name] = partial(fuse_both_ways, config, streams, 2560, dtype, everything=dtype == torch.float32)
    return named


CASES = cases()
