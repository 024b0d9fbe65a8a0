"""What memories remember of a text while it is decoded: a value that lives on the cache of `transformers`.

A cache that is reordered (beams), cropped (rejected drafts), repeated, selected, reset or copied takes it along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import MismatchError
from ..memory import ConvState


@dataclass(frozen=True)
class Past:
    """S positions of B sequences, and the memories that were on while they were read; no gradient flows back into it."""

    tokens: Tensor  # [B, S] int64, or text.UNSEEN
    memories: tuple[str, ...]
    convolutions: dict[tuple[str, int], ConvState]  # by memory and layer, where it has a convolution

    @property
    def length(self) -> int:
        """S."""
        return self.tokens.shape[1]

    def each(self, change: Callable[[Tensor], Tensor]) -> Past:
        """The same with every tensor [B, S, ...] changed."""
        convolutions = {key: ConvState(*map(change, state)) for key, state in self.convolutions.items()}
        return Past(change(self.tokens), self.memories, convolutions)

    def followed_by(self, later: Past) -> Past:
        """The positions of both."""
        joined = {key: zip(state, later.convolutions[key], strict=True) for key, state in self.convolutions.items()}
        convolutions = {key: ConvState(*(torch.cat(parts, dim=1) for parts in pairs)) for key, pairs in joined.items()}
        return Past(torch.cat([self.tokens, later.tokens], dim=1), later.memories, convolutions)

    def select(self, indices: Tensor) -> Past:
        """Chosen sequences, in their order."""
        return self.each(lambda part: part.index_select(0, indices.to(part.device)))


class CacheWithPast:
    """Mixed into a cache's class by `remember`: whatever happens to its keys and values happens to the past."""

    past: Past | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies are made from the class that transformers knows."""
        return _empty, (type(self).__bases__[1],), self.__dict__

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.past = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences `beam_idx` [B] go on."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change(lambda past: past.select(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences `indices` go on."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change(lambda past: past.select(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence goes on `repeats` times."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change(lambda past: past.each(lambda part: part.repeat_interleave(repeats, 0)))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` positions."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        kept = (self.past.length if self.past else 0) - abs(tokens_to_remove)
        self._change(lambda past: past.each(lambda part: part[:, : max(0, kept)]))

    def _change(self, change: Callable[[Past], Past]) -> None:
        if self.past is not None:
            self.past = change(self.past)


@functools.cache
def _with_past(kind: type) -> type:
    return type(kind.__name__, (CacheWithPast, kind), {"__module__": kind.__module__})


def _empty(kind: type) -> Any:
    return object.__new__(_with_past(kind))


def remember(cache: Cache, past: Past) -> None:
    """Let a cache carry the past of the positions that it holds."""
    if not isinstance(cache, CacheWithPast):
        cache.__class__ = _with_past(type(cache))  # type: ignore[arg-type]
    cache.past = past  # type: ignore[attr-defined]


def past_of(cache: Cache | None, batch: int, memories: tuple[str, ...]) -> Past | None:
    """The past of a cache's positions; None for an empty one.

    Raises MismatchError when positions were read without any record, while other memories were on than now, or in another
    batch.
    """
    length = int(cache.get_seq_length()) if cache is not None else 0
    if length == 0:
        return None
    past: Past | None = getattr(cache, "past", None)
    if past is None or past.length != length:
        known = past.length if past else 0
        raise MismatchError(
            f"the cache holds {length} positions, but the memory followed {known} of them: n-grams would miss their first "
            "tokens. (It follows no prefix of peft, no packed documents, and training only with use_cache=True.) Read the "
            "text again without this cache."
        )
    if past.memories != memories:
        raise MismatchError(
            f"the cache was filled with the memories {_names(past.memories)} on, now {_names(memories)} are: the text "
            "would be read half with and half without. Read it again without this cache."
        )
    if len(past.tokens) != batch:
        raise MismatchError(
            f"the cache holds {len(past.tokens)} sequences and {batch} are to go on: repeat or select those of the cache."
        )
    return past


def cache_in(output: Any) -> Cache | None:
    """The cache that a decoder returned, if any."""
    found = getattr(output, "past_key_values", None)
    if found is None and isinstance(output, tuple):
        found = next((part for part in output if isinstance(part, Cache)), None)
    return found if isinstance(found, Cache) else None


def _names(memories: tuple[str, ...]) -> str:
    return ", ".join(memories) if memories else "none"
