"""Finding one's way in a decoder-only model of `transformers`: its stack of layers, its text, its identity."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class Decoder(NamedTuple):
    """The part of a model that turns tokens into hidden states."""

    stack: nn.Module  # is called with input_ids, attention_mask, position_ids, past_key_values
    layers: nn.ModuleList
    dim: int  # of the residual stream


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a `transformers` model, wrapped by peft or not. Raises ConfigError when there is none."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config: Any = getattr(base, "config", None)
    if config is None:
        raise ConfigError(f"{type(model).__name__} is no model of transformers: it has no config.")
    config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(base).__name__} is an encoder-decoder: memories are for decoder-only models.")
    for stack in (base.get_decoder() if hasattr(base, "get_decoder") else base), base:
        for child in stack.children():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                return Decoder(stack, child, config.hidden_size)
    raise ConfigError(
        f"{type(base).__name__} has no list of {config.num_hidden_layers} layers where a memory could go."
    )


def arguments(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the stack by name."""
    names = inspect.signature(stack.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


def fingerprint(model: nn.Module, samples: int = 256) -> str:
    """Sixteen hex digits of a model's weights, whatever floating type they are held in.

    A few hundred numbers of every tensor of the decoder, rounded to bfloat16: another model, or the same one trained
    further, has another fingerprint. Adapters of peft and memories do not count.
    """
    stack = find_decoder(model).stack
    digest = hashlib.sha256()
    for name, parameter in sorted(stack.named_parameters(), key=lambda item: item[0].replace("base_layer.", "")):
        if name.startswith("engram.") or "lora_" in name:
            continue
        digest.update(f"{name.replace('base_layer.', '')} {list(parameter.shape)}".encode())
        digest.update(_sample(parameter.detach(), samples).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(parameter: Tensor, count: int) -> Tensor:
    flat = parameter.reshape(-1)
    few = flat[:: max(1, flat.numel() // count)][:count].cpu()
    return few.bfloat16().view(torch.int16) if few.is_floating_point() else few.to(torch.int64)
