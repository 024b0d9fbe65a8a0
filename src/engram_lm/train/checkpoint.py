"""Checkpoints that are whole or absent: written aside, synced, then renamed. A manifest holds every file's checksum.

checkpoints/step-000400/  model.safetensors  optimizer.safetensors  table.safetensors  facts.json  manifest.json
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError
from ..tables.file import sync

FACTS, MANIFEST = "facts.json", "manifest.json"


def save(
    directory: Path,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    facts: dict[str, Any],
    keep: int = 2,
    *,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write `parts` (a safetensors file each) and `facts` (JSON) as checkpoint `step`; leave the newest `keep`.

    also: called with the directory that is being written, to add files of its own (a table's).

    Raises CheckpointError when the disk is full or not writable; earlier checkpoints are not touched then.
    """
    final = directory / f"step-{step:06d}"
    partial = directory / f"{final.name}.partial"
    try:
        for leftover in directory.glob("step-*.partial"):  # of a run that was killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        for name, tensors in parts.items():
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial / f"{name}.safetensors"
            )
        if also:
            also(partial)
        (partial / FACTS).write_text(json.dumps({"step": step, **facts}, indent=1), encoding="utf-8")
        files = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(files, separators=(",", ":")), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            sync(path)
        if final.exists():  # a damaged one of the same step
            discard(final)
        partial.rename(final)
        sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(directory)
        raise CheckpointError(
            f"{final}: cannot be written ({error}). "
            + (f"The checkpoint before it, {kept.name}, is intact." if kept else "There is no earlier checkpoint.")
        ) from None
    for old in checkpoints(directory)[:-keep]:
        discard(old)
    return final


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; renamed first, so that a kill leaves no half of one that looks whole."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_suffix(".old.partial")), ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in directory.glob("step-*")}
    found = [path for path, step in steps.items() if step.isdecimal() and (path / MANIFEST).exists()]
    return sorted(found, key=lambda path: int(steps[path]))


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    found = checkpoints(directory)
    return found[-1] if found else None


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself; its files are not verified."""
    return json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))


class Checkpoint:
    """A checkpoint on disk, verified on opening: its `facts`, and parts by name.

    Raises CheckpointError naming the file that is missing, truncated or altered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if not isinstance(files, dict) or FACTS not in files:
                raise ValueError(f"it does not name {FACTS}")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path / MANIFEST}: not a checkpoint's manifest ({error}).{self._advice()}"
            ) from None
        for name, expected in files.items():
            found = checksum(path / name) if (path / name).is_file() else "no file"
            if found != expected:
                raise CheckpointError(
                    f"{path / name}: its checksum is {found[:12]}, the manifest says {str(expected)[:12]}: the file was "
                    f"truncated or altered, and training would have gone on from other weights.{self._advice()}"
                )
        self.facts = facts_of(path)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part."""
        return load_file(self.path / f"{name}.safetensors")

    def _advice(self) -> str:
        others = [path for path in checkpoints(self.path.parent) if path != self.path]
        if not others:
            return " There is no other checkpoint."
        return f" Remove {self.path} to go on from {others[-1].name}."


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text, whole or not at all, however the process ends. Raises CheckpointError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); what it held before is intact.") from None


def claim(directory: Path) -> TextIO:
    """Hold a run directory, made if need be, until the returned file is closed or the process ends, however it ends.

    Raises CheckpointError while another process holds it, or when it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot hold a run ({error}): nothing could be saved there.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise CheckpointError(
            f"{directory} is in use by process {holder}: two runs would overwrite each other's checkpoints. Choose another "
            "directory with --out."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
