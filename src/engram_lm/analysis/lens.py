"""The logit lens: what the model would predict if it stopped after each layer (nostalgebraist 2020; paper 6.1.1, figure 4).

    q_l = softmax(head(norm(h_l)))          always with the final norm; the last layer's is the model's own prediction, p
    KL_l = sum_v p_v (log p_v - log q_lv)   nats, a mean over positions

The paper does not say which way its KL goes nor whether the norm is applied: KL(p || q_l) is the tuned lens' convention
(arXiv 2303.08112), the other direction is offered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..statistics import ratio_interval
from ..train.loader import Batch
from .hidden import hidden_states

Direction = Literal["final_to_layer", "layer_to_final"]
MEASURED = ("kl", "entropy", "agreement")
CHUNK = 2**22  # logits of one layer at a time: 16 MB


def logit_lens(
    model: LanguageModel,
    lookup: Lookup | None,
    batches: Iterable[Batch],
    *,
    direction: Direction = "final_to_layer",
    max_tokens: int = 16_384,
) -> dict[str, Any]:
    """How near each layer's prediction is to the final one, on the first `max_tokens` positions that predict something.

    {"direction", "tokens", "documents", "layers": [0 .. blocks], "kl": nats, "kl_interval": [[low, high]] (95 %, over
    documents; None for a single one), "entropy": of q_l, nats, "agreement": share of positions whose likeliest token is the
    final one}, a value for each layer. Layer 0 is the embedding, layer i what leaves block i - 1 (see hidden.py), so the
    last KL is 0.

    A layer's logits cost as much as the model's own: `windows(..., limit=...)` spreads few windows over a text.
    Raises ConfigError for another direction or no tokens at all, DataError for batches that predict nothing.
    """
    sums, tokens = document_sums(model, lookup, batches, direction=direction, max_tokens=max_tokens)
    means = dict(zip(MEASURED, (sums.sum(2) / tokens.sum()).tolist(), strict=True))
    intervals = [ratio_interval(layer, tokens) for layer in sums[MEASURED.index("kl")]]
    return {
        "direction": direction,
        "tokens": int(tokens.sum()),
        "documents": len(tokens),
        "layers": list(range(sums.shape[1])),
        **means,
        "kl_interval": [None if interval is None else list(interval) for interval in intervals],
    }


def document_sums(
    model: LanguageModel,
    lookup: Lookup | None,
    batches: Iterable[Batch],
    *,
    direction: Direction = "final_to_layer",
    max_tokens: int = 16_384,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums [3, layers + 1, documents] of KL, entropy and agreement, and how many tokens [documents] they are of.

    Two models' sums on the same batches may be subtracted: `ratio_interval` then gives the interval of the paired difference.
    """
    if direction not in get_args(Direction):
        raise ConfigError(f"direction is {direction!r}; a KL goes one of two ways: {', '.join(get_args(Direction))}.")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens} leaves the lens nothing to read.")
    measured: list[Tensor] = []  # [3, layers + 1, positions] of each batch
    documents: list[Tensor] = []  # [positions]
    windows, left = 0, max_tokens
    for batch in batches:
        where = (batch.targets >= 0).flatten().nonzero()[:left, 0].cpu()
        states = hidden_states(model, lookup, batch.tokens, batch.segments)
        measured.append(predictions(model, [h.flatten(0, 1)[where.to(h.device)] for h in states], direction))
        # without segments each window is a document
        numbers = torch.arange(windows, windows + len(batch.tokens))[:, None].expand_as(batch.tokens)
        documents.append((numbers if batch.segments is None else batch.segments.cpu()).flatten()[where])
        windows, left = windows + len(batch.tokens), left - len(where)
        if left == 0:
            break
    if left == max_tokens:
        raise DataError("the batches hold no token to predict: the lens would have read nothing.")
    _, document = np.unique(torch.cat(documents).numpy(), return_inverse=True)
    sums = [[np.bincount(document, layer) for layer in each] for each in torch.cat(measured, 2).double().numpy()]
    return np.array(sums), np.bincount(document)


@torch.no_grad()
def predictions(model: LanguageModel, states: list[Tensor], direction: Direction) -> Tensor:
    """[layers + 1] times hidden [n, D] -> KL, entropy and agreement [3, layers + 1, n] float32, on the CPU.

    Few positions at a time, so memory does not grow with the vocabulary.
    """
    weight = model.embedding.weight

    def log_probabilities(hidden: Tensor) -> Tensor:
        logits = model.logits(model.norm(hidden.to(weight.dtype)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    found = torch.empty(len(MEASURED), len(states), len(states[0]))
    size = max(1, CHUNK // model.config.vocab_size)
    with torch.autocast(weight.device.type, enabled=False):  # rounded logits would differ by more than late layers do
        for first in range(0, len(states[0]), size):
            part = slice(first, first + size)
            final = log_probabilities(states[-1][part])
            for layer, hidden in enumerate(states):
                here = log_probabilities(hidden[part])
                p, q = (final, here) if direction == "final_to_layer" else (here, final)
                found[0, layer, part] = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
                found[1, layer, part] = -(here.exp() * here).sum(-1)
                found[2, layer, part] = (here.argmax(-1) == final.argmax(-1)).float()
    return found
