"""How alike two models' layers are: unbiased minibatch CKA (arXiv 1905.00414, 2010.15327; paper, figure 4).

    CKA = mean HSIC1(K, L) / sqrt(mean HSIC1(K, K) * mean HSIC1(L, L)),    K = X X', L = Y Y' of a minibatch's samples

Means over minibatches are taken before dividing: HSIC1 is unbiased, a ratio is not. The biased HSIC is of no use here: with
32 samples in 64 dimensions it makes independent Gaussians 0.67 alike, HSIC1 0.00. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, MismatchError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..train.loader import Batch
from .hidden import hidden_states

LEAST = 4  # samples: HSIC1 divides by n - 3

Positions = Callable[[Batch], Tensor]


def hsic1(k: Tensor, l: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of Gram matrices k [A, n, n], l [B, n, n] -> [A, B] (Song et al. 2012).

    With K~, L~ the matrices without their diagonals and 1 a vector of ones,

        (tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~ L~1) / (n(n-3))

    Raises DataError for fewer than four samples.
    """
    n = k.shape[-1]
    if n < LEAST:
        raise DataError(
            f"HSIC needs at least {LEAST} samples, got {n}: the unbiased estimate divides by n(n-1)(n-2)(n-3) = 0, so it "
            "would have been infinite or not a number."
        )
    off = ~torch.eye(n, dtype=torch.bool, device=k.device)
    k, l = (gram.double() * off for gram in (k, l))
    trace = k.flatten(1) @ l.flatten(1).T  # they are symmetric
    k, l = k.sum(-1), l.sum(-1)  # [A, n], [B, n]
    sums = k.sum(-1)[:, None] * l.sum(-1)
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l.T)) / (n * (n - 3))


@dataclass(frozen=True)
class CKA:
    """HSIC1 of m minibatches: of each pair of layers, and of each layer with itself on either side."""

    cross: Tensor  # [m, A, B]
    first: Tensor  # [m, A]
    second: Tensor  # [m, B]

    @staticmethod
    def of(minibatches: Iterable[tuple[Tensor, Tensor]]) -> CKA:
        """From x [A, n, d], y [B, n, d'] of each minibatch, the same n samples in both.

        Raises DataError without a minibatch or for fewer than four samples, MismatchError when x and y do not pair up.
        """
        found = []
        for x, y in minibatches:
            if x.shape[1] != y.shape[1]:
                raise MismatchError(
                    f"{x.shape[1]} samples on one side and {y.shape[1]} on the other: others would be compared."
                )
            k, l = gram(x), gram(y)
            found.append((hsic1(k, l), hsic1(k, k).diagonal(), hsic1(l, l).diagonal()))
        if not found:
            raise DataError("CKA was given no minibatch: it would have been 0 / 0.")
        return CKA(*map(torch.stack, zip(*found, strict=True)))

    def matrix(self) -> Tensor:
        """CKA of each pair of layers [A, B]; NaN where a layer does not vary over the samples."""
        return _ratio(self.cross.mean(0), self.first.mean(0), self.second.mean(0))

    def without_each(self) -> Tensor:
        """The matrix without one minibatch, for each of them [m, A, B]: what a jackknife needs."""
        return _ratio(*(part.sum(0) - part for part in (self.cross, self.first, self.second)))


def cka(minibatches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """CKA of x [n, d] and y [n, d'], over minibatches; about 0 for independent ones (below as often as above), 1 for equal.

    Raises DataError without a minibatch, for fewer than four samples, or when x or y does not vary over the samples.
    """
    value = CKA.of((x[None], y[None]) for x, y in minibatches).matrix().item()
    if math.isnan(value):
        raise DataError("one side does not vary over the samples, or they are too few to tell: CKA would be 0 / 0.")
    return value


def gram(x: Tensor) -> Tensor:
    """x [A, n, d] -> X X' [A, n, n] float64 on the CPU. The mean is taken out first: it changes no HSIC, but takes up digits."""
    x = x.cpu().double()
    x = x - x.mean(1, keepdim=True)
    return x @ x.mT


def soft_alignment(similarity: Tensor, k: int) -> Tensor:
    """S [..., A, B] -> [..., A]: the centre of the k layers of B most like each layer of A, sum S_ji i / sum S_ji.

    Negative similarities and NaN count as 0; NaN where nothing is alike. Raises ConfigError unless 1 <= k <= B.
    """
    if not 1 <= k <= similarity.shape[-1]:
        raise ConfigError(f"k = {k}, but there are {similarity.shape[-1]} layers to align with: give 1 to that many.")
    weight, layer = similarity.nan_to_num(0.0).clamp(min=0).topk(k, dim=-1)
    return (weight * layer).sum(-1) / weight.sum(-1)


@torch.no_grad()
def compare_models(
    model_a: LanguageModel,
    lookup_a: Lookup | None,
    model_b: LanguageModel,
    lookup_b: Lookup | None,
    batches: Iterable[Batch],
    *,
    samples_per_batch: int = 128,
    positions: Positions | None = None,
    k: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """CKA of every layer of one model with every layer of another on the same tokens, and where the first's layers belong.

    samples_per_batch: positions drawn at random from each batch, and size n of a minibatch; where a batch has fewer, they wait
    for the next one's. Samples should be independent, so batches should hold many documents. positions: batch -> [B, T] bool,
    which may be drawn; default: those that predict something (the paper takes the last tokens of entities). k: layers that
    an alignment is the centre of; default: a sixth of the blocks of B, 1 to 5 (the paper: 5 of 30).

    {"cka": [A + 1][B + 1], "error": of these, "alignment": [A + 1] the layer of B that each of A is like, "alignment_error",
    "k", "samples": a minibatch, "minibatches"}. Layer 0 is the embedding, layer i what leaves block i - 1 (see hidden.py).
    Errors are standard errors (jackknife over minibatches); None where there is but one, or where a layer does not vary.

    Raises MismatchError for different vocabularies, ConfigError for k or fewer than four samples_per_batch, DataError for
    batches with too few positions.
    """
    sizes = model_a.config.vocab_size, model_b.config.vocab_size
    if sizes[0] != sizes[1]:
        raise MismatchError(
            f"the vocabularies have {sizes[0]:,} and {sizes[1]:,} tokens: the same id would mean another token, and the "
            "models would have read different texts. Compare models of one tokenizer."
        )
    if samples_per_batch < LEAST:
        raise ConfigError(
            f"samples_per_batch = {samples_per_batch}, but CKA needs at least {LEAST}: its HSIC would divide by 0."
        )
    if k is None:
        k = max(1, min(5, round(model_b.config.layers / 6)))
    models = ((model_a, lookup_a), (model_b, lookup_b))
    found = CKA.of(_minibatches(models, batches, samples_per_batch, positions or _counted, seed))
    matrix, others = found.matrix(), found.without_each()
    return {
        "cka": _plain(matrix),
        "error": _plain(jackknife(others)),
        "alignment": _plain(soft_alignment(matrix, k)),
        "alignment_error": _plain(jackknife(soft_alignment(others, k))),
        "k": k,
        "samples": samples_per_batch,
        "minibatches": len(others),
    }


def _minibatches(
    models: Sequence[tuple[LanguageModel, Lookup | None]],
    batches: Iterable[Batch],
    size: int,
    positions: Positions,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both models' hidden states [layers + 1, size, D] at positions drawn from the batches."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Tensor] = []  # [layers + 1, fewer than size, D] of each model
    drawn = 0
    for batch in batches:
        allowed = positions(batch)
        if allowed.shape != batch.tokens.shape:
            raise MismatchError(
                f"positions gave {list(allowed.shape)} for tokens {list(batch.tokens.shape)}: others would be drawn."
            )
        places = allowed.flatten().nonzero()[:, 0].cpu()
        places = places[torch.randperm(len(places), generator=generator)[:size]]
        new = [_states_at(model, lookup, batch, places) for model, lookup in models]
        waiting = [torch.cat(both, 1) for both in zip(waiting, new, strict=True)] if waiting else new
        drawn += len(places)
        if waiting[0].shape[1] >= size:
            yield waiting[0][:, :size], waiting[1][:, :size]
            waiting = [states[:, size:] for states in waiting]
    if drawn < size:
        raise DataError(
            f"the batches hold {drawn} positions to compare, fewer than the {size} of one minibatch: nothing would have been "
            "measured. Give more text, or a smaller samples_per_batch."
        )


def _states_at(model: LanguageModel, lookup: Lookup | None, batch: Batch, places: Tensor) -> Tensor:
    """Hidden states [layers + 1, n, D] at places [n] of the flattened batch, on the CPU."""
    states = hidden_states(model, lookup, batch.tokens, batch.segments)
    return torch.stack([h.flatten(0, 1)[places.to(h.device)].float().cpu() for h in states])


def _counted(batch: Batch) -> Tensor:
    return batch.targets >= 0


def _ratio(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[..., A, B], [..., A], [..., B] -> [..., A, B]; NaN where a layer's HSIC with itself is not above 0."""
    first, second = (own.where(own > 0, math.nan).sqrt() for own in (first, second))
    return cross / (first[..., :, None] * second[..., None, :])


def jackknife(estimates: Tensor) -> Tensor:
    """Standard error from the estimates without one minibatch each [m, ...] -> [...]; NaN for a single one."""
    return (len(estimates) - 1) ** 0.5 * estimates.std(0, correction=0)


def _plain(values: Tensor) -> Any:
    """Nested lists with None for NaN, which JSON does not know."""
    if values.ndim:
        return [_plain(value) for value in values]
    return None if values.isnan() else values.item()
