"""Checkpoints that are whole or absent: written aside, synced, then renamed. A manifest holds every file's checksum.

checkpoints/step-000400/  model.safetensors  optimizer.safetensors  table.safetensors  facts.json  manifest.json

Several ranks, which must see one file system, write together: folders model/ and optimizer/ by torch.distributed.checkpoint.
Any other number of ranks, or one process alone, can read them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError, EngramError
from ..tables.file import sync
from .divided import read_into, read_whole, write_divided
from .ranks import Ranks

FACTS, MANIFEST = "facts.json", "manifest.json"
T = TypeVar("T")


def save(
    directory: Path,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    facts: dict[str, Any],
    keep: int = 2,
    *,
    also: Callable[[Path], None] | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Write `parts` (a safetensors file each) and `facts` (JSON) as checkpoint `step`; leave the newest `keep`.

    also: called with the directory that is being written, to add files of its own (a table's).
    ranks: all that save together, each calling this with the same names. A part becomes a folder then; of a DTensor each
        rank writes what it holds, and any other tensor must be the same on every rank. Every rank calls its `also`, which
        names its files as no other does and does not wait for others. `facts` are those of rank 0. None returns before the
        checkpoint is whole.

    Raises CheckpointError when the disk is full or not writable, and on all ranks when anything fails on one; earlier
    checkpoints are not touched then.
    """
    ranks = ranks or Ranks()
    final = directory / f"step-{step:06d}"
    partial = directory / f"{final.name}.partial"
    try:
        _first(ranks, lambda: _begin(partial))
        _together(ranks, lambda: _write(partial, parts, also, ranks))
        names = _first(ranks, lambda: _conclude(partial, {"step": step, **facts}))
        # Each checks a share of what rank 0 sees, so ranks that see another file system are found out here.
        shares = _together(ranks, lambda: _settle(partial, names[ranks.rank :: ranks.size]))
        files = {name: found for share in shares for name, found in share.items()}
        _first(ranks, lambda: _publish(partial, final, files))
    except _Failed as failure:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = ranks.everyones(latest(directory))[0]
        raise CheckpointError(
            f"{final}: cannot be written ({failure}). "
            + (f"The checkpoint before it, {kept.name}, is intact." if kept else "There is no earlier checkpoint.")
        ) from failure.__cause__
    try:
        _first(ranks, lambda: _prune(directory, keep))
    except _Failed as failure:
        raise CheckpointError(
            f"{directory}: old checkpoints cannot be removed ({failure}); {final.name} is whole."
        ) from failure.__cause__
    return final


def _begin(partial: Path) -> None:
    for leftover in partial.parent.glob("step-*.partial"):  # of a run that was killed
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _write(
    partial: Path, parts: dict[str, dict[str, Tensor]], also: Callable[[Path], None] | None, ranks: Ranks
) -> None:
    for name, tensors in parts.items():
        if ranks.size == 1:
            save_file({key: _alone(tensor) for key, tensor in tensors.items()}, partial / f"{name}.safetensors")
        else:
            write_divided(partial / name, tensors, ranks.group)
    if also:
        also(partial)


def _alone(tensor: Tensor) -> Tensor:
    """As a file takes it: among one rank, a DTensor's part is all of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()


def _conclude(partial: Path, facts: dict[str, Any]) -> list[str]:
    """Add the facts; names of all files."""
    (partial / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())


def _settle(partial: Path, names: list[str]) -> dict[str, str]:
    """Make files durable; their checksums."""
    for name in names:
        sync(partial / name)
    return {name: checksum(partial / name) for name in names}


def _publish(partial: Path, final: Path, files: dict[str, str]) -> None:
    """Add the manifest, and give the checkpoint its name."""
    (partial / MANIFEST).write_text(json.dumps(files, sort_keys=True, separators=(",", ":")), encoding="utf-8")
    for path in [partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        sync(path)
    if final.exists():  # a damaged one of the same step
        discard(final)
    partial.rename(final)
    sync(final.parent)


def _prune(directory: Path, keep: int) -> None:
    for old in checkpoints(directory)[:-keep]:
        discard(old)


class _Failed(Exception):
    """What went wrong on which ranks; its cause is this rank's error, if it had one."""


def _together(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, once all have done it. Raises _Failed on all when it fails on any."""
    result: Any = None
    reasons: dict[int, str] = {}
    cause = None
    try:
        result = work()
    except CheckpointException as error:  # every rank gets the same, with the errors of all
        reasons = {rank: _reason(found) for rank, (found, _) in error.failures.items()}
    except Exception as error:
        if ranks.size == 1 and not isinstance(error, OSError | SafetensorError):
            raise
        reasons, cause = {ranks.rank: _reason(error)}, error
    answers = ranks.everyones((result, reasons))
    reasons = {rank: reason for _, found in answers for rank, reason in found.items()}
    if reasons:
        named = [reason if ranks.size == 1 else f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items())]
        raise _Failed("; ".join(named)) from cause
    return [result for result, _ in answers]


def _first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0; the others wait for it. Raises _Failed on all when it fails."""
    return _together(ranks, lambda: work() if ranks.rank == 0 else None)[0]  # type: ignore[return-value]


def _reason(error: BaseException) -> str:
    """In a user's words where they are known; a kind of error otherwise."""
    known = isinstance(error, OSError | SafetensorError | EngramError)
    return str(error) if known else f"{type(error).__name__}: {error}"


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

    ranks: all that open it together, each verifying a share of its files.

    Raises CheckpointError naming the file that is missing, truncated or altered, on all ranks.
    """

    def __init__(self, path: Path, ranks: Ranks | None = None) -> None:
        self.path, self.ranks = path, ranks or Ranks()
        self._agreed(self._verify)
        self.facts = facts_of(path)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, whole, however many ranks saved them. Ranks may call it apart."""
        folder = self.path / name
        return read_whole(folder) if folder.is_dir() else load_file(self.path / f"{name}.safetensors")

    def load_into(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors with those of one part, by all ranks together: of a DTensor each reads what it holds.

        Raises on all ranks MismatchError when names or shapes are others, and then fills nothing, and CheckpointError when
        the part cannot be read.
        """
        folder = self.path / name
        self._agreed(lambda: read_into(folder if folder.is_dir() else self.path / f"{name}.safetensors", tensors))

    def _verify(self) -> None:
        try:
            files = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            if not isinstance(files, dict) or FACTS not in files:
                raise ValueError(f"it does not name {FACTS}")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / MANIFEST}: not a checkpoint's manifest ({error}).{self._advice()}"
            ) from None
        for name, expected in list(files.items())[self.ranks.rank :: self.ranks.size]:
            path = self.path / name
            try:
                found = checksum(path) if path.is_file() else "no file"
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error}).{self._advice()}") from None
            if found != expected:
                raise CheckpointError(
                    f"{path}: its checksum is {found[:12]}, the manifest says {str(expected)[:12]}: the file was "
                    f"truncated or altered, and training would have gone on from other weights.{self._advice()}"
                )

    def _agreed(self, work: Callable[[], None]) -> None:
        """Do it on all ranks; raise on all what any raises."""
        error = None
        try:
            work()
        except EngramError as found:
            error = found
        self.ranks.agree(error)

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
    except OSError as error:
        lock.close()
        raise CheckpointError(
            f"{directory} cannot be locked ({error}): another run could write to it unnoticed. Choose one on a file system with "
            "flock."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
