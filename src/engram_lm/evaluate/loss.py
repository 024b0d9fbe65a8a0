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
from ..statistics import NORMAL_95
from ..tokens import piece_bytes
from ..train.loader import Batch
from ..train.loop import on
from ..train.ngrams import Positions
from ..train.ranks import Ranks


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


@dataclass(frozen=True)
class TokenLosses:
    """What one evaluation pass leaves: nats [N] float32 of the targets that count, in the order of `positions`."""

    positions: Positions
    nats: np.ndarray

    def by_document(self, token_bytes: Tensor) -> Losses:
        """Summed by document, in the order of their numbers. token_bytes: [V], see `bytes_of_tokens`."""
        counted = self.positions.counted
        _, document = np.unique(self.positions.documents[counted], return_inverse=True)
        sizes = token_bytes.numpy()[self.positions.targets[counted]]
        tokens, nats, sizes = (np.bincount(document, of) for of in (np.ones(len(document)), self.nats, sizes))
        return Losses(nats, tokens, sizes)


def measure(
    model: LanguageModel,
    lookup: Lookup | None,
    batches: Iterable[Batch],
    token_bytes: Tensor,
    ranks: Ranks | None = None,
) -> Losses:
    """Losses of a model on evaluation batches (`windows` of a split). token_bytes: [V], see `bytes_of_tokens`.

    ranks: all that measure the same batches together; each computes some of them, and all get the losses of all.
    """
    return measure_tokens(model, lookup, batches, ranks).by_document(token_bytes)


@torch.no_grad()
def measure_tokens(
    model: LanguageModel, lookup: Lookup | None, batches: Iterable[Batch], ranks: Ranks | None = None
) -> TokenLosses:
    """The same, target by target: about 50 bytes of main memory a token."""
    device, batches, ranks = model.embedding.weight.device, list(batches), ranks or Ranks()
    found: list[np.ndarray] = []
    for turn in range(0, len(batches), ranks.size):
        # a rank without a batch of its own in the last turn computes another's with the others, who may need its rows
        there = on(batches[min(turn + ranks.rank, len(batches) - 1)], device)
        rows = lookup.rows(there.tokens, segments=there.segments)[0] if lookup else None
        losses = model.loss(there.tokens, there.targets, rows, segments=there.segments, reduction="none")
        found.append(losses[there.targets >= 0].float().cpu().numpy())
    in_turn = [nats for turn in zip(*ranks.everyones(found), strict=True) for nats in turn][: len(batches)]
    return TokenLosses(Positions.of(batches), np.concatenate([np.zeros(0, np.float32), *in_turn]))


def bytes_of_tokens(tokenizer: Tokenizer) -> Tensor:
    """[V] float64: bytes of text that each token of a byte-level tokenizer stands for; 0 for special tokens."""
    return torch.tensor([len(piece) for piece in pieces_of_tokens(tokenizer)], dtype=torch.float64)


def pieces_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes themselves, V of them; none for special tokens."""
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    spelled = [tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size())]
    return [b"" if token in special else piece_bytes(piece) for token, piece in enumerate(spelled)]
