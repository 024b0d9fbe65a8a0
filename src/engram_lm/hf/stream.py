"""Tables out of released checkpoints and into them: rows of 100 GB tensors, a piece at a time, bit for bit.

A release keeps the numbers of rows in one tensor and their scales in another; a table file keeps a row and its scales together.
Importing puts them side by side, exporting takes them apart, and neither changes a bit. A thread writes while the next piece is read; memory is a
few pieces. Holes of sparse files stay holes on either side.
"""

from __future__ import annotations

import base64
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..errors import ConfigError, MismatchError
from ..model.lookup import address_digest
from ..tables.file import TableFile
from ..tables.records import Newest
from ..tables.rows import BLOCK, RowFormat
from ..tokens import CanonicalVocabulary
from .layouts import Layout, RowTensor, Weights, require_kind
from .shards import NAMES, Kind, NewShards, Place, Shards

BEHIND = 2  # pieces that wait to be written while one is read
Progress = Callable[[int, int], None]  # told how many rows are done, and of how many


class Span(NamedTuple):
    """Rows `first` to `last` of the table, all in one tensor."""

    tensor: RowTensor
    first: int
    last: int

    @property
    def inside(self) -> int:
        """Where they begin in the tensor."""
        return self.first - self.tensor.first


# --- in -------------------------------------------------------------------------------------------------------------


def import_table(
    shards: Shards,
    layout: Layout,
    vocabulary: CanonicalVocabulary,
    path: Path,
    *,
    memory: int = 128 << 20,
    trainable: bool = False,
    progress: Progress = lambda done, total: None,
) -> TableFile:
    """Make a table file of a release's rows; it is open, and appeared when it was complete.

    layout: as found in the shards. memory: bytes of buffers. trainable: with an accumulator behind each row.
    Raises MismatchError when a tensor is not what the layout says, before anything is written; otherwise as TableFile.draft and
    Shards do.
    """
    tensors = layout.row_tensors()
    for tensor in tensors:
        require_kind(shards, tensor.name, tensor.kind)
        if tensor.scale:
            require_kind(shards, tensor.scale, tensor.scale_kind)
    form = RowFormat(layout.engram.row_dim, layout.encoding, trainable)
    num_rows = sum(layout.layer_rows)
    digest = address_digest(vocabulary, layout.plan(vocabulary))
    facts = layout.facts | _padding_facts(shards, tensors)
    table = TableFile.draft(path, num_rows, form, digest=digest, facts=facts)
    try:
        with _Writer(table) as writer:
            for span in _spans(tensors, _piece(table, memory)):
                records = _records(shards, layout, form, span)
                if records is not None:
                    writer.write(span.first, records)
                progress(span.last, num_rows)
            writer.finish()
        return table.publish()
    except BaseException:
        table.close()
        raise


def _piece(table: TableFile, memory: int) -> int:
    """Rows of a piece, whole blocks: a piece is there as numbers and as records while it is read, and waits as records."""
    blocks = memory // (2 * (BEHIND + 1) * table.block_rows * table.form.stride)
    if blocks < 1:
        raise ConfigError(
            f"{memory:,} bytes of memory hold no block of {table.block_rows} rows of {table.form.stride} bytes."
        )
    return blocks * table.block_rows


def _spans(tensors: list[RowTensor], piece: int) -> Iterator[Span]:
    """All rows in order, cut at multiples of `piece` and where a tensor ends."""
    for tensor in tensors:
        first, end = tensor.first, tensor.first + tensor.rows
        while first < end:
            last = min(end, (first // piece + 1) * piece)
            yield Span(tensor, first, last)
            first = last


class _Writer:
    """Writes pieces on another thread while the next ones are read; a context manager."""

    def __init__(self, table: TableFile) -> None:
        self.table, self.thread = table, ThreadPoolExecutor(1, thread_name_prefix="engram-import")
        self.pending: deque[Future[None]] = deque()

    def write(self, first: int, records: np.ndarray) -> None:
        """Have a piece written; wait while too many are waiting. Raises what went wrong with an earlier one."""
        self.pending.append(self.thread.submit(self.table.write, first, records))
        self.finish(leaving=BEHIND)

    def finish(self, *, leaving: int = 0) -> None:
        """Wait until no more pieces than that are left."""
        while len(self.pending) > leaving:
            self.pending.popleft().result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(cancel_futures=True)


def _records(shards: Shards, layout: Layout, form: RowFormat, span: Span) -> np.ndarray | None:
    """Records [n, stride] of rows; None where the files have holes, which are rows that were never written."""
    names = [name for name in (span.tensor.name, span.tensor.scale) if name]
    places = [shards.place(name) for name in names]
    if not any(place.holds_data(*_bytes(place, span)) for place in places):
        return None
    records = np.zeros((span.last - span.first, form.stride), np.uint8)
    column = 0
    for place in places:
        part = np.empty((len(records), _width(place.kind)), np.uint8)
        place.read(_bytes(place, span)[0], part)
        records[:, column : column + part.shape[1]] = part
        column += part.shape[1]
    if scale := layout.row_scale(span.tensor.layer):
        written = part.any(1)  # a row of zero bytes stays one that was never written
        records[written, column : column + -(-form.dim // BLOCK)] = scale
    return records


def _width(kind: Kind) -> int:
    """Bytes of a tensor's row."""
    return kind.nbytes // kind.shape[0]


def _bytes(place: Place, span: Span) -> tuple[int, int]:
    """Where a span's bytes begin and end in a tensor."""
    start, width = span.inside, _width(place.kind)
    return start * width, (start + span.last - span.first) * width


def _padding_facts(shards: Shards, tensors: list[RowTensor]) -> dict[str, str]:
    """Rows behind a layer's last one, if they are not zero: nothing reads them, but exporting gives them back."""
    facts = {}
    for tensor in tensors:
        place, width = shards.place(tensor.name), _width(tensor.kind)
        padding = np.empty((tensor.kind.shape[0] - tensor.rows) * width, np.uint8)
        place.read(tensor.rows * width, padding)
        if padding.any():
            facts[f"padding:{tensor.name}"] = base64.b64encode(zlib.compress(padding.tobytes())).decode()
    return facts


def import_weights(shards: Shards, layout: Layout) -> dict[str, torch.Tensor]:
    """The Engrams of all memory layers, as `layers.{block}.{name in Engram's state dict}`; V4.1's with the scales of their
    blocks, `layers.{block}.project.scale`."""
    tensors: dict[str, torch.Tensor] = {}
    for number, block in enumerate(layout.hash.layers):
        weights = layout.weights(shards, number)
        tensors |= {f"layers.{block}.{name}": tensor for name, tensor in weights.state.items()}
        if weights.scales is not None:
            tensors[f"layers.{block}.project.scale"] = weights.scales
    return tensors


# --- out ------------------------------------------------------------------------------------------------------------


def export_table(
    table: TableFile,
    layout: Layout,
    directory: Path,
    *,
    weights: dict[str, torch.Tensor] | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a table's newest rows as a release has them: a shard for each memory layer, an index, and a config.json with what
    the memory is. The directory appears when it is complete.

    layout: what the table's plan is; weights: Engrams as `import_weights` names them, to go with the rows.
    Raises MismatchError when the table does not fit the layout; otherwise as NewShards and Newest do.
    """
    layout = _fitting(table, layout)
    tensors = layout.row_tensors()
    others = [layout.side_tensors(number) for number in range(len(layout.hash.layers))]
    for number, block in enumerate(layout.hash.layers if weights else ()):
        prefix = f"layers.{block}."
        state = {name.removeprefix(prefix): part for name, part in (weights or {}).items() if name.startswith(prefix)}
        others[number] |= layout.weight_tensors(Weights(state, state.pop("project.scale", None)), number)
    with NewShards(directory, [_kinds(tensors, number, small) for number, small in enumerate(others)]) as shards:
        for name, small in chain.from_iterable(parts.items() for parts in others):
            shards.put(name, small)
        for tensor in tensors:
            if noted := table.facts.get(f"padding:{tensor.name}"):
                padding = np.frombuffer(zlib.decompress(base64.b64decode(noted)), np.uint8)
                shards.places[tensor.name].write(tensor.rows * _width(tensor.kind), padding)
        source = Newest(table)
        try:
            for ids, records in source.written():
                for span, part in _split(tensors, ids, records):
                    _put(shards, layout, table.form, span, part)
                progress(int(ids[-1]) + 1, table.num_rows)
        finally:
            source.close()
        shards.publish({"model_type": layout.model_type, "text_config": layout.config()})


def _fitting(table: TableFile, layout: Layout) -> Layout:
    """The layout for this table's encoding. Raises MismatchError where rows or their number cannot be said in it."""
    if table.form.std:
        raise MismatchError(
            f"{table.path}: rows that were never written read as N(0, {table.form.std:g}), released tables have no such rows: "
            "`engram-lm table convert TABLE NEW --serving` writes them down."
        )
    if table.form.dim != layout.engram.row_dim:
        raise MismatchError(
            f"{table.path}: rows of {table.form.dim} numbers, the layout's have {layout.engram.row_dim}."
        )
    if table.num_rows != (rows := sum(layout.layer_rows)):
        raise MismatchError(f"{table.path}: {table.num_rows:,} rows, the layout's primes sum to {rows:,}.")
    try:
        return layout.fitting(table.form)
    except MismatchError as error:
        raise MismatchError(f"{table.path}: {error}") from None


def _kinds(tensors: list[RowTensor], layer: int, small: dict[str, torch.Tensor]) -> dict[str, Kind]:
    """What the shard of a memory layer holds."""
    kinds = {name: Kind(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in small.items()}
    for tensor in tensors:
        if tensor.layer == layer:
            kinds[tensor.name] = tensor.kind
            if tensor.scale:
                kinds[tensor.scale] = tensor.scale_kind
    return kinds


def _split(tensors: list[RowTensor], ids: np.ndarray, records: np.ndarray) -> Iterator[tuple[Span, np.ndarray]]:
    """Runs of consecutive rows that lie in one tensor, with their records."""
    starts = np.array([tensor.first for tensor in tensors])
    where = (
        np.searchsorted(starts, ids, side="right") - 1
    )  # of tensors without rows, which start where the next does, the last
    edges = np.flatnonzero((np.diff(ids) != 1) | (np.diff(where) != 0)) + 1
    for lo, hi in zip([0, *edges.tolist()], [*edges.tolist(), len(ids)], strict=True):
        yield Span(tensors[int(where[lo])], int(ids[lo]), int(ids[hi - 1]) + 1), records[lo:hi]


def _put(shards: NewShards, layout: Layout, form: RowFormat, span: Span, records: np.ndarray) -> None:
    """Write the records of a span as numbers and scales."""
    tensor, column = span.tensor, 0
    for name in (tensor.name, tensor.scale) if tensor.scale else (tensor.name,):
        place = shards.places[name]
        width = _width(place.kind)
        place.write(_bytes(place, span)[0], np.ascontiguousarray(records[:, column : column + width]))
        column += width
    if scale := layout.row_scale(tensor.layer):
        other = (records[:, column : column + -(-form.dim // BLOCK)] != scale).any(1) & records[:, :column].any(1)
        if other.any():
            raise MismatchError(
                f"row {span.first + int(other.argmax()):,} has a scale of its own (it was trained since it was imported), layout "
                f"{layout.name} has one for all: only the table as it was imported can be exported in FP8."
            )
