"""Rows that train through ordinary autograd: a leaf a forward, one row-wise update a step."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..model.lookup import Leaf, Lookup
from ..tables import deduplicate
from ..tables.expand import add_up


class TrainedRows:
    """The rows of one table while training loops that know nothing of tables run over it.

    Every forward reads its distinct rows once, as a leaf. A leaf is remembered when autograd has given it a gradient,
    so a forward without a backward leaves nothing behind; `step` then updates the rows where they live.

    Attributes:
        lookup: how tokens find the rows.
        leaves: rows [U, d] of forwards since the last step, with gradients; always the same list, so that whoever holds it
            (a group of an optimizer) sees them come and go.
        kept: whether somebody sees to it that rows are saved when a model is.
        fresh: whether the table is as it was opened: no step was taken and nothing was restored.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self.leaves: list[Tensor] = []
        self._ids: list[Tensor] = []  # [U] of each leaf
        self.kept, self.fresh = False, True

    def expand(self, tokens: Tensor, *, segments: Tensor | None = None, dead: Tensor | None = None) -> Tensor:
        """Rows [B, T, L, K, d] of tokens [B, T]; gradients of them reach the table at the next `step`."""
        return self.read(self.lookup.ids(tokens, segments=segments, dead=dead)[0])

    def read(self, ids: Tensor) -> Tensor:
        """Rows [B, T, L, K, d] of ids [B, T, L, K]; gradients of them reach the table at the next `step`."""
        unique, inverse = deduplicate(ids)
        rows = self.lookup.table.fetch(unique).requires_grad_()
        rows.register_post_accumulate_grad_hook(partial(self._remember, unique))  # holds no rows: they may be forgotten
        return Leaf(unique, inverse.to(rows.device), rows).expand(0, len(ids))

    def merge(self) -> None:
        """Sum the gradients of all forwards since the last step on one leaf, as one large batch would have done."""
        if len(self.leaves) < 2:
            return
        unique, inverse = deduplicate(torch.cat(self._ids))
        parts = torch.cat([leaf.grad for leaf in self.leaves if leaf.grad is not None])
        total = add_up(parts, inverse.to(parts.device), len(unique))
        self.zero_grad()
        leaf = torch.empty_like(total, requires_grad=True)
        leaf.grad = total
        self._remember(unique, leaf)

    def step(self, lr: float) -> None:
        """One row-wise update by the gradients of all forwards since the last one, which are then forgotten."""
        if self.leaves and lr > 0:
            table, grads = self.lookup.table, [leaf.grad for leaf in self.leaves if leaf.grad is not None]
            if len(grads) == 1:  # its ids are distinct
                table.update(self._ids[0], grads[0], lr)
            else:
                table.update_reads(torch.cat(self._ids), torch.cat(grads), lr)
            self.fresh = False
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for leaf in self.leaves:
            leaf.grad = None  # of a graph that is kept: its next backward begins anew
        self.leaves.clear()
        self._ids.clear()

    def _remember(self, unique: Tensor, leaf: Tensor) -> None:
        if not any(leaf is known for known in self.leaves):
            self.leaves.append(leaf)
            self._ids.append(unique)
