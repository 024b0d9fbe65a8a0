"""How far gates open over a text, in figures: per layer and stream, by how often training showed an n-gram, per n-gram.

A gate that says nothing is stuck: near 0 (it collapsed, as over a uniform table), near 1, or where its score is 0. One that
selects has a wide middle, and opens further where the memory knows something.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..memory import Engram
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..train.loader import Batch
from ..train.loop import on
from .capture import evaluating, memories, watching
from .ngrams import Ngrams, views

BINS = 20
SEEN = (0, 1, 4, 32)  # occurrences in training: where each bucket begins
SEEN_NAMES = ("0", "1-3", "4-31", "32+")
CLOSED, OPEN = 0.05, 0.95
LEAST, SHOWN = 4, 12  # occurrences in the text that make an n-gram's mean worth showing, and how many are shown


@torch.no_grad()
def gate_statistics(
    model: LanguageModel,
    lookup: Lookup,
    batches: Iterable[Batch],
    pieces: Sequence[bytes] | None = None,
    training: Ngrams | None = None,
) -> dict[str, Any]:
    """Gates and outputs of every memory layer at the positions of evaluation batches that predict something.

    pieces: each token's bytes [V] (see `piece_bytes`), for the text of n-grams. training: n-grams of the training text.

    {"tokens", "layers": [{"layer",
        "streams": [{"mean", "quartiles": [q1, median, q3], "closed": share < 0.05, "open": share > 0.95,
                     "histogram": shares of 20 equal bins of 0..1}],
        "delta_rms", "hidden_rms": of what the memory adds and of what that is added to, "relative": their ratio,
        "by_seen": {"2": {"seen": ["0", "1-3", ..], "share": of tokens, "mean": gate over streams, None where empty}} per order,
        "highest", "lowest": [{"text", "mean", "times"}] n-grams of the smallest order, at least 4 times in the text}]}

    "by_seen" is there with `training`, "highest" and "lowest" with `pieces`. Raises MismatchError for a model without a
    memory, DataError for batches that predict nothing.
    """
    layers = memories(model)
    device = model.embedding.weight.device
    gates: list[list[Tensor]] = [[] for _ in layers]  # [tokens, M] of each layer and batch
    squares = torch.zeros(len(layers), 2, dtype=torch.float64)  # of delta and of hidden
    tokens: list[Tensor] = []  # [tokens, n] the n-gram's token ids, oldest first
    seen: list[np.ndarray] = []  # [tokens, N]
    counted = torch.empty(0)

    def note(number: int, module: Engram, hidden: Tensor, rows: Tensor, delta: Tensor) -> None:
        gates[number].append(module.gates(hidden, rows)[counted].float().cpu())
        for which, value in enumerate((delta, hidden)):
            squares[number, which] += value[counted].float().square().mean((1, 2)).double().sum().cpu()

    with evaluating(model), watching(model, note):
        for batch in (on(batch, device) for batch in batches):
            counted = batch.targets >= 0
            rows, _ = lookup.rows(batch.tokens, segments=batch.segments)
            model(batch.tokens, rows, segments=batch.segments)
            here = counted.cpu()
            tokens.append(_last(batch.tokens.cpu(), lookup.plan.orders[0])[here])
            seen.append(views(lookup, batch.tokens, batch.segments)[here.flatten().numpy()])
    if not sum(map(len, tokens)):
        raise DataError("the batches hold no token to predict: there are no gates to describe.")

    text = np.concatenate(seen)
    times = None if training is None else training.times(text)
    _, number = np.unique(text[:, : lookup.plan.orders[0]], axis=0, return_inverse=True)
    described = []
    for layer, found, (added, held) in zip(lookup.plan.layers, gates, squares.tolist(), strict=True):
        opened = torch.cat(found).numpy().astype(np.float64)
        facts: dict[str, Any] = {
            "layer": layer,
            "streams": [stream(column) for column in opened.T],
            "delta_rms": (added / len(text)) ** 0.5,
            "hidden_rms": (held / len(text)) ** 0.5,
            "relative": (added / held) ** 0.5,
        }
        mean = opened.mean(1)
        if times is not None:
            facts["by_seen"] = {str(order): by_seen(mean, times[:, order - 1]) for order in lookup.plan.orders}
        if pieces is not None:
            facts["highest"], facts["lowest"] = extremes(mean, number.ravel(), torch.cat(tokens).numpy(), pieces)
        described.append(facts)
    return {"tokens": len(text), "layers": described}


def _last(tokens: Tensor, order: int) -> Tensor:
    """The last `order` tokens at each position: [B, T] -> [B, T, order], -1 before the window."""
    padded = torch.nn.functional.pad(tokens, (order - 1, 0), value=-1)
    return padded.unfold(1, order, 1)


def stream(gates: np.ndarray) -> dict[str, Any]:
    """One stream's gates [tokens]."""
    return {
        "mean": float(gates.mean()),
        "quartiles": np.quantile(gates, (0.25, 0.5, 0.75)).tolist(),
        "closed": float((gates < CLOSED).mean()),
        "open": float((gates > OPEN).mean()),
        "histogram": (np.histogram(gates, BINS, (0.0, 1.0))[0] / len(gates)).tolist(),
    }


def by_seen(gates: np.ndarray, times: np.ndarray) -> dict[str, Any]:
    """Mean gate [tokens] in each bucket of how often training showed the token's n-gram."""
    bucket = np.searchsorted(SEEN, times, side="right") - 1
    counts = np.bincount(bucket, minlength=len(SEEN))
    sums = np.bincount(bucket, gates, len(SEEN))
    means = [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
    return {"seen": list(SEEN_NAMES), "share": (counts / len(gates)).tolist(), "mean": means}


def extremes(
    gates: np.ndarray, number: np.ndarray, tokens: np.ndarray, pieces: Sequence[bytes]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The frequent n-grams with the highest and the lowest mean gate, each spelt as where it first stands."""
    counts, (_, first) = np.bincount(number), np.unique(number, return_index=True)
    means = np.bincount(number, gates) / counts
    frequent = np.flatnonzero(counts >= LEAST)
    ranked = frequent[np.argsort(-means[frequent], kind="stable")]

    def show(ngram: int) -> dict[str, Any]:
        spelt = b"".join(pieces[token] for token in tokens[first[ngram]] if token >= 0)
        return {"text": spelt.decode("utf-8", "replace"), "mean": float(means[ngram]), "times": int(counts[ngram])}

    return [show(ngram) for ngram in ranked[:SHOWN]], [show(ngram) for ngram in ranked[: -SHOWN - 1 : -1]]
