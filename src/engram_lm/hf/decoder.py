"""Finding one's way in a decoder-only model of `transformers`: its stack of layers, its text, its identity."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator
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
                if "past_key_values" not in inspect.signature(stack.forward).parameters:
                    raise ConfigError(
                        f"{type(stack).__name__} keeps its past elsewhere than in past_key_values: a memory could not "
                        "follow the text that it generates."
                    )
                return Decoder(stack, child, config.hidden_size)
    raise ConfigError(
        f"{type(base).__name__} has no list of {config.num_hidden_layers} layers where a memory could go."
    )


def arguments(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the stack by name."""
    return dict(zip(_names(type(stack)), args, strict=False)) | kwargs  # type: ignore[arg-type]


@functools.cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # without self


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them.

    Raises ConfigError for a module without weights.
    """
    first = next(module.parameters())
    if not first.is_meta:
        return first.device
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ConfigError("the model has no weights yet (it is on the meta device): load them before a memory comes.")


def fingerprint(model: nn.Module, samples: int = 4096) -> str:
    """Sixteen hex digits of a model's weights, whatever floating type they are held in.

    The signs of some thousand numbers of every tensor of the decoder, which no rounding changes: another model, or the same
    one trained further, has others. Adapters of peft and memories do not count.

    Raises ConfigError for weights that are not there.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_weights(find_decoder(model).stack, ""), key=lambda pair: pair[0]):
        if parameter.is_meta:
            raise ConfigError(
                f"{name[1:]} is offloaded (on the meta device): a fingerprint needs the weights themselves."
            )
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(_sample(parameter.detach(), samples).numpy().tobytes())
    return digest.hexdigest()[:16]


def _weights(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, without what peft and attach have put around and beside them."""
    for wrapped in "base_layer", "original_module":
        inner = getattr(module, wrapped, None)
        if isinstance(inner, nn.Module):
            yield from _weights(inner, name)
            return
    yield from module.named_parameters(name, recurse=False)
    for child, part in module.named_children():
        if child != "engram":
            yield from _weights(part, f"{name}.{child}")


def _sample(parameter: Tensor, count: int) -> Tensor:
    flat = parameter.reshape(-1)
    few = flat[:: max(1, flat.numel() // count)][:count].cpu()
    return few.signbit() if few.is_floating_point() else few.to(torch.int64)
