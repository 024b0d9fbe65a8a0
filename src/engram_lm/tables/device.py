"""The simplest tier: all rows in one tensor of the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, MismatchError
from .base import Table


class DeviceTable(Table):
    """Rows in memory, updated by row-wise Adagrad with one float of state a row.

    Rows start at zero (the Engram layer's value projection is alive, so they learn from the first step), or from
    N(0, std) when `std` is given. A row's step is lr * gradient / sqrt(accumulated mean square), so the first one has
    a root mean square of lr however small the gradient is: rare rows learn as fast as frequent ones do at first.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        std: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_rows < 1 or dim < 1:
            raise ConfigError(f"a table needs at least one row and one column, got {num_rows} x {dim}.")
        self.num_rows, self.dim = num_rows, dim
        self.rows = torch.zeros(num_rows, dim, device=device)
        if std:
            self.rows.normal_(std=std, generator=torch.Generator(device).manual_seed(seed))
        self.second_moment = torch.zeros(num_rows, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows.nbytes

    def fetch(self, ids: Tensor) -> Tensor:
        """Rows [..., d] of ids [...]."""
        flat = ids.flatten()
        return self.rows.index_select(0, flat).view(*ids.shape, self.dim)

    def update(self, ids: Tensor, grads: Tensor, lr: float) -> None:
        """Row-wise Adagrad (Duchi 2011, one accumulator a row as in DLRM) on distinct ids."""
        moment = self.second_moment.index_select(0, ids) + grads.square().mean(dim=1)
        self.second_moment.index_copy_(0, ids, moment)
        step = grads * (-lr * (moment + 1e-24).rsqrt())[:, None]
        self.rows.index_add_(0, ids, step)

    def state(self) -> dict[str, Tensor]:
        """Rows and accumulators."""
        return {"rows": self.rows, "second_moment": self.second_moment}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy rows and accumulators in."""
        for name, target in self.state().items():
            source = state.get(name)
            if source is None or source.shape != target.shape:
                found = "nothing" if source is None else f"{list(source.shape)}"
                raise MismatchError(f"table state {name!r}: expected {list(target.shape)}, found {found}.")
            target.copy_(source)
