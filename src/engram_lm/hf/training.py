"""Training memories inside other people's loops: one optimizer for plain PyTorch, `transformers.Trainer` and TRL.

    optimizer = RowwiseAdamW(model, lr=1e-3, table_lr=0.05)

AdamW for whatever parameters of the model require gradients, and the row-wise update, where the rows live, for tables: no
dense gradient, no Adam state over a table. In Trainer's checkpoints rows are kept by `hf.checkpoints.EngramCallback`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MismatchError
from .rows import TrainedRows

ROWS = 2  # the first group of rows; before it the matrices, and the gains and biases
NO_MATRICES = ("_gain", "conv_weight", ".alpha", ".static")  # of memories and hyper-connections, though of several axes


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW on a model's trainable parameters, and row-wise Adagrad on the tables of its memories.

    lr: of parameters. table_lr: of rows; 0 leaves them alone. weight_decay: of matrices; gains, biases and rows never decay.
    rows_alone: train rows though their memory's projections are frozen.

    Its parameter groups are the matrices, the gains and biases, and one for each table. Learning rate schedules scale all of
    them. A table's group holds, between a backward and a step, the rows that have gradients: a GradScaler unscales them
    with the rest, and `clip` clips them with the rest (`clip_grad_norm_(model.parameters())`, which is what Trainer's max_grad_norm
    does, leaves them out). Gradients of several backwards add up. A step clears those of rows.

    `state_dict` holds AdamW's moments. A table's accumulators lie in the table, and are saved with it
    (`hf.checkpoints.save_memories`); of the table it has the number of updates, and refuses to go on with other ones.

    Raises ConfigError when nothing of the model trains, and for a memory whose projections are frozen, or replaced by
    adapters, while its rows train, which is what `peft.get_peft_model` does to memories that are there before it.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        table_lr: float = 0.05,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        rows_alone: bool = False,
    ) -> None:
        if not rows_alone:
            _require_projections(model)
        self.tables = list(trained_rows(model))
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trained and not self.tables:
            raise ConfigError(
                "no parameter of the model requires a gradient and no memory trains: nothing would change."
            )
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trained.items() if _is_matrix(name, p)], "weight_decay": weight_decay},
            {"params": [p for name, p in trained.items() if not _is_matrix(name, p)], "weight_decay": 0.0},
            *({"params": [], "lr": table_lr, "weight_decay": 0.0} for _ in self.tables),
        ]
        super().__init__(groups, lr=lr, betas=betas)
        for rows, group in self._rows():
            group["params"] = rows.leaves

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update rows and parameters. Raises MismatchError when rows are not those of the state that was loaded."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _require_one_process(self.tables)
        for rows, group in self._rows():
            _require_clock(rows, group.pop("clock", None))
            rows.step(group["lr"])  # empties the group: AdamW sees no rows
        super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of parameters and rows."""
        super().zero_grad(set_to_none)
        for rows in self.tables:
            rows.zero_grad()

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients, those of rows too, to a norm of at most `max_norm`; returns the norm before."""
        for rows in self.tables:
            rows.merge()
        return nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], max_norm)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and how many updates each table had. Warns when rows were updated that nobody saves."""
        state = super().state_dict()
        for group, rows in zip(state["param_groups"][ROWS:], self.tables, strict=False):
            group |= {"params": [], "clock": rows.lookup.table.clock}
        if any(rows.lookup.table.clock and not rows.kept for rows in self.tables):
            warnings.warn(
                "an optimizer's state holds no rows: a checkpoint of model and optimizer alone cannot be continued. Give the "
                "Trainer an EngramCallback(), or call save_memories first.",
                stacklevel=2,
            )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the rows must be those of that moment when the next step is taken."""
        for rows in self.tables:
            rows.zero_grad()
        super().load_state_dict(state_dict)

    def _rows(self) -> Iterator[tuple[TrainedRows, dict[str, Any]]]:
        return zip(self.tables, self.param_groups[ROWS:], strict=False)  # groups may be added behind them


def trained_rows(model: nn.Module) -> Iterator[TrainedRows]:
    """The rows that train in a model: of attached memories, and of our own models."""
    seen: set[int] = set()
    for module in model.modules():
        rows = getattr(module, "rows", None)  # wrappers, such as peft's, pass on the attributes of what they wrap
        if isinstance(rows, TrainedRows) and getattr(module, "train_rows", True) and id(rows) not in seen:
            seen.add(id(rows))
            yield rows


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and not name.endswith(NO_MATRICES)


def _require_projections(model: nn.Module) -> None:
    for module in model.modules():
        if not hasattr(module, "engrams") or not getattr(module, "train_rows", False):
            continue
        adapters = [name for name, _ in module.named_parameters() if "lora_" in name]
        if adapters:
            raise ConfigError(
                f"peft put adapters into the memory {module.name!r} ({adapters[0]}): its own weights would not have trained. "
                "Call get_peft_model first, then attach."
            )
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError(
                f"the projections of the memory {module.name!r} are frozen while its rows train. peft freezes what is there "
                "before it: call get_peft_model first, then attach. If it is meant, pass rows_alone=True."
            )


def _require_clock(rows: TrainedRows, clock: int | None) -> None:
    table = rows.lookup.table
    if clock not in (None, table.clock):
        raise MismatchError(
            f"the optimizer's state is that of a table after {clock} updates, this table had {table.clock}: rows and "
            "parameters would be of different moments. Restore the rows with load_memories, or give the Trainer an "
            "EngramCallback()."
        )


def _require_one_process(tables: list[TrainedRows]) -> None:
    distributed = torch.distributed
    if tables and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ConfigError(
            f"{distributed.get_world_size()} processes train one model: each would update a table of its own, and they "
            "would drift apart. Train in one process, or freeze the rows."
        )
