"""Safetensors shards as models are published: an index, and files that may each be many times larger than memory.

Tensors are found by name, and read and written with plain reads and writes at their place in a file. Nothing is mapped, so a
process that goes through 200 GB holds no more of it than its own buffers.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, DataError
from ..tables.file import PAGE, read_header, sync

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Kind:
    """What a tensor is: the name of its type in safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor are: from byte `offset` of an open file on."""

    kind: Kind
    path: Path
    descriptor: int
    offset: int

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, C-contiguous, with the tensor's bytes from `start` on. Raises DataError when the file cannot give them."""
        view, offset = out.reshape(-1).view(np.uint8).data, self.offset + start
        while len(view):
            try:
                count = os.preadv(self.descriptor, [view], offset)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read at byte {offset:,} ({error.strerror}).") from None
            if not count:
                raise DataError(f"{self.path}: ends at byte {offset:,} now; it was cut while it was read.")
            view, offset = view[count:], offset + count

    def write(self, start: int, data: np.ndarray) -> None:
        """Write bytes, C-contiguous, from the tensor's byte `start` on. Raises CheckpointError when the disk does not take them."""
        view, offset = data.reshape(-1).view(np.uint8).data, self.offset + start
        while len(view):
            try:
                count = os.pwrite(self.descriptor, view, offset)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be written ({error.strerror}).") from None
            view, offset = view[count:], offset + count

    def holds_data(self, start: int, end: int) -> bool:
        """Whether the file system keeps any of the tensor's bytes `start` to `end`; a hole reads as zeros."""
        try:
            return os.lseek(self.descriptor, self.offset + start, os.SEEK_DATA) < self.offset + end
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from None
            return False  # a hole up to the end of the file


class Shards:
    """The tensors of a directory with an index, of one with safetensors files alone, or of given files. Files are opened when
    a tensor of theirs is asked for, so those of other tensors need not be there. A context manager.

    Raises DataError for what is not there, is cut short or is no safetensors file.
    """

    def __init__(self, sources: Iterable[Path]) -> None:
        self.sources = tuple(sources)
        if not self.sources:
            raise DataError("no directory and no safetensors file is named, so there are no tensors to read.")
        first = self.sources[0]
        self.directory = first if first.is_dir() else first.parent
        self._open: dict[Path, tuple[int, dict[str, Any], int]] = {}
        try:
            self.files = self._files()
        except BaseException:
            self.close()
            raise

    def _files(self) -> dict[str, Path]:
        """The file of each tensor."""
        index = self.directory / INDEX
        if self.sources[0].is_dir() and index.exists():
            try:
                files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self.directory / file for name, file in files.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{index}: no index of safetensors files ({error!r}).") from None
        paths = self.sources
        if self.sources[0].is_dir():
            paths = tuple(sorted(self.directory.glob("*.safetensors")))
        if not paths:
            raise DataError(f"{self.directory}: holds neither {INDEX} nor safetensors files.")
        return {name: path for path in paths for name in self._header(path)[1] if name != "__metadata__"}

    def _header(self, path: Path) -> tuple[int, dict[str, Any], int]:
        """Descriptor, header and beginning of the data of a file."""
        if path not in self._open:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be opened ({error.strerror}); tensors that are wanted lie in it."
                ) from None
            self._open[path] = descriptor, *({}, 0)  # closed with the rest, whatever its header says
            self._open[path] = descriptor, *read_header(path, descriptor)
        return self._open[path]

    def prefix(self, suffix: str) -> str:
        """What stands before `suffix` in the one tensor's name that ends in it. Raises DataError when it is not one."""
        found = [name for name in self.files if name == suffix or name.endswith(f".{suffix}")]
        if len(found) != 1:
            what = f"several: {', '.join(found)}" if found else f"none of its {len(self.files):,} tensors does"
            raise DataError(f"{self.directory}: one tensor's name should end in {suffix}; {what}.")
        return found[0].removesuffix(suffix)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def place(self, name: str) -> Place:
        """Where a tensor is."""
        if name not in self.files:
            raise DataError(f"{self.directory}: has no tensor {name}.")
        descriptor, header, start = self._header(self.files[name])
        try:
            entry = header[name]
            kind = Kind(entry["dtype"], tuple(entry["shape"]))
            lo, hi = entry["data_offsets"]
            if hi - lo != kind.nbytes:
                raise ValueError(f"{kind} does not take {hi - lo:,} bytes")
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{self.files[name]}: has no {name} that can be read ({error!r}).") from None
        return Place(kind, self.files[name], descriptor, start + lo)

    def tensor(self, name: str) -> Tensor:
        """A small tensor, in memory."""
        place = self.place(name)
        data = np.empty(place.kind.nbytes, np.uint8)
        place.read(0, data)
        return torch.from_numpy(data).view(DTYPES[place.kind.dtype]).view(place.kind.shape)

    def close(self) -> None:
        """Let go of the files."""
        for descriptor, _, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class NewShards:
    """A directory of shards that is being written: DIRECTORY.partial until `publish`. Closed before that, it vanishes.

    files: for each file the tensors in it, in order. They begin as holes, which read as zeros. A context manager.
    Raises CheckpointError when the directory is there already or cannot be written.
    """

    def __init__(self, directory: Path, files: list[dict[str, Kind]]) -> None:
        self.target, self.directory = directory, directory.with_name(f"{directory.name}.partial")
        self.places: dict[str, Place] = {}
        self._descriptors: list[int] = []
        if directory.exists():
            raise CheckpointError(f"{directory}: exists, and nothing is overwritten; remove it or name another.")
        try:
            self._remove()  # what a process that was killed left
            self.directory.mkdir(parents=True)
            for number, tensors in enumerate(files, start=1):
                self._create(self.directory / f"model-{number:05}-of-{len(files):05}.safetensors", tensors)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{directory}: cannot be written ({error.strerror}).") from None

    def _create(self, path: Path, tensors: Mapping[str, Kind]) -> None:
        """A file with a header and room for its tensors."""
        ends = list(accumulate((kind.nbytes for kind in tensors.values()), initial=0))
        entries = {
            name: {"dtype": kind.dtype, "shape": kind.shape, "data_offsets": span}
            for (name, kind), span in zip(tensors.items(), pairwise(ends), strict=True)
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptors.append(descriptor)
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(descriptor, 8 + len(text) + ends[-1])
        for (name, kind), start in zip(tensors.items(), ends, strict=False):
            self.places[name] = Place(kind, path, descriptor, 8 + len(text) + start)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        self.places[name].write(0, tensor.contiguous().view(-1).view(torch.uint8).numpy())

    def publish(self, config: dict[str, Any]) -> None:
        """Write the index and config.json, make everything durable, and give the directory its name."""
        total = sum(place.kind.nbytes for place in self.places.values())
        files = {name: place.path.name for name, place in self.places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        try:
            for name, content in (INDEX, index), ("config.json", config):
                (self.directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                sync(self.directory / name)
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            sync(self.directory)
            self.directory.rename(self.target)
            sync(self.target.parent)
        except OSError as error:
            raise CheckpointError(f"{self.target}: cannot be written ({error.strerror}).") from None

    def close(self) -> None:
        """Let go of the files; unless they were published, remove them."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._remove()

    def _remove(self) -> None:
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                path.unlink()
            self.directory.rmdir()

    def __enter__(self) -> NewShards:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
