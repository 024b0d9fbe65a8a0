"""Facts as rows of tokens, told equally often.

A row is a sentence, ABSENT behind its end. A question is a row that ends with its answer: the model reads everything before,
and is asked for the answer's tokens alone. Behind the end nothing is learned or asked, and a causal model never looks there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..train.loader import IGNORED, Batch, LoaderState, permuted

ABSENT = -1


class FactSet(Protocol):
    """Facts, the sentences that tell them, and questions about them. `len` is the sentences that tell each fact once."""

    def __len__(self) -> int: ...

    @property
    def variants(self) -> int:
        """Ways in which a sentence may be put; one is drawn at every exposure."""

    @property
    def facts(self) -> int:
        """Facts told by all sentences together."""

    @property
    def value_bits(self) -> float:
        """Entropy of one answer for who knows all but the subject: the prior of "bits stored"."""

    def sentences(self, which: Tensor, variant: Tensor) -> Tensor:
        """Rows [n, S] of the sentences `which` [n], put in the ways `variant` [n]. S is the same for all of them."""

    def questions(self, limit: int) -> dict[str, Batch]:
        """By kind, questions about at most `limit` facts; the first kind asks as the facts were told."""

    def tokenizer(self) -> Tokenizer:
        """Whose tokens the rows are; it serves the canonical vocabulary and decodes answers."""


def packed(*pieces: Tensor) -> Tensor:
    """Pieces [n, *] side by side, ABSENT entries moved behind the end: rows [n, sum of widths]."""
    row = torch.cat(pieces, dim=1)
    order = (row == ABSENT).to(torch.int8).sort(dim=1, stable=True).indices
    return row.gather(1, order)


def told(rows: Tensor) -> Batch:
    """Rows to learn from: every token is a target but the first."""
    return Batch(rows[:, :-1].clamp_min(0), rows[:, 1:].masked_fill(rows[:, 1:] == ABSENT, IGNORED), None)


def asked(rows: Tensor, answer: Tensor | int = 1) -> Batch:
    """Rows as questions: only the last `answer` (one number, or [n]) tokens of each are targets."""
    batch = told(rows)
    length = (rows != ABSENT).sum(1, keepdim=True)
    first = length - torch.as_tensor(answer).view(-1, 1)
    places = torch.arange(1, rows.shape[1])
    return Batch(batch.tokens, batch.targets.masked_fill(places < first, IGNORED), None)


@dataclass(frozen=True)
class Exposures:
    """Batches in which every sentence comes once an epoch, in an order and variants of its own: one epoch, one exposure.

    A batch may end one epoch and begin the next, so any number of sentences is seen equally often.
    """

    facts: FactSet
    batch_size: int
    seed: int = 0

    def next(self, state: LoaderState) -> tuple[Batch, LoaderState]:
        """The batch at `state`, and the state after it."""
        n = len(self.facts)
        begin = state.epoch * n + state.index
        epochs, places = np.divmod(begin + np.arange(self.batch_size), n)
        which = np.empty_like(places)
        variant = np.empty_like(places)
        for epoch in range(state.epoch, epochs[-1] + 1):
            now = epochs == epoch
            which[now] = permuted(places[now], n, (self.seed, epoch))
            drawn = np.random.default_rng((self.seed, epoch)).integers(self.facts.variants, size=n)
            variant[now] = drawn[which[now]]
        rows = self.facts.sentences(torch.from_numpy(which), torch.from_numpy(variant))
        return told(rows), LoaderState(*divmod(begin + self.batch_size, n))
