"""The processes of a run that talk to one another: one of them, or as many as torchrun started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..errors import EngramError, TrainingError


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size` of them. group: theirs; None for a process that runs alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def everyones(self, value: Any) -> list[Any]:
        """The value that each rank gives, in the order of ranks; any that can be pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, error: EngramError | None) -> None:
        """Raise on every rank the error that any of them gives, naming the rank: all go on, or none."""
        errors = {rank: error for rank, error in enumerate(self.everyones(error)) if error}
        if error and (len(errors) == 1 or self.size == 1):
            raise error
        for rank, found in errors.items():
            kind = type(found) if isinstance(found, EngramError) else TrainingError
            raise kind(f"rank {rank}: {found}")
