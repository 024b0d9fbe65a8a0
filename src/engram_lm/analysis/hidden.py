"""Hidden states of every layer, by hooks: what the lens reads and CKA compares.

Layer 0 is what enters block 0: the normalised embedding, before any memory. Layer i is what leaves block i - 1, so a model of
N blocks has the layers 0 .. N, and N is what the final norm sees.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from .capture import evaluating


@torch.no_grad()
def hidden_states(
    model: LanguageModel, lookup: Lookup | None, tokens: Tensor, segments: Tensor | None = None
) -> list[Tensor]:
    """tokens [B, T], their document numbers [B, T] -> [layers + 1] times [B, T, D]: the mean of the residual streams.

    `model.norm` of the last is what the model returns.
    """
    seen: list[Tensor] = []

    def enters(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].mean(2))

    def leaves(block: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        seen.append(output[0].mean(2))

    device = model.embedding.weight.device
    tokens, segments = tokens.to(device), None if segments is None else segments.to(device)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(model.blocks[0].register_forward_pre_hook(enters))
        for block in model.blocks:
            stack.enter_context(block.register_forward_hook(leaves))
        model(tokens, lookup.rows(tokens, segments=segments)[0] if lookup else None, segments=segments)
    return seen
