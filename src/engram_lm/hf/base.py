"""The pretrained model that a retrofit starts from, and its loss on packed documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import ConfigError, DataError
from ..train.loader import IGNORED, Batch
from ..train.loop import choose_device, on
from ..train.precision import Precision, autocast, resolve
from .config import RetrofitConfig
from .decoder import find_decoder, fingerprint


@dataclass(frozen=True)
class Base:
    """A pretrained model whose weights do not train, its tokenizer, and where and how it computes."""

    model: Any
    tokenizer: Any
    device: torch.device
    precision: Precision  # of products, where weights are held in more than that
    fingerprint: str

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer that makes shards: it neither cuts nor pads."""
        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] of packed documents, none of which sees another."""
        assert batch.segments is not None
        with self._products():
            return self.model(
                input_ids=batch.tokens, position_ids=positions(batch.segments), use_cache=False
            ).logits  # without a mask, transformers tells documents apart by positions that begin anew

    def losses(self, batch: Batch) -> Tensor:
        """[B, T] nats; 0 where there is no target."""
        logits, targets = self.logits(batch).float(), batch.targets
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view_as(targets)

    def _products(self) -> AbstractContextManager[object]:
        held = next(self.model.parameters()).dtype
        return autocast(self.precision, self.device) if held == torch.float32 else nullcontext()


def load_base(config: RetrofitConfig) -> Base:
    """Load the model and freeze it.

    Raises DataError when it cannot be loaded, ConfigError when it is no decoder-only model or a package is missing.
    """
    device = choose_device(config.device)
    file = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    trained = any(map(config.trains_base, config.arms))  # bfloat16 would swallow small updates
    kind = torch.float32 if trained else getattr(torch, resolve(config.precision, device))
    try:
        settings = AutoConfig.from_pretrained(config.model, **file)
        if getattr(settings, "is_encoder_decoder", False):
            raise ConfigError(f"{config.model} is an encoder-decoder: memories are for decoder-only models.")
        tokenizer = AutoTokenizer.from_pretrained(config.model, **file)
        model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=kind, **file)
    except ImportError as error:
        extra = "pip install 'engram-lm[gguf]'" if config.gguf_file else "install it"
        raise ConfigError(f"{config.model} needs a package that is missing ({_line(error)}): {extra}") from None
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{config.model}: no decoder-only model could be loaded ({_line(error)}). Give a directory with config.json, "
            "weights and tokenizer, or a name on the hub (which needs the network)."
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{config.model} has no fast tokenizer: its tokens could not be told from text.")
    model.requires_grad_(False).to(device).eval()
    find_decoder(model)
    return Base(model, tokenizer, device, config.precision, fingerprint(model))


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def positions(segments: Tensor) -> Tensor:
    """[B, T] int64 places inside each document, from the documents' numbers [B, T]."""
    place = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    return place - torch.where(begins, place, 0).cummax(1).values


@dataclass(frozen=True)
class DocumentLosses:
    """Nats and predicted tokens of each document that was measured [D]."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    def json(self) -> dict[str, Any]:
        """As plain values."""
        return {"loss": self.mean, "nats": self.nats.tolist(), "tokens": self.tokens.astype(int).tolist()}

    @staticmethod
    def of(values: dict[str, Any]) -> DocumentLosses:
        """From what `json` gave."""
        return DocumentLosses(np.array(values["nats"]), np.array(values["tokens"], dtype=np.float64))


@torch.no_grad()
def measure(
    base: Base, batches: Iterable[Batch], documents: int, tick: Callable[[float], None] = lambda _: None
) -> DocumentLosses:
    """Loss by document over evaluation windows; tick: told the loss so far after each batch."""
    base.model.eval()
    nats, tokens = np.zeros(documents + 2), np.zeros(documents + 2)  # documents count from 1; the last one fills up
    for batch in batches:
        batch = on(batch, base.device)
        losses, counted = base.losses(batch), batch.targets != IGNORED
        assert batch.segments is not None
        document = batch.segments[counted].cpu().numpy()
        nats += np.bincount(document, losses[counted].double().cpu().numpy(), documents + 2)
        tokens += np.bincount(document, minlength=documents + 2)
        tick(float(nats.sum() / max(1, tokens.sum())))
    seen = tokens > 0
    return DocumentLosses(nats[seen], tokens[seen])
