"""Address and fetch for one model: tokens in, rows out. The model itself knows neither vocabulary nor table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..hashing import HashConfig, HashPlan, hash_ngrams
from ..tables import Fetch, Table, deduplicate, expand
from ..tables.base import Later
from ..tables.streams import Handed
from ..tokens import CanonicalVocabulary


@dataclass(frozen=True)
class Leaf:
    """The distinct rows of one training step, gathered once; autograd leaves their gradient on `rows.grad`."""

    unique: Tensor  # [U] int64
    inverse: Tensor  # [B, T, L, K] int64: where each read is among the distinct rows
    rows: Tensor  # [U, d] float32, requires grad

    def expand(self, first: int, last: int) -> Tensor:
        """Rows [last - first, T, L, K, d] of some sequences of the batch; gradients sum up on the leaf.

        Under autocast they are rounded as the projection that takes them would round them.
        """
        kind = self.rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.rows.dtype
        return expand(self.rows, self.inverse[first:last], dtype)


@dataclass(frozen=True)
class Upcoming:
    """A batch's distinct rows on their way, perhaps prepared on another stream than the one that computes."""

    ids: Handed[tuple[Tensor, ...]]  # unique and inverse, as in Leaf
    fetch: Fetch

    @cached_property
    def leaf(self) -> Leaf:
        """Wait for them."""
        unique, inverse = self.ids.take()
        rows = self.fetch.rows()
        return Leaf(unique, inverse.to(rows.device), rows.requires_grad_())

    def part(self, first: int, last: int) -> Fetch:
        """`leaf.expand`, once the model wants them: the blocks before its first memory need not wait."""
        return Later(lambda: self.leaf.expand(first, last))

    def collect(self) -> tuple[Tensor, Tensor]:
        """Distinct rows whose gradients this process applies, and the gradients [U, d], after a backward."""
        rows = self.leaf.rows
        return self.fetch.collect(self.leaf.unique, torch.zeros_like(rows) if rows.grad is None else rows.grad)


@dataclass(frozen=True)
class Lookup:
    """A canonical vocabulary, a hash plan and a table that belong together.

    shuffled: the control in which each text reads the rows of the one before it in the batch, and a lone one those of an
    empty text.
    """

    vocabulary: CanonicalVocabulary
    plan: HashPlan
    table: Table
    shuffled: bool = False

    def __post_init__(self) -> None:
        self.table.bind(self.digest, self.plan.num_rows)

    def ids(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        dead: Tensor | None = None,
        history: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Row numbers [B, T, L, K] of token ids [B, T], and the history after them; see `hash_ngrams`.

        Both are where the table wants ids.
        """
        there = self.table.address_device
        canonical = self.vocabulary((tokens if dead is None else tokens.masked_fill(dead, 0)).to(there))
        segments = None if segments is None else segments.to(there)
        if self.shuffled and len(canonical) > 1:
            canonical, segments = canonical.roll(1, 0), None if segments is None else segments.roll(1, 0)
        elif self.shuffled:
            canonical = torch.full_like(canonical, self.plan.pad)
        return hash_ngrams(
            self.plan, canonical, segments=segments, dead=None if dead is None else dead.to(there), history=history
        )

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

    def prefetch(self, tokens: Tensor, *, history: Tensor | None = None) -> tuple[Fetch, Tensor]:
        """The same rows on their way, and the history: the model takes them when its first memory layer is reached."""
        ids, history = self.ids(tokens, history=history)
        return self.table.prefetch(ids), history

    def upcoming(self, ids: Tensor) -> Upcoming:
        """Start fetching the distinct rows of a training batch's ids [B, T, L, K]."""
        unique, inverse = deduplicate(ids)
        return Upcoming(Handed((unique, inverse)), self.table.prefetch(unique))

    def leaf(self, tokens: Tensor, segments: Tensor | None = None) -> Leaf:
        """The distinct rows of a training batch [B, T] as a leaf."""
        return self.upcoming(self.ids(tokens, segments=segments)[0]).leaf

    @cached_property
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
