"""Work beside the present stream of a GPU, and how its results come over. On a CPU, where nothing is asynchronous, it is done at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor | tuple[Tensor, ...])


class Handed(Generic[T]):
    """Tensors that the stream they were made on will have finished: taken before any other stream uses them."""

    def __init__(self, made: T) -> None:
        self.made = made
        self.device = each(made)[0].device
        self.finished = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def take(self) -> T:
        """The tensors, for which the present stream waits; the host does not."""
        if self.finished is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.finished)
            for tensor in each(self.made):
                tensor.record_stream(stream)  # their memory is not given away before it is done with them
        return self.made


class SideStream:
    """A stream of its own on `device`: what runs on it keeps its order, and runs beside everything else."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[..., T], *given: Tensor) -> Handed[T]:
        """work(*given), as the present stream will have left the given tensors."""
        handed = Handed(given)
        with self.current():
            return Handed(work(*handed.take()))

    def current(self) -> AbstractContextManager[Any]:
        """Make it the present stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def adopt(self) -> None:
        """Make it the present stream of this thread, for good."""
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)

    def synchronize(self) -> None:
        """Wait, on the host, until all of it is done."""
        if self.stream is not None:
            self.stream.synchronize()


def each(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of what may be one."""
    return (made,) if isinstance(made, Tensor) else made
