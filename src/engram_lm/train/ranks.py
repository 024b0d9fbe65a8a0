"""The processes of a run that talk to one another: one of them, or as many as torchrun started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import EngramError, TrainingError

T = TypeVar("T")


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

    def first(self, work: Callable[[], T]) -> T | None:
        """What `work` returns on rank 0, there; None on the others, which wait for it however long it takes.

        Raises on every rank the EngramError that it raises.
        """
        if self.group is None:
            return work()
        patient = dist.new_group(dist.get_process_group_ranks(self.group), timeout=timedelta(days=1))
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except EngramError as found:
                error = found
        replace(self, group=patient).agree(error)
        dist.destroy_process_group(patient)
        return result

    def agree(self, error: EngramError | None) -> None:
        """Raise on every rank the error that any of them gives, naming the rank: all go on, or none."""
        errors = {rank: error for rank, error in enumerate(self.everyones(error)) if error}
        if error and (len(errors) == 1 or self.size == 1):
            raise error
        for rank, found in errors.items():
            kind = type(found) if isinstance(found, EngramError) else TrainingError
            raise kind(f"rank {rank}: {found}")
