"""The seam at which a sequence is divided: a model that is given one chunk of it asks others for the positions before."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Neighbours(Protocol):
    """The ranks that hold the chunks of a sequence: contiguous, of t positions each, in the order of ranks.

    All of them run the same layers in the same order: each has to answer when one of them asks.
    """

    @property
    def rank(self) -> int:
        """Which chunk is this one's: positions [rank * t, (rank + 1) * t)."""

    def with_past(self, x: Tensor, most: int | None = None) -> Tensor:
        """This rank's x [B, t, ...] -> [B, p + t, ...], in front of it what the ranks before hold of the p positions before.

        most: p is this, or all there are (rank * t) where there are fewer; None for all. Differentiable: the gradient of a
        position goes to the rank that holds it, and is summed there over all ranks that asked.
        """
