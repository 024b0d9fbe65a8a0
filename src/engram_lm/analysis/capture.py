"""Watch a model without changing it: forward hooks on its memory layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..memory import Engram
from ..model.lm import LanguageModel
from ..model.lookup import Lookup


@torch.no_grad()
def capture_gates(model: LanguageModel, lookup: Lookup, tokens: Tensor) -> Tensor:
    """How far each memory layer's gates open over a text: tokens [T] -> [T, L, M] float32."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        assert isinstance(module, Engram)
        seen.append(module.gates(inputs[0], inputs[1])[0].float().cpu())

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Engram)]
    try:
        rows, _ = lookup.rows(tokens[None])
        model(tokens[None], rows)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen, dim=1)
