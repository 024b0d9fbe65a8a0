"""How a text uses a table: how often rows are read, who shares them, what became of them, what a cache would hold.

Everything follows from the distinct n-grams of the text and how often each occurs, so cost and memory are those of the
text, whatever the table's size. Of the rows themselves only some that the text reads are fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..hashing import HashPlan
from ..model.lookup import Lookup
from ..tables import Table, deduplicate
from ..tables.rows import initial
from ..train.loader import Batch
from .cache_curve import Stream, curve
from .ngrams import Ngrams, rows_of, views

BUCKETS = (0, 1, 2, 4, 16, 64, 256)  # reads of a row: where each bucket begins
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
CHUNK = 1 << 16  # rows that are fetched at a time


def usage(
    lookup: Lookup, batches: Iterable[Batch], *, norm_rows: int = 1 << 17, cache_tokens: int = 1 << 13
) -> dict[str, Any]:
    """What the text of `batches` (windows as training reads them) does with the table.

    {"tokens", "reads", "rows", "used", "coverage",
     "histogram": {"reads": ["0", "1", "2-3", ..], "rows": [..], "share_of_reads": [..]},
     "blocks": [what `sharing` says of each layer and order],
     "norms": see `norms`, of at most `norm_rows` of the rows that were read,
     "hot": {"rows": [..], "share": [..]}: the share of all reads that the so many most frequent rows serve,
     "cache": {"tokens", "slots": [..], "s3fifo": [..], "static": [..]}: hit rates token by token in the second half of the
     first `cache_tokens` tokens (see cache_curve.py)}

    Rows of the text that is given: those that it never reads may have been read by more of the training text.
    Raises DataError for no text.
    """
    seen = [views(lookup, batch.tokens, batch.segments) for batch in batches]
    if not sum(map(len, seen)):
        raise DataError("no text was given: nothing can be said about how the table is used.")
    everywhere = np.concatenate(seen)
    return usage_of(lookup, everywhere, Ngrams.of(everywhere, lookup.plan.vocab_size), norm_rows, cache_tokens)


def usage_of(
    lookup: Lookup, seen: np.ndarray, text: Ngrams, norm_rows: int = 1 << 17, cache_tokens: int = 1 << 13
) -> dict[str, Any]:
    """`usage` of a text whose views [T, N] and n-grams are at hand."""
    plan = lookup.plan
    blocks, rows, reads = [], [], []
    for column, order in enumerate(plan.orders):
        ids = rows_of(plan, text.seen[order - 1])[:, :, column]  # [U, L, heads]
        for layer, block in enumerate(plan.layers):
            heads = slice(column * plan.heads, (column + 1) * plan.heads)
            found, used, served = sharing(ids[:, layer], text.counts[order - 1])
            size = int(plan.sizes[layer, heads].sum())
            blocks.append({"layer": block, "order": order, "rows": size, "coverage": len(used) / size, **found})
            rows.append(used)
            reads.append(served)
    used, served = np.concatenate(rows), np.concatenate(reads)
    return {
        "tokens": len(seen),
        "reads": int(served.sum()),
        "rows": plan.num_rows,
        "used": len(used),
        "coverage": len(used) / plan.num_rows,
        "histogram": histogram(served, plan.num_rows),
        "blocks": sorted(blocks, key=lambda found: (plan.layers.index(found["layer"]), found["order"])),
        "norms": norms(lookup.table, used, served, norm_rows),
        "hot": hot_set(served),
        "cache": cache(plan, seen[:cache_tokens]),
    }


def sharing(rows: np.ndarray, counts: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Which of the distinct n-grams of one order share rows of one layer: rows [U, heads], occurrences [U].

    {"used": rows that are read, "ngrams": U, "ngrams_per_row": mean over used rows,
     "shared": share of n-grams that share their row of a head with another one (mean over heads),
     "shared_everywhere": share of those that do so in every head, with whomever,
     "indistinguishable": share of those that have all their rows in common with another one,
     "shared_reads": share of all reads that fall on a shared row}

    and the rows that are read [R] with how often each is [R].
    """
    used, reads = [], []
    shared = np.empty(rows.shape, bool)
    same = np.zeros(len(rows), np.int64)  # n-grams with equal numbers have equal rows in all heads so far
    for head in range(rows.shape[1]):
        found, number = _distinct(rows[:, head])
        used.append(found)
        reads.append(np.bincount(number, counts, len(found)).astype(np.int64))
        shared[:, head] = np.bincount(number)[number] > 1
        _, same = _distinct(same * len(found) + number)
    everywhere = np.concatenate(used)
    facts = {
        "used": len(everywhere),
        "ngrams": len(rows),
        "ngrams_per_row": rows.size / len(everywhere),
        "shared": float(shared.mean()),
        "shared_everywhere": float(shared.all(1).mean()),
        "indistinguishable": float((np.bincount(same)[same] > 1).mean()),
        "shared_reads": float((counts @ shared).sum() / (counts.sum() * rows.shape[1])),
    }
    return facts, everywhere, np.concatenate(reads)


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids [U] ascending, and where each of `ids` is among them."""
    unique, inverse = deduplicate(torch.from_numpy(ids.astype(np.int64)))
    return unique.numpy(), inverse.numpy()


def bucket_names() -> list[str]:
    """Of `BUCKETS`: "0", "1", "2-3", ..., "256+"."""
    ends = [following - 1 for following in BUCKETS[1:]]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(BUCKETS, ends, strict=False)] + [f"{BUCKETS[-1]}+"]


def _bucket(reads: np.ndarray) -> np.ndarray:
    return np.searchsorted(BUCKETS, reads, side="right") - 1


def histogram(reads: np.ndarray, num_rows: int) -> dict[str, Any]:
    """Rows by how often they are read, and the share of all reads that each bucket of rows serves."""
    bucket = _bucket(reads)
    rows = np.bincount(bucket, minlength=len(BUCKETS))
    rows[0] = num_rows - len(reads)
    served = np.bincount(bucket, reads, len(BUCKETS)) / reads.sum()
    return {"reads": bucket_names(), "rows": rows.tolist(), "share_of_reads": served.tolist()}


def norms(table: Table, ids: np.ndarray, reads: np.ndarray, limit: int) -> dict[str, Any]:
    """Lengths of rows that were read `reads` times each, and how far they have moved; of `limit` of them, spread evenly.

    {"rows": how many were fetched, "initial": expected length of a row that was never written, "norm": {"0.5": ..},
     "moved": {"0.5": ..}: quantiles of |row| and of |row - initial row|, "unmoved": share of the rows that are as they began,
     "by_reads": [{"reads": "2-3", "rows", "norm", "moved"}]: medians}

    A table of std 0 begins as zeros: there moved = norm, and a row that is not read here has never been fetched.
    """
    chosen = np.arange(len(ids)) if len(ids) <= limit else np.arange(limit) * len(ids) // limit
    ids, bucket = ids[chosen], _bucket(reads[chosen])
    lengths, moved = np.empty(len(ids)), np.empty(len(ids))
    for first in range(0, len(ids), CHUNK):
        part = slice(first, first + CHUNK)
        numbers = torch.from_numpy(ids[part]).to(table.address_device)
        rows = table.fetch(numbers)
        lengths[part] = rows.norm(dim=1).cpu().numpy()
        if table.form.std:
            rows = rows - initial(table.form, numbers.to(rows.device))
            moved[part] = rows.norm(dim=1).cpu().numpy()
        else:
            moved[part] = lengths[part]
    by_reads = [
        {
            "reads": name,
            "rows": int(inside.sum()),
            "norm": float(np.median(lengths[inside])),
            "moved": float(np.median(moved[inside])),
        }
        for number, name in enumerate(bucket_names())
        if (inside := bucket == number).any()
    ]
    return {
        "rows": len(ids),
        "initial": table.form.std * table.dim**0.5,
        "norm": _quantiles(lengths),
        "moved": _quantiles(moved),
        "unmoved": float((moved == 0).mean()),
        "by_reads": by_reads,
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def hot_set(reads: np.ndarray) -> dict[str, Any]:
    """Share of all reads that the 1, 4, 16, ... most frequent rows serve, and all of them."""
    served = np.cumsum(np.sort(reads)[::-1])
    sizes = [4**power for power in range(32) if 4**power < len(reads)] + [len(reads)]
    return {"rows": sizes, "share": (served[np.array(sizes) - 1] / served[-1]).tolist()}


def cache(plan: HashPlan, seen: np.ndarray) -> dict[str, Any]:
    """Hit rates of caches that hold a part of the rows which views [T, N] read, a token at a call."""
    stream = Stream.of(rows_of(plan, seen).reshape(len(seen), -1))
    slots = sorted({max(1, len(stream.rows) >> shift) for shift in (8, 6, 4, 2, 0)})
    rates = {policy: curve(stream, slots, policy)[:, 0].tolist() for policy in ("s3fifo", "static")}
    return {"tokens": len(seen), "slots": slots, **rates}
