"""Context parallelism: the ranks of a group share each sequence, a contiguous chunk of it each.

Whatever looks only at its own position needs nothing else. Attention looks at the keys and values of all positions before, and
the memory's short convolution at a few: those come from the ranks before (model/neighbours.py). A rank sends to later ones
only, in all half of what an all-gather would, and in backward the gradients travel back the same way.

A rank's gradients of parameters are those of what it computed: summed over the group (not averaged) they are the whole
sequence's. Those of the rows that its chunk reads are complete.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ..model.lookup import Lookup
from .ranks import Ranks


@dataclass(frozen=True)
class ContextRanks(Ranks):
    """The ranks that share each sequence: the `neighbours` of a LanguageModel."""

    def with_past(self, x: Tensor, most: int | None = None) -> Tensor:
        """See Neighbours.with_past; a collective of the group, in forward and in backward."""
        length = x.shape[1]
        most = self.size * length if most is None else most
        # how many positions, its last ones, a rank gives to the one after it, to the second one after it, and so on
        given = [min(max(most - skipped * length, 0), length) for skipped in range(self.size - 1)]
        if self.group is None or not any(given):
            return x
        sent = [0] * (self.rank + 1) + given[: self.size - 1 - self.rank]
        received = given[: self.rank][::-1] + [0] * (self.size - self.rank)

        own = x.transpose(0, 1)
        # The first of them get all, and after them one may get a part. Gradients of copies made by `expand` are summed in
        # float32; slices would round each partial sum in bf16.
        copies, part = divmod(sum(sent), length)
        outgoing = torch.cat([own.expand(copies, *own.shape).flatten(0, 1), own[length - part :]])
        past = all_to_all_single_autograd(outgoing, received, sent, self.group)
        return torch.cat([past, own]).transpose(0, 1)


def chunk_ids(lookup: Lookup, tokens: Tensor, segments: Tensor | None, first: int, last: int) -> Tensor:
    """Row numbers [B, last - first, L, K] of the positions [first, last) of sequences tokens [B, T], segments [B, T] or None.

    What `lookup.ids` gives there, but only these positions are hashed, and those before them that their n-grams reach.
    """
    before = max(0, first - lookup.plan.history_length)
    seen = slice(before, last)
    ids, _ = lookup.ids(tokens[:, seen], segments=None if segments is None else segments[:, seen])
    return ids[:, first - before :]
