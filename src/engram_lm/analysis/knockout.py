"""What is lost when a part of the memory is taken away after training (paper 4.5, which silences all of it).

A part is taken away by putting zeros in its place: rows where they were fetched, the projection for a whole layer, the taps
for the convolution. The rest of the model has been trained beside that part, so a loss that rises says that it relied on
it, not that it could not have done without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..statistics import ratio_interval
from ..train.loader import Batch
from ..train.loop import on
from .capture import evaluating, memories

ALL_ON = "all on"


@dataclass(frozen=True)
class KnockOut:
    """What is taken away: `rows` [L, K] bool that read as zeros, and parameters that are zero meanwhile."""

    rows: Tensor
    parameters: tuple[Tensor, ...] = ()


def knock_out(model: LanguageModel, lookup: Lookup, batches: Iterable[Batch]) -> dict[str, Any]:
    """Loss in nats a token with and without each part, on evaluation batches.

    {"tokens", "documents", "variants": {NAME: {"loss", "difference", "interval"}}}; "difference" is the loss above that of
    "all on", its 95 % "interval" [low, high] is over documents, None for a single one (and for "all on" itself).
    Raises MismatchError for a model without a memory, DataError for batches that predict nothing.
    """
    parts = knock_outs(model)
    nats, tokens = document_losses(model, lookup, batches, parts)
    if not tokens.sum():
        raise DataError("the batches hold no token to predict: there is no loss to compare.")
    variants: dict[str, Any] = {}
    for name, sums in zip(parts, nats, strict=True):
        above = sums - nats[0]
        interval = None if name == ALL_ON else ratio_interval(above, tokens)
        variants[name] = {
            "loss": float(sums.sum() / tokens.sum()),
            "difference": float(above.sum() / tokens.sum()),
            "interval": None if interval is None else list(interval),
        }
    return {"tokens": int(tokens.sum()), "documents": len(tokens), "variants": variants}


def knock_outs(model: LanguageModel) -> dict[str, KnockOut]:
    """The parts that can be taken away, by name; "all on" is the first. Those that would be another's twin are left out."""
    layers = memories(model)
    assert model.config.memory is not None
    config = model.config.memory.hash
    nothing = torch.zeros(len(layers), len(config.orders), config.heads, dtype=torch.bool)

    def rows(layer: int | slice, order: int) -> KnockOut:
        chosen = nothing.clone()
        chosen[layer, order] = True
        return KnockOut(chosen.flatten(1))

    def parameters(*found: Tensor | None) -> KnockOut:
        return KnockOut(nothing.flatten(1), tuple(parameter for parameter in found if parameter is not None))

    projections = [(layer.project.weight, layer.project.bias) for layer in layers]
    parts = {ALL_ON: parameters(), "no memory": parameters(*(one for each in projections for one in each))}
    if len(layers) > 1:
        for block, projection in zip(config.layers, projections, strict=True):
            parts[f"no memory in block {block}"] = parameters(*projection)
    if len(config.orders) > 1:
        for number, order in enumerate(config.orders):
            parts[f"no {order}-grams"] = rows(slice(None), number)
            if len(layers) > 1:
                for layer, block in enumerate(config.layers):
                    parts[f"no {order}-grams in block {block}"] = rows(layer, number)
    if model.config.memory.engram.conv_kernel:
        parts["no convolution"] = parameters(*(layer.conv_weight for layer in layers))
    return parts


@torch.no_grad()
def document_losses(
    model: LanguageModel, lookup: Lookup, batches: Iterable[Batch], parts: Mapping[str, KnockOut]
) -> tuple[np.ndarray, np.ndarray]:
    """Nats [parts, documents] without each part, and how many tokens [documents] they are of."""
    device = model.embedding.weight.device
    losses: list[np.ndarray] = []  # [parts, tokens] of each batch
    documents: list[np.ndarray] = []
    windows = 0
    with evaluating(model):
        for batch in (on(batch, device) for batch in batches):
            fetched, _ = lookup.rows(batch.tokens, segments=batch.segments)
            counted = batch.targets >= 0
            of_parts = []
            for part in parts.values():
                rows = fetched.masked_fill(part.rows[..., None].to(fetched.device), 0.0)
                with zeroed(part.parameters):
                    loss = model.loss(batch.tokens, batch.targets, rows, segments=batch.segments, reduction="none")
                of_parts.append(loss[counted].double().cpu().numpy())
            losses.append(np.stack(of_parts))
            # without segments each window is a document
            numbers = torch.arange(windows, windows + len(counted), device=device)[:, None].expand_as(counted)
            documents.append((numbers if batch.segments is None else batch.segments)[counted].cpu().numpy())
            windows += len(counted)
    if not losses:
        return np.zeros((len(parts), 0)), np.zeros(0)
    _, document = np.unique(np.concatenate(documents), return_inverse=True)
    return np.stack([np.bincount(document, part) for part in np.concatenate(losses, 1)]), np.bincount(document)


@contextmanager
def zeroed(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, these parameters are zero; afterwards, whatever happens, they are the same memory as before."""
    held = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, data in held:
            parameter.data = torch.zeros_like(data)
        torch.clear_autocast_cache()  # it would go on with copies of what they were
        yield
    finally:
        for parameter, data in held:
            parameter.data = data
        torch.clear_autocast_cache()
