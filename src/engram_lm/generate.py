"""Generation with explicit state: the same ids, rows and logits as one pass over the whole text, in any chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError, DataError
from .model.lm import LanguageModel, ModelState
from .model.lookup import Lookup


class DecodeState(NamedTuple):
    """Everything that the next tokens need to know of the past: a value; keep an old one to roll back."""

    model: ModelState | None
    history: Tensor | None  # the hash's, [B, N-1, 2]

    def select(self, indices: Tensor) -> DecodeState:
        """The state of chosen sequences of the batch, in their order (beams)."""
        return DecodeState(
            None if self.model is None else self.model.select(indices),
            None if self.history is None else self.history.index_select(0, indices),
        )


START = DecodeState(None, None)


@torch.no_grad()
def advance(
    model: LanguageModel, lookup: Lookup | None, tokens: Tensor, state: DecodeState = START
) -> tuple[Tensor, DecodeState]:
    """Read tokens [B, T] (a prompt, a chunk of it, or the one just sampled) and return the next one's logits [B, V].

    Their rows are known to be needed as soon as the tokens are, and arrive while the blocks before the first memory run.
    """
    rows, history = lookup.prefetch(tokens, history=state.history) if lookup else (None, None)
    hidden, model_state = model(tokens, rows, state=state.model, with_state=True)
    return model.logits(hidden[:, -1:])[:, 0].float(), DecodeState(model_state, history)


@torch.no_grad()
def generate(
    model: LanguageModel,
    lookup: Lookup | None,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    end_id: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue prompt [B, T] by up to `max_new_tokens`; returns prompt and continuation [B, T + n].

    temperature 0 takes the likeliest token, otherwise one is drawn (reproducibly by `seed`) from the `top_k` likeliest,
    or from all for 0. Stops when every sequence has produced `end_id`. `on_token` is handed each new token [B].

    Raises ConfigError for a negative temperature or top_k, DataError for a prompt without tokens or with unknown ones.
    """
    if temperature < 0 or top_k < 0:
        raise ConfigError(f"temperature {temperature} and top_k {top_k} must be at least 0.")
    if prompt.shape[1] == 0:
        raise DataError(
            "the prompt has no tokens: there is nothing to continue. Begin with <|endoftext|> to start freely."
        )
    if not 0 <= int(prompt.min()) <= int(prompt.max()) < model.config.vocab_size:
        raise DataError(
            f"the prompt's token ids run from {int(prompt.min())} to {int(prompt.max())}, but the model knows "
            f"{model.config.vocab_size}: it was made by another tokenizer."
        )
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    logits, state = advance(model, lookup, prompt)
    tokens = [prompt]
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for count in range(1, max_new_tokens + 1):
        chosen = sample(logits, temperature, top_k, generator)
        tokens.append(chosen[:, None])
        if on_token:
            on_token(chosen)
        ended |= chosen == end_id
        if count == max_new_tokens or bool(ended.all()):
            break
        logits, state = advance(model, lookup, chosen[:, None], state)
    return torch.cat(tokens, dim=1)


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token id [B] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
