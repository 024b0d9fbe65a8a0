"""What every table does: give rows by id, and take the row-wise update where the rows live.

Training uses each distinct row of a batch once, as a leaf, so that cost follows the batch and never the table:

    unique, inverse = deduplicate(ids)
    rows = table.fetch(unique).requires_grad_()                  # [U, d]
    loss = model(tokens, expand(rows, inverse)); loss.backward()
    table.update(unique, rows.grad, lr)

Every tier gives the same rows, bit for bit, before and after any updates; only memory and speed change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, MismatchError
from ..kernels import on_gpu
from .dedup import deduplicate
from .expand import add_up
from .rows import RowFormat


class Fetch(Protocol):
    """Rows on their way."""

    def rows(self) -> Tensor:
        """Wait for the rows [..., d] float32, in the order of the ids that were asked for; as of now, not of then."""

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The same rounded to a narrower type, for a model that is held in it."""
        return self.rows().to(dtype)

    def begin(self) -> None:
        """No row will be updated before these are taken: what had to wait for that may start."""
        return

    def collect(self, ids: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients [U, d] of the distinct ids [U] that were asked for -> those that this process applies.

        The same, unless the table's rows are divided among processes: then those of the rows that live here, summed up.
        """
        return ids, grads


class Later(Fetch):
    """Rows that are at hand: read when they are wanted, and so never out of date. rounded: reads them in a narrower type."""

    def __init__(self, read: Callable[[], Tensor], rounded: Callable[[torch.dtype], Tensor] | None = None) -> None:
        self.read, self.read_rounded = read, rounded or super().rounded

    def rows(self) -> Tensor:
        """Read them."""
        return self.read()

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Read them rounded."""
        return self.read_rounded(dtype)


class Table(ABC):
    """`num_rows` rows of `form.dim` numbers, addressed by int64 ids from 0.

    Attributes:
        form: how a row is encoded, and where rows start.
        clock: updates so far; with the seed, all that stochastic rounding depends on.
        device: where rows are delivered.
        address_device: where ids are wanted.
        digest: of the plan and vocabulary that the rows belong to; "" for none.
        place: the file that they are in and stay in; None for memory.
        writable: whether it was opened to be changed.
        by_device: whether rows are read and changed by the device that wants them, wherever they are.
    """

    form: RowFormat
    num_rows: int
    device: torch.device
    address_device: torch.device
    clock: int = 0
    digest: str = ""
    place: Path | None = None
    writable: bool = True
    by_device: bool = False

    def __init__(self, num_rows: int, form: RowFormat, device: torch.device | str = "cpu") -> None:
        if num_rows < 1:
            raise ConfigError(f"a table needs at least one row, got {num_rows}.")
        self.num_rows, self.form, self.device = num_rows, form, torch.device(device)
        self.address_device = self.device

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.form.dim

    @property
    def nbytes(self) -> int:
        """Bytes of all rows with what lies beside them, wherever they are."""
        return self.num_rows * self.form.stride

    @property
    def resident(self) -> int:
        """Bytes of memory that the table takes."""
        return self.nbytes

    @abstractmethod
    def fetch(self, ids: Tensor, *, encoded: bool = False) -> Tensor:
        """Rows [..., d] float32 of ids [...] int64, as a tensor of its own on `device`. See `check` for an id outside.

        encoded: as the bytes [..., form.wire] uint8 in which they are kept, for another process to decode.
        """

    def prefetch(self, ids: Tensor, *, encoded: bool = False) -> Fetch:
        """Start fetching and return at once. The rows are those of the moment in which they are taken."""
        self.check(ids)
        return Later(lambda: self.fetch(ids, encoded=encoded))

    @abstractmethod
    def update(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Apply the row-wise optimizer to distinct ids [U] with gradients [U, d]."""

    def update_reads(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """The same from gradients [..., d] of reads: ids [...] may repeat; those of a row are summed in float32."""
        unique, inverse = deduplicate(ids.reshape(-1))
        grads = grads.reshape(-1, self.dim)
        self.update(unique, add_up(grads, inverse.to(grads.device), len(unique)), lr)

    def apply(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """The same with gradients that a fetch has collected: this process's part of the update."""
        self.update(ids, grads, lr)

    @abstractmethod
    def restore(self, ids: Tensor, records: Tensor) -> None:
        """Set whole records [U, stride] uint8 of distinct ids [U], accumulators too."""

    @abstractmethod
    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Set rows [U, d] of distinct ids [U], rounded to the nearest of the encoding; accumulators stay."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Make the present state durable: what `load(directory, clock)` comes back to, at any time, in any process."""

    @abstractmethod
    def load(self, directory: Path, clock: int) -> None:
        """Return to the state that was saved when `clock` updates were done. Raises MismatchError for another table's."""

    def begin(self, *, again: bool = False) -> None:  # noqa: B027  (memory starts empty)
        """Called by a run that starts here; `again` when an earlier try left no checkpoint, and is to be forgotten."""

    def settle(self, clock: int) -> None:  # noqa: B027  (tables in memory keep nothing)
        """No state before that of `clock` will be loaded again: what was kept for it may go."""

    def close(self) -> None:  # noqa: B027
        """Release files and memory; the table is not used afterwards."""

    def bind(self, digest: str, num_rows: int) -> None:
        """Tie the table to a plan. Raises MismatchError when it belongs to another one or lacks rows that the plan addresses."""
        if self.digest not in ("", digest):
            raise MismatchError(
                f"the table belongs to the plan and vocabulary {self.digest}, these are {digest}: every row would be read "
                "from the wrong place."
            )
        self.digest = digest
        if self.num_rows < num_rows:
            raise MismatchError(
                f"the table has {self.num_rows:,} rows but the plan's primes address {num_rows:,}: the last heads would "
                "read past its end."
            )

    def check(self, ids: Tensor) -> Tensor:
        """The ids, flat. Raises IndexError when one lies outside of the table.

        A table that a GPU reads does not look, since that would wait for it: there such a row reads as NaN, so that the loss
        is NaN and training stops, and its updates are ignored.
        """
        flat = ids.reshape(-1)
        if self.by_device and on_gpu(ids.device):
            return flat.contiguous()
        if flat.numel():
            low, high = (int(end) for end in flat.aminmax())
            if low < 0 or high >= self.num_rows:
                raise IndexError(
                    f"row ids run from {low} to {high}, but the table has rows 0 to {self.num_rows - 1}: they were made by "
                    "another plan, and other rows would have been read."
                )
        return flat

    def _alterable(self) -> None:
        """Raise ConfigError for a table that cannot be trained."""
        if not self.writable or not self.form.trainable:
            reason = "was opened for reading" if not self.writable else "holds rows without accumulators"
            raise ConfigError(f"the table {reason}: its rows cannot be altered, and the update would have been lost.")
