"""Validation loss with its uncertainty: how far it would move had other documents been held out.

Tokens of one document resemble each other, so documents are the unit of sampling: the interval is that of a ratio
estimator over documents (sum of losses / sum of tokens). It says nothing about other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import MismatchError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..tokens import piece_bytes
from ..train.loader import Batch
from ..train.loop import on

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Losses:
    """Loss by document: nats, tokens and bytes [documents] that were predicted."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text, comparable between tokenizers."""
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    @property
    def interval(self) -> float:
        """Half width of the mean's 95 % interval."""
        return half_width(self.nats, self.tokens)


def half_width(sums: np.ndarray, counts: np.ndarray) -> float:
    """95 % half width of sum(sums) / sum(counts) over documents; infinite for a single one."""
    documents = len(sums)
    if documents < 2:
        return math.inf
    residual = sums - counts * (sums.sum() / counts.sum())
    variance = documents / (documents - 1) * np.square(residual).sum()
    return float(NORMAL_95 * math.sqrt(variance) / counts.sum())


def difference(losses: Losses, base: Losses) -> tuple[float, float]:
    """Mean loss above `base` on the same documents, and the 95 % half width of that paired difference."""
    if not np.array_equal(losses.tokens, base.tokens):
        raise MismatchError("the two losses come from different documents; their difference would mean nothing.")
    return losses.mean - base.mean, half_width(losses.nats - base.nats, losses.tokens)


@torch.no_grad()
def measure(model: LanguageModel, lookup: Lookup | None, batches: Iterable[Batch], token_bytes: Tensor) -> Losses:
    """Losses of a model on evaluation batches (`windows` of a split). token_bytes: [V], see `bytes_of_tokens`."""
    device = model.embedding.weight.device
    nats, tokens, sizes = (np.zeros(0) for _ in range(3))
    for batch in (on(batch, device) for batch in batches):
        rows = lookup.rows(batch.tokens, segments=batch.segments)[0] if lookup else None
        losses = model.loss(batch.tokens, batch.targets, rows, segments=batch.segments, reduction="none")
        assert batch.segments is not None
        counted = batch.targets >= 0
        document = batch.segments[counted].cpu().numpy()
        size = int(document.max(initial=-1)) + 1
        nats = _add(nats, np.bincount(document, losses[counted].double().cpu().numpy(), size))
        tokens = _add(tokens, np.bincount(document, minlength=size))
        sizes = _add(sizes, np.bincount(document, token_bytes[batch.targets[counted].cpu()].numpy(), size))
    seen = tokens > 0
    return Losses(nats[seen], tokens[seen], sizes[seen])


def _add(total: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Sum of two arrays of different lengths."""
    longer, shorter = (total, more) if len(total) >= len(more) else (more, total)
    longer = longer.astype(np.float64)
    longer[: len(shorter)] += shorter
    return longer


def bytes_of_tokens(tokenizer: Tokenizer) -> Tensor:
    """[V] float64: bytes of text that each token of a byte-level tokenizer stands for; 0 for special tokens."""
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    pieces = [tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size())]
    sizes = [0 if token in special else len(piece_bytes(piece)) for token, piece in enumerate(pieces)]
    return torch.tensor(sizes, dtype=torch.float64)
