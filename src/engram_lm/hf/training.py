"""Training memories inside other people's loops: one optimizer for plain PyTorch, `transformers.Trainer` and TRL.

    optimizer = RowwiseAdamW(model, lr=1e-3, table_lr=0.05)

AdamW for whatever parameters of the model require gradients, and the row-wise update, where the rows live, for tables: no
dense gradient, no Adam state over a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .rows import TrainedRows


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW on a model's trainable parameters, and row-wise Adagrad on the tables of its memories.

    lr: of parameters. table_lr: of rows; 0 leaves them alone. Both are groups that a learning rate schedule scales.
    weight_decay: of matrices; gains, biases and rows never decay.

    Raises ConfigError when nothing of the model trains, and for a memory whose projections are frozen while its rows train.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        table_lr: float = 0.05,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        self.tables = list(trained_rows(model))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained and not self.tables:
            raise ConfigError(
                "no parameter of the model requires a gradient and no memory trains: nothing would change."
            )
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
            {"params": [], "lr": table_lr, "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=lr, betas=betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update parameters and rows."""
        loss = super().step(closure)
        for rows in self.tables:
            if self.param_groups[-1]["lr"] > 0:
                rows.step(self.param_groups[-1]["lr"])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of parameters and rows."""
        super().zero_grad(set_to_none)
        for rows in self.tables:
            rows.zero_grad()


def trained_rows(model: nn.Module) -> Iterator[TrainedRows]:
    """The rows that train in a model: of attached memories, and of our own models."""
    for module in model.modules():
        rows = getattr(module, "rows", None)
        if isinstance(rows, TrainedRows) and getattr(module, "train_rows", True):
            yield rows
