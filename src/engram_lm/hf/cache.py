"""What our models remember of a text, as a cache of `transformers`: beams, rejected drafts and later turns included."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..model.lm import ModelState


class EngramCache(Cache):
    """S positions of B sequences: their tokens, from which the next n-grams are hashed, and the model's state after them.

    It grows with the text and keeps every position, so that it can be cropped to any of them.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.tokens: Tensor | None = None  # [B, S] int64
        self.state: ModelState | None = None

    def append(self, tokens: Tensor, state: ModelState) -> None:
        """Remember that tokens [B, T] were read and led to `state`."""
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """S."""
        return self.state.position if self.state else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None, which `transformers` writes as -1."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Positions after `query_length` more, and the first of them."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """B, or -1 as long as the cache is empty."""
        return -1 if self.tokens is None else len(self.tokens)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    def __len__(self) -> int:
        return len(self.state.layers) if self.state else 0

    def __repr__(self) -> str:
        return f"EngramCache({self.get_seq_length()} positions)"

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        """Refused: keys and values alone are not all that a memory has to remember."""
        raise TypeError("an EngramCache is filled by EngramLMForCausalLM; the layers of other models cannot use it.")

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` positions. Raises ValueError for more than there are."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of positions to take back as a negative one.")
        if tokens_to_remove < 0:
            kept = self.get_seq_length() + tokens_to_remove
            state = self.state.crop(kept) if self.state else None
            if state is None or self.tokens is None:
                raise ValueError(f"crop({tokens_to_remove}): the cache is empty.")
            self.tokens, self.state = self.tokens[:, :kept], state

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with the sequences `indices`, in their order, repeats allowed."""
        if self.tokens is not None and self.state is not None:
            indices = torch.as_tensor(indices, device=self.tokens.device)
            self.tokens, self.state = self.tokens[indices], self.state.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the beams `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with each sequence `repeats` times."""
        self.batch_select_indices(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))
