"""Address and fetch for one model: tokens in, rows out. The model itself knows neither vocabulary nor table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..hashing import HashConfig, HashPlan, hash_ngrams
from ..tables import Table, deduplicate
from ..tokens import CanonicalVocabulary


@dataclass(frozen=True)
class Leaf:
    """The distinct rows of one training step, gathered once; autograd leaves their gradient on `rows.grad`."""

    unique: Tensor  # [U] int64
    inverse: Tensor  # [B, T, L, K] int64: where each read is among the distinct rows
    rows: Tensor  # [U, d] float32, requires grad

    def expand(self, first: int, last: int) -> Tensor:
        """Rows [last - first, T, L, K, d] of some sequences of the batch; gradients sum up on the leaf."""
        return F.embedding(self.inverse[first:last], self.rows)


@dataclass(frozen=True)
class Lookup:
    """A canonical vocabulary, a hash plan and a table that belong together."""

    vocabulary: CanonicalVocabulary
    plan: HashPlan
    table: Table

    def __post_init__(self) -> None:
        self.table.require(self.plan.num_rows)

    def ids(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        dead: Tensor | None = None,
        history: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Row numbers [B, T, L, K] of token ids [B, T], and the history after them; see `hash_ngrams`."""
        canonical = self.vocabulary(tokens if dead is None else tokens.masked_fill(dead, 0))
        return hash_ngrams(self.plan, canonical, segments=segments, dead=dead, history=history)

    def rows(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        dead: Tensor | None = None,
        history: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rows [B, T, L, K, d] without gradient, and the history after them."""
        ids, history = self.ids(tokens, segments=segments, dead=dead, history=history)
        return self.table.fetch(ids), history

    def leaf(self, tokens: Tensor, segments: Tensor | None = None) -> Leaf:
        """The distinct rows of a training batch [B, T] as a leaf."""
        unique, inverse = deduplicate(self.ids(tokens, segments=segments)[0])
        return Leaf(unique, inverse, self.table.fetch(unique).requires_grad_())

    @property
    def digest(self) -> str:
        """Sixteen hex digits of vocabulary and plan: what a checkpoint keeps, since either decides every address."""
        return address_digest(self.vocabulary, self.plan)


def address_digest(vocabulary: CanonicalVocabulary, plan: HashPlan) -> str:
    """See Lookup.digest."""
    return hashlib.sha256(f"{vocabulary.digest} {plan.digest}".encode()).hexdigest()[:16]


def build_plan(config: HashConfig, vocabulary: CanonicalVocabulary) -> HashPlan:
    """The plan of a configuration whose pad is a token id of the vocabulary's tokenizer."""
    known = 0 <= config.pad_id < len(vocabulary.lookup)  # build refuses others
    pad = int(vocabulary.lookup[config.pad_id]) if known else config.pad_id
    return HashPlan.build(config, vocab_size=vocabulary.size, pad=pad)


def build_vocabulary(config: HashConfig, tokenizer: object) -> CanonicalVocabulary:
    """The scheme's vocabulary: raw token ids for `ple`, canonical ids otherwise."""
    if config.scheme == "ple":
        return CanonicalVocabulary.identity(tokenizer.get_vocab_size())  # type: ignore[attr-defined]
    return CanonicalVocabulary.from_tokenizer(tokenizer)
