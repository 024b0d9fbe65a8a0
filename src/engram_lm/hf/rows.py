"""Rows that train through ordinary autograd: a leaf a forward, one row-wise update a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.lookup import Leaf, Lookup
from ..tables import deduplicate


class TrainedRows:
    """The rows of one table while training loops that know nothing of tables run over it.

    Every forward reads its distinct rows once, as a leaf. A leaf is remembered when autograd has given it a gradient,
    so a forward without a backward costs nothing later; `step` then updates the rows where they live.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self.leaves: dict[int, Leaf] = {}

    def expand(self, tokens: Tensor, *, segments: Tensor | None = None, dead: Tensor | None = None) -> Tensor:
        """Rows [B, T, L, K, d] of tokens [B, T]; gradients of them reach the table at the next `step`."""
        return self.read(self.lookup.ids(tokens, segments=segments, dead=dead)[0])

    def read(self, ids: Tensor) -> Tensor:
        """Rows [B, T, L, K, d] of ids [B, T, L, K]; gradients of them reach the table at the next `step`."""
        unique, inverse = deduplicate(ids)
        rows = self.lookup.table.fetch(unique)
        leaf = Leaf(unique, inverse.to(rows.device), rows.requires_grad_())
        rows.register_post_accumulate_grad_hook(lambda _: self.leaves.update({id(leaf): leaf}))
        return leaf.expand(0, len(ids))

    def step(self, lr: float) -> None:
        """One row-wise update by the gradients of all forwards since the last one."""
        gradients = [(leaf.unique, leaf.rows.grad) for leaf in self.leaves.values() if leaf.rows.grad is not None]
        self.zero_grad()
        if not gradients:
            return
        ids, grads = gradients[0]
        if len(gradients) > 1:
            ids, inverse = deduplicate(torch.cat([ids for ids, _ in gradients]))
            parts = torch.cat([grad for _, grad in gradients])
            grads = parts.new_zeros(len(ids), parts.shape[1]).index_add_(0, inverse.to(parts.device), parts)
        self.lookup.table.update(ids, grads, lr)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.leaves = {}
