"""Watch a model without changing it: hooks on its memory layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..errors import MismatchError
from ..memory import Engram
from ..model.lm import LanguageModel
from ..model.lookup import Lookup

Note = Callable[[int, Engram, Tensor, Tensor, Tensor], None]


def memories(model: LanguageModel) -> list[Engram]:
    """The memory layers in the order of the plan, which is that of L in rows [B, T, L, K, d].

    Raises MismatchError for a model without a memory.
    """
    if model.config.memory is None:
        raise MismatchError("this model has no memory: there is nothing in it to watch or to take away.")
    found = [model.blocks[layer].memory for layer in model.config.memory.hash.layers]
    assert all(isinstance(memory, Engram) for memory in found)
    return found  # type: ignore[return-value]


@contextmanager
def watching(model: LanguageModel, note: Note) -> Iterator[None]:
    """Within, each memory layer reports `note(l, module, hidden [B, T, M, D], rows [B, T, K, d], delta [B, T, M, D])`."""
    with ExitStack() as stack:
        for number, memory in enumerate(memories(model)):

            def hook(module, inputs, output, number=number):  # type: ignore[no-untyped-def]
                note(number, module, inputs[0], inputs[1], output[0])

            stack.enter_context(memory.register_forward_hook(hook))
        yield


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Within, the model is in evaluation mode: in training, experts count how often they are chosen."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@torch.no_grad()
def capture_gates(model: LanguageModel, lookup: Lookup, tokens: Tensor) -> Tensor:
    """How far each memory layer's gates open over a text: tokens [T] -> [T, L, M] float32."""
    seen: dict[int, Tensor] = {}

    def note(number: int, module: Engram, hidden: Tensor, rows: Tensor, delta: Tensor) -> None:
        seen[number] = module.gates(hidden, rows)[0].float().cpu()

    with watching(model, note):
        rows, _ = lookup.rows(tokens[None])
        model(tokens[None], rows)
    return torch.stack([seen[number] for number in sorted(seen)], dim=1)
