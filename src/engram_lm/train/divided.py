"""Tensors that are divided among ranks, on disk: written by torch.distributed.checkpoint (DCP), read by any number of ranks.

Reading needs no process group and sends nothing: each process reads, of every tensor, the part that it holds.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..errors import CheckpointError, EngramError, MismatchError

FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # our names are flat already


def write_divided(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write tensors into `folder`, called by all ranks of the group: of a DTensor each its part, of others one of them all.

    A tensor that is no DTensor must be the same on every rank. Raises DCP's CheckpointException on every rank when one
    fails, with the errors of those that did.
    """
    dcp.save(tensors, storage_writer=_Writer(folder), planner=DefaultSavePlanner(**FLAT), process_group=group)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whole, in this process's memory. Raises CheckpointError when they cannot be read."""
    with _reading(folder):
        reader = _Reader(folder)
        saved = reader.read_metadata()
        tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _described(saved).items()}
        _fill_from_folder(reader, saved, tensors)
    return tensors


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors with those of a folder or safetensors file: of a DTensor the part that this process holds.

    Values are converted to the dtype of what they fill. Raises MismatchError when names or shapes are others, before
    anything is filled, and CheckpointError when the tensors cannot be read.
    """
    with _reading(path):
        if path.is_dir():
            reader = _Reader(path)
            saved = reader.read_metadata()
            _require_same(path, {name: size for name, (size, _) in _described(saved).items()}, tensors)
            _fill_from_folder(reader, saved, tensors)
        else:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                _require_same(path, shapes, tensors)
                for name, tensor in tensors.items():
                    _fill_from_file(file, name, tensor)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong is an EngramError: others may wait to hear of it."""
    try:
        yield
    except EngramError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error


def _described(saved: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of what a folder holds."""
    tensors = {
        name: found for name, found in saved.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata)
    }
    return {name: (found.size, found.properties.dtype) for name, found in tensors.items()}


@torch.no_grad()
def _fill_from_folder(reader: _Reader, saved: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """What DCP's `load` does, without its collectives: no rank waits for one that fails."""
    planner = DefaultLoadPlanner(**FLAT)
    planner.set_up_planner(dict(tensors), saved)
    reader.set_up_storage_reader(saved, is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner).wait()


@torch.no_grad()
def _fill_from_file(file: Any, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(file.get_tensor(name))
        return
    local = tensor.to_local()
    if local.numel() and local.dim():
        (ours,) = tensor.__create_chunk_list__()
        here = tuple(slice(first, first + size) for first, size in zip(ours.offsets, ours.sizes, strict=True))
        local.copy_(file.get_slice(name)[here])
    elif local.numel():
        local.copy_(file.get_tensor(name))


def _require_same(path: Path, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise MismatchError unless names and shapes are those of `tensors`."""
    shapes = {name: (list(saved[name]), list(tensor.shape)) for name, tensor in tensors.items() if name in saved}
    wrong = {
        "lacks": sorted(tensors.keys() - saved.keys()),
        "has, and this model does not,": sorted(saved.keys() - tensors.keys()),
        "has another shape of": [f"{name} ({old}, not {new})" for name, (old, new) in shapes.items() if old != new],
    }
    found = [f"it {how} {_few(names)}" for how, names in wrong.items() if names]
    if found:
        raise MismatchError(f"{path} belongs to another model: {'; '.join(found)}. Nothing of it was loaded.")


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Writer(FileSystemWriter):
    """Says why a file could not be written: torch.save hides that behind an error of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


class _Reader(FileSystemReader):
    """Takes nothing but the description of tensors from DCP's metadata: a pickle, which could make us run anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in DESCRIPTION:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which describes no tensors and could do anything"
            )
        return super().find_class(module, name)


DESCRIPTION = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ("pathlib", "PosixPath"),
}
