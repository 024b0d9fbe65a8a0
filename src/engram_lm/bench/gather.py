"""Gathering rows: random ones of a table in RAM that no cache holds.

Every contender reads the same memory, in huge pages as our tables have it; the best-known ones also read a table in ordinary
pages, as their users' tables are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..errors import ConfigError
from ..tables.host import huge_pages
from ..train.allocator import keep_freed_memory
from . import peers
from .measure import Contender, Meter
from .results import Results

AS_IT_COMES, KEPT = "allocator as it comes", "freed memory kept"


def bench_gather(
    *,
    gigabytes: float = 6,
    row_bytes: Sequence[int] = (264, 320),
    rows: Sequence[int] = (8_192, 32_768, 131_072),
    rounds: int = 25,
) -> Results:
    """Rows gathered a second, from a table of `gigabytes` with rows of `row_bytes`, so many random `rows` a call.

    Measured twice, since most of a contender's time can be the page faults of its result: with glibc's allocator as it comes,
    which hands large results back to the kernel, and with freed memory kept, as in training with engram-lm. Raises ConfigError
    without Numba, where there is nothing to compare.
    """
    if not kernels.compiled():
        raise ConfigError("bench gather compares the compiled gather with others, and Numba is not in use.")
    meter = Meter("gather", rounds)
    fbgemm = peers.FBGEMM.load(meter.left_out)
    size = int(gigabytes * 1e9)
    block, ordinary = huge_pages(size), torch.empty(size, dtype=torch.uint8).numpy()
    for memory in (AS_IT_COMES, KEPT):
        if memory == AS_IT_COMES and not hands_back():
            meter.left_out[memory] = "this process keeps freed memory already"
            continue
        if memory == KEPT:
            keep_freed_memory()
        for width in row_bytes:
            records, copy = (fill(part[: size // width * width].reshape(-1, width)) for part in (block, ordinary))
            for count in rows:
                title = f"{count:,} rows of {width} bytes out of {gigabytes:g} GB, {memory}"
                meter.measure(title, contenders(records, copy, count, fbgemm), unit="rows", work=count, awake=True)
    return meter.results()


def contenders(records: np.ndarray, ordinary: np.ndarray, count: int, fbgemm: peers.FBGEMM | None) -> list[Contender]:
    """All ways to get `count` rows of records uint8 [N, width], and some to get them of `ordinary`, a copy in ordinary pages."""
    from ..kernels.rows import gather
    from .probe import read

    num_rows, width = records.shape
    table, other = torch.from_numpy(records), torch.from_numpy(ordinary)
    floats, in_pages = table.view(torch.float32), other.view(torch.float32)
    out = torch.zeros(count, width // 4)
    out_bytes = out.view(torch.uint8).numpy()

    def ids() -> tuple[Tensor]:
        return (torch.randint(num_rows, (count,)),)

    def into(ids: Tensor, out: Tensor) -> Tensor:
        gather(records, ids.numpy(), out.view(torch.uint8).numpy())
        return out

    def take(ids: Tensor) -> Tensor:
        np.take(records, ids.numpy(), axis=0, out=out_bytes, mode="clip")
        return out

    def contender(name: str, run: Callable[[Tensor], Tensor], note: str = "") -> Contender:
        return Contender(name, run, lambda got, ids: is_rows(got, ids), ids, note)

    entries = [
        contender("engram-lm, into an array", lambda ids: into(ids, out)),
        contender("engram-lm, new array", lambda ids: into(ids, torch.empty(count, width // 4))),
        contender(
            "F.embedding",
            lambda ids: F.embedding(ids, floats),
            "like all below it, fp32 rows and a new array unless out= is said",
        ),
        contender("table[ids]", lambda ids: floats[ids]),
        contender("index_select", lambda ids: floats.index_select(0, ids)),
        contender("index_select(out=)", lambda ids: torch.index_select(floats, 0, ids, out=out)),
        contender("numpy take(out=)", take),
        contender("F.embedding, ordinary pages", lambda ids: F.embedding(ids, in_pages)),
        contender("index_select(out=), ordinary pages", lambda ids: torch.index_select(in_pages, 0, ids, out=out)),
    ]
    if fbgemm is not None:
        note = "1.8.0, table-batched embedding for inference on a CPU; no pooling, no check of ids, rows out as they are in"
        entries.append(contender("FBGEMM, fp32 rows", fbgemm.gather(table, "fp32"), note))
        note = "the same for rows of a scale and integers, handed on as they are"
        entries.append(contender("FBGEMM, fp32 rows, ordinary pages", fbgemm.gather(other, "fp32")))
        entries.append(contender("FBGEMM, int8 rows", fbgemm.gather(table, "int8"), note))
    note = "a loop that asks for rows ahead, reads a word of each of their cache lines and writes nothing: what memory allows"
    entries.append(
        Contender(
            "reading alone",
            lambda ids: read(records, ids.numpy()),
            lambda got, ids: got == words_of(records, ids.numpy()),
            ids,
            note,
        )
    )
    return entries


def fill(records: np.ndarray, chunk: int = 1 << 18) -> np.ndarray:
    """Give every row numbers that tell it from the others."""
    for first in range(0, len(records), chunk):
        part = records[first : first + chunk].view(np.float32)
        part[:] = rows_of(torch.arange(first, first + len(part)), part.shape[1]).numpy()
    return records


def rows_of(ids: Tensor, dim: int) -> Tensor:
    """What `fill` puts there: [U, dim] float32."""
    rows = (1.0 + ids % 4093)[:, None].repeat(1, dim)
    rows[:, 0] = 1.0 + ids // 4093
    return rows


def is_rows(got: Tensor, ids: Tensor) -> bool:
    """Whether these are the rows of `ids`."""
    rows = got.view(torch.float32)
    return torch.equal(rows, rows_of(ids, rows.shape[1]))


def words_of(records: np.ndarray, slots: np.ndarray) -> int:
    """What `probe.read` computes."""
    words = records.view(np.uint64)[slots]
    return int(np.bitwise_xor.reduce(np.concatenate([words[:, :-1:8], words[:, -1:]], axis=1), axis=None))


def hands_back() -> bool:
    """Whether the allocator returns a large block that is freed to the kernel; the next one is then faulted in page by page."""
    statm = Path("/proc/self/statm")  # pages: all, resident, ...
    if not statm.exists():
        return True
    block = torch.ones(1 << 24)
    before = int(statm.read_text().split()[1])
    del block
    return before - int(statm.read_text().split()[1]) > 1 << 12
