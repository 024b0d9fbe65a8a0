"""What every table does: give rows by id, and take the row-wise update where the rows live.

Training uses each distinct row of a batch once, as a leaf, so that cost follows the batch and never the table:

    unique, inverse = deduplicate(ids)
    rows = table.fetch(unique).requires_grad_()                  # [U, d]
    loss = model(tokens, F.embedding(inverse, rows)); loss.backward()
    table.update(unique, rows.grad, lr)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MismatchError


@dataclass(frozen=True)
class Fetch:
    """Rows on their way: `rows()` waits for them. Rows that are at hand already are simply held."""

    ready: Tensor

    def rows(self) -> Tensor:
        """[..., d] float32, in the order of the ids that were asked for."""
        return self.ready


class Table(ABC):
    """`num_rows` rows of `dim` numbers, addressed by int64 ids from 0."""

    num_rows: int
    dim: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all rows, without optimizer state."""

    @abstractmethod
    def fetch(self, ids: Tensor) -> Tensor:
        """Rows [..., d] float32 of ids [...] int64, as a tensor of its own. Raises IndexError for an id outside."""

    def prefetch(self, ids: Tensor) -> Fetch:
        """Start fetching and return at once."""
        return Fetch(self.fetch(ids))

    @abstractmethod
    def update(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Apply the row-wise optimizer to distinct ids [U] with gradients [U, d]."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must keep: the rows and the optimizer's state."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises MismatchError when the shapes are another table's."""

    def flush(self) -> None:  # noqa: B027  (tables in memory have nothing to flush)
        """Make every update durable."""

    def close(self) -> None:  # noqa: B027  (nor to close)
        """Release files and memory; the table is not used afterwards."""

    def require(self, num_rows: int) -> None:
        """Raise MismatchError unless the table has the `num_rows` rows that a plan addresses."""
        if self.num_rows < num_rows:
            raise MismatchError(
                f"the table has {self.num_rows:,} rows but the plan's primes address {num_rows:,}: the last heads would "
                "read past its end."
            )


def deduplicate(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [U], ascending, and where each of `ids` [...] is among them: `unique[inverse]` equals `ids`."""
    return torch.unique(ids, return_inverse=True)
