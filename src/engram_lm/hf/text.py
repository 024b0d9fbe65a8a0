"""What a call of a decoder gives memories to read: a text without its padding, and where documents begin in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MismatchError

UNSEEN = -1  # instead of a token: padding


class Order(NamedTuple):
    """A reading order that leaves no padding inside a text: first a past of S positions, then T new ones."""

    past: Tensor  # [B, S] int64: padding first
    new: Tensor  # [B, T]: padding last
    back: Tensor  # [B, T]: undoes `new`


@dataclass(frozen=True)
class Text:
    """T positions of B sequences. `keep` and `segments` are in reading order, which is the given one unless `order` says so."""

    tokens: Tensor  # [B, T] int64, or UNSEEN; as given
    keep: Tensor | None  # [B, T] bool: False at padding; None where there is none
    segments: Tensor | None  # [B, T] document numbers; None for one document
    order: Order | None = None

    def in_order(self, values: Tensor) -> Tensor:
        """Values [B, T, ...] of these positions, brought into reading order."""
        return values if self.order is None else _pick(values, self.order.new)

    def as_given(self, values: Tensor) -> Tensor:
        """Values [B, T, ...] in reading order, brought back."""
        return values if self.order is None else _pick(values, self.order.back)

    def past_in_order(self, values: Tensor, last: int) -> Tensor:
        """The `last` of the past's values [B, S, ...] in reading order."""
        first = max(0, values.shape[1] - last)
        return values[:, first:] if self.order is None else _pick(values, self.order.past[:, first:])

    def focus(self, mask: Tensor) -> Text:
        """The same text, of which only the positions in mask [B, T] bool, as given, are kept."""
        if mask.shape != self.tokens.shape:
            raise MismatchError(
                f"the positions to focus on are {list(mask.shape)}, but the tokens {list(self.tokens.shape)}: other words "
                "would have learned."
            )
        mask = self.in_order(mask)
        return replace(self, keep=mask if self.keep is None else self.keep & mask)

    @staticmethod
    def read(tokens: Tensor, mask: Any, positions: Any, past: Tensor | None) -> Text:
        """Tokens [B, T], an attention mask in any of transformers' forms, position_ids, and the tokens [B, S] before them.

        Raises MismatchError for a mask or positions that do not tell padding from text, or one document from the next, and
        for documents that begin inside a text which continues a cache.
        """
        start = 0 if past is None else past.shape[1]
        attends = _attends(mask, tokens, start)
        keep = attends if attends is None or attends.dim() == 2 else attends.diagonal(dim1=1, dim2=2)
        if keep is not None and bool(keep.all()):
            keep = None
        seen = tokens if keep is None else tokens.masked_fill(~keep, UNSEEN)
        text = Text(seen, None, None, _reading_order(past, seen))
        keep = None if keep is None else text.in_order(keep)
        segments = _segments(text, positions, attends, keep)
        if segments is not None and past is not None:
            raise MismatchError(
                "documents begin inside a text that continues a cache: it is not clear which of them the cache belongs to. "
                "Read each document by itself, or all of them without a cache."
            )
        return replace(text, keep=keep, segments=segments)


def _pick(values: Tensor, order: Tensor) -> Tensor:
    """Values [B, N, ...] at the positions [B, T] of each sequence."""
    order = order.to(values.device)
    return values[torch.arange(len(order), device=order.device)[:, None], order]


def _attends(mask: Any, tokens: Tensor, start: int) -> Tensor | None:
    """A mask's part for the new positions: [B, T] bool, where there is text, or [B, T, T], what sees what; None for all.

    mask: [B, S] as users give it; [B, 1, T, S] as `generate` prepares it for static caches, and as users pack documents; or a
    dictionary of those by kind of layer. Columns are all positions so far, or the last ones in a sliding window.
    """
    by_kind = isinstance(mask, dict)
    if by_kind:
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    batch, length = tokens.shape
    columns = mask.shape[-1] if isinstance(mask, Tensor) else 0
    first = start if columns >= start + length else columns - length
    if first >= 0 and mask.dim() == 2:
        return mask[:, first : first + length].bool().expand(batch, -1)
    if first >= 0 and mask.dim() == 4:
        square = mask[:, 0, :, first : first + length]
        square = (square >= 0 if square.is_floating_point() else square.bool()).expand(batch, -1, -1)
        return square.diagonal(dim1=1, dim2=2) if by_kind else square  # by kind: made by `generate`, for one document
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise MismatchError(
        f"an attention mask of the form {shape} does not tell padding from text for {length} tokens after {start}: n-grams "
        "would run through padding. Pass a mask [batch, all positions so far]."
    )


def _reading_order(past: Tensor | None, tokens: Tensor) -> Order | None:
    """None where no padding lies between two texts: padding on either side is in nobody's way."""
    before = tokens[:, :0] if past is None else past
    text = torch.cat([before, tokens], dim=1) != UNSEEN
    begun = text.cumsum(1) > 0
    if not bool((begun[:, :-1] & ~text[:, :-1] & text[:, 1:]).any()):
        return None
    old, new = text.split([before.shape[1], tokens.shape[1]], dim=1)
    forth = torch.argsort(~new, dim=1, stable=True)
    return Order(torch.argsort(old.byte(), dim=1, stable=True), forth, torch.argsort(forth, dim=1))


def _segments(text: Text, positions: Any, attends: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """[B, T] document numbers in reading order; None for one document.

    A document begins where positions do not go on by one, or where a mask [B, T, T] hides the token before.
    """
    if text.tokens.shape[1] == 1:
        return None
    begins = torch.zeros_like(text.tokens[:, 1:], dtype=torch.bool)
    if positions is not None:
        if positions.dim() != 2:
            raise MismatchError(
                f"position_ids of the shape {list(positions.shape)} do not tell documents apart: n-grams could run from "
                "one into the next. Pass [B, T]."
            )
        positions = text.in_order(positions.expand_as(text.tokens))
        begins = positions[:, 1:] != positions[:, :-1] + 1
    if attends is not None and attends.dim() == 3:
        square = text.in_order(text.in_order(attends).mT).mT
        begins = begins | ~square.diagonal(offset=-1, dim1=1, dim2=2)
    if keep is not None:
        begins = begins & keep[:, 1:] & keep[:, :-1]
    return torch.nn.functional.pad(begins, (1, 0)).cumsum(1) if bool(begins.any()) else None
