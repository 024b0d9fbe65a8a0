"""LongPPL (Fang et al., ICLR 2025, arXiv 2410.23771): perplexity on the tokens that a long context helps with.

An evaluator reads each text twice: whole, and in short windows. Its key tokens are those that it finds likely, and finds much
likelier with the whole text in front of them:

    loss_short - loss_full > alpha    and    loss_full < max_loss
    LongPPL = exp(mean loss of the evaluated model, which reads the whole text, on the key tokens)

Windows begin every `slide` tokens and are `trunc_len + slide` long, and their last `slide` tokens are compared: the short context
is trunc_len to trunc_len + slide - 1 tokens, as in the authors' code. No token before the first trunc_len can be a key token. A model
that was never trained on contexts longer than trunc_len has few or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError, MismatchError
from ..train.run import TrainedModel
from ..train.tokenizer import encode_texts, separator_id, tokenizer_digest

CHUNK = 1024  # positions whose logits are held at a time


def longppl(
    evaluated: TrainedModel,
    evaluator: TrainedModel,
    texts: Sequence[str],
    *,
    trunc_len: int = 4096,
    slide: int = 1024,
    alpha: float = 2.0,
    max_loss: float = 2.0,
    max_tokens: int | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """LongPPL of a model on texts, each a document of its own, by the key tokens of an evaluator of the same vocabulary.

    max_tokens: read so many of each text. progress: called after each text. Returns plain values: longppl (None without key tokens),
    ppl (on every token), n_key, n_candidates (tokens with a short context to compare), n_tokens, texts, and the settings.

    Raises MismatchError for models of different tokenizers or vocabularies, DataError for a text of at most trunc_len tokens and for
    no texts, ConfigError for impossible settings.
    """
    check_same_vocabulary(evaluated, evaluator)
    if trunc_len < 1 or slide < 1:
        raise ConfigError(f"longppl: trunc_len {trunc_len} and slide {slide} must be at least 1.")
    documents = documents_of(evaluated, texts, trunc_len, max_tokens)
    nats, key_nats, tokens, keys, candidates = 0.0, 0.0, 0, 0, 0
    for document in documents:
        losses = losses_of(evaluated, document[None])[0]
        full = losses if evaluator is evaluated else losses_of(evaluator, document[None])[0]
        key = key_tokens(full[trunc_len - 1 :], short_losses(evaluator, document, trunc_len, slide), alpha, max_loss)
        nats, tokens = nats + float(losses.sum()), tokens + len(losses)
        key_nats, keys = key_nats + float(losses[trunc_len - 1 :][key].sum()), keys + int(key.sum())
        candidates += len(key)
        if progress:
            progress()
    return {
        "longppl": math.exp(key_nats / keys) if keys else None,
        "ppl": math.exp(nats / tokens),
        "n_key": keys,
        "n_candidates": candidates,
        "n_tokens": tokens,
        "texts": len(documents),
        "settings": {
            "trunc_len": trunc_len,
            "slide": slide,
            "alpha": alpha,
            "max_loss": max_loss,
            "max_tokens": max_tokens,
        },
    }


def key_tokens(full: Tensor, short: Tensor, alpha: float, max_loss: float) -> Tensor:
    """Which tokens are key tokens, bool, by the evaluator's losses with the full and the short context (same shape, nats)."""
    return (short - full > alpha) & (full < max_loss)


@torch.no_grad()
def losses_of(reader: TrainedModel, tokens: Tensor, first: int = 1) -> Tensor:
    """Losses [B, T - first] in nats (float64) of tokens[:, first:], each by those in front of it; tokens [B, T]."""
    model, lookup = reader.model.eval(), reader.lookup
    tokens = tokens.to(reader.device)
    rows = lookup.rows(tokens[:, :-1])[0] if lookup else None
    hidden = model(tokens[:, :-1], rows)[0][:, first - 1 :].flatten(0, 1)
    targets = tokens[:, first:].flatten()
    losses = [
        F.cross_entropy(model.logits(some).float(), wanted, reduction="none")
        for some, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(losses).double().view(len(tokens), -1).cpu()


def short_losses(reader: TrainedModel, document: Tensor, trunc_len: int, slide: int) -> Tensor:
    """Losses [T - trunc_len] of document[trunc_len:], each by the trunc_len to trunc_len + slide - 1 tokens in front of it."""
    return torch.cat([losses_of(reader, window[None], trunc_len)[0] for window in windows(document, trunc_len, slide)])


def windows(document: Tensor, trunc_len: int, slide: int) -> Iterator[Tensor]:
    """Windows of trunc_len + slide tokens, one every `slide`; the last ends with the document."""
    for start in range(0, len(document) - trunc_len, slide):
        yield document[start : start + trunc_len + slide]


def documents_of(reader: TrainedModel, texts: Sequence[str], trunc_len: int, max_tokens: int | None) -> list[Tensor]:
    """Token ids [T] of each text, behind the separator. Raises DataError where none of them could be a key token."""
    if not texts:
        raise DataError("longppl was given no texts.")
    separator = separator_id(reader.tokenizer)
    documents = [torch.tensor([separator, *ids.tolist()])[:max_tokens] for ids in encode_texts(reader.tokenizer, texts)]
    for number, document in enumerate(documents):
        if len(document) <= trunc_len:
            raise DataError(
                f"longppl: text {number} has {len(document)} tokens, and the short context alone has {trunc_len}: no token "
                "could be a key token. Leave it out, or shorten trunc_len."
            )
    return documents


def check_same_vocabulary(evaluated: TrainedModel, evaluator: TrainedModel) -> None:
    """Raises MismatchError unless both models mean the same by a token."""
    sizes = evaluated.model.config.vocab_size, evaluator.model.config.vocab_size
    digests = tokenizer_digest(evaluated.tokenizer), tokenizer_digest(evaluator.tokenizer)
    if sizes[0] != sizes[1] or digests[0] != digests[1]:
        raise MismatchError(
            f"longppl: the evaluated model has tokenizer {digests[0]} ({sizes[0]:,} tokens), the evaluator {digests[1]} "
            f"({sizes[1]:,}): the evaluator's key tokens would be other words for the evaluated model."
        )
