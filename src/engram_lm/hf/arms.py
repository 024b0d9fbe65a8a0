"""The arms of a retrofit: what each adds to the same pretrained model, trains there, saves, and takes off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..hashing import HashConfig
from ..memory import EngramConfig
from . import cartridge
from .attach import Memory, attach, default_hash, default_layers, using
from .base import Base
from .config import RetrofitConfig
from .decoder import find_decoder
from .training import RowwiseAdamW

RANDOM_STD = 1.0  # of frozen random rows; attach then starts with a silent value, so nothing else depends on it


class Bias(nn.Module):
    """One learned vector in front of each of some layers of a model, from zero."""

    def __init__(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        super().__init__()
        decoder, self.enabled = find_decoder(model), True
        device = next(decoder.stack.parameters()).device
        self.vectors = nn.ParameterDict({str(n): nn.Parameter(torch.zeros(decoder.dim, device=device)) for n in layers})
        self.handles = [
            decoder.layers[n].register_forward_pre_hook(partial(self._add, str(n)), with_kwargs=True) for n in layers
        ]

    def _add(self, layer: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.enabled:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        total = hidden + self.vectors[layer].to(hidden.dtype)
        return ((total, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": total})

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()


class Arm:
    """One arm on a base: its parts are there from the start until `remove`.

    rank: of adapters. directory: for a table of tier disk.
    """

    def __init__(self, name: str, base: Base, config: RetrofitConfig, *, seed: int, rank: int, directory: Path) -> None:
        self.name, self.base, self.config = name, base, config
        self.adapter: Any = None
        self.memory: Memory | None = None
        self.bias: Bias | None = None
        if config.adapts(name):  # before the memory, whose projections are no part of the model
            self.adapter = add_adapter(base.model, rank, seed)
        if name == "bias":
            self.bias = Bias(base.model, addresses(config, base).layers)
        elif name in ("engram", "engram+lora", "capacity_1", "frozen_random"):
            self.memory = self._attach(seed, directory)
        self.trains_base = config.trains_base(name)
        if self.trains_base:
            base.model.requires_grad_(True)

    def _attach(self, seed: int, directory: Path) -> Memory:
        random = self.name == "frozen_random"
        memory = attach(
            self.base.model,
            engram_config(self.config),
            self.base.tokenizer,
            hash=addresses(self.config, self.base, self.name),
            table=replace(self.config.table, std=RANDOM_STD, seed=seed) if random else self.config.table,
            directory=directory,
            name="memory",
            seed=seed,
        )
        memory.train_rows = not random
        return memory

    def parts(self) -> dict[str, tuple[list[nn.Parameter], float]]:
        """Trained parameters and their peak learning rate by part; rows are not parameters."""
        parts: dict[str, tuple[list[nn.Parameter], float]] = {}
        if self.memory is not None:
            parts["projections"] = list(self.memory.parameters()), self.config.lr
        if self.bias is not None:
            parts["bias"] = list(self.bias.parameters()), self.config.bias_lr
        known = {id(parameter) for parameters, _ in parts.values() for parameter in parameters}
        named = [(n, p) for n, p in self.base.model.named_parameters() if p.requires_grad and id(p) not in known]
        for part, lr, wanted in (("adapters", self.config.lora_lr, True), ("weights", self.config.base_lr, False)):
            parameters = [parameter for name, parameter in named if ("lora_" in name) == wanted]
            if parameters:
                parts[part] = parameters, lr
        return parts

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each part: AdamW, and the row-wise update for rows."""
        optimizers: list[torch.optim.Optimizer] = []
        for part, (parameters, lr) in self.parts().items():
            if part == "projections":
                assert self.memory is not None
                optimizers.append(RowwiseAdamW(self.memory, lr, self.config.table_lr))
            else:
                optimizers.append(torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0))
        return optimizers

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model runs without what the arm added."""
        with ExitStack() as stack:
            stack.enter_context(using(self.base.model))
            if self.adapter is not None:
                stack.enter_context(self.adapter.disable_adapter())
            if self.bias is not None:
                self.bias.enabled = False
            try:
                yield
            finally:
                if self.bias is not None:
                    self.bias.enabled = True

    def save(self, directory: Path, cartridge_directory: Path) -> None:
        """Write what was learned and can be used again: a cartridge, adapters, vectors, or the model's weights."""
        if self.name in ("engram", "engram+lora"):
            cartridge.save(self.base.model, cartridge_directory, self.base.tokenizer)
        if self.adapter is not None:
            self.adapter.save_pretrained(directory / "adapter", save_embedding_layers=False)
        if self.bias is not None:
            save_file(dict(self.bias.vectors.items()), directory / "bias.safetensors")

    def remove(self, directory: Path | None = None) -> None:
        """Leave the model without the arm's parts; weights that trained stay, and are written to `directory`, if given."""
        if self.memory is not None:
            cartridge.unmount(self.base.model, self.memory.name)
        if self.bias is not None:
            self.bias.remove()
        if self.adapter is not None:
            self.adapter.unload()
        self.base.model.requires_grad_(False)
        if self.trains_base and directory is not None:
            self.base.model.save_pretrained(directory / "model")
            self.base.tokenizer.save_pretrained(directory / "model")


def addresses(config: RetrofitConfig, base: Base, arm: str = "engram") -> HashConfig:
    """How an arm's rows are addressed; the control's plan has the memory's heads of one row each."""
    count = len(find_decoder(base.model).layers)
    hash = replace(
        default_hash(count, base.tokenizer),
        orders=config.orders,
        heads=config.heads,
        layers=config.layers or default_layers(count),
    ).sized(rows=config.rows)
    return replace(hash, scheme="capacity_1") if arm == "capacity_1" else hash


def engram_config(config: RetrofitConfig) -> EngramConfig:
    """How rows are fused."""
    return EngramConfig(row_dim=config.row_dim, conv_kernel=config.conv_kernel, conv_dilation=max(config.orders))


# --- adapters -------------------------------------------------------------------------------------------------------


def require_peft() -> Any:
    """The peft package. Raises ConfigError that says how to install it."""
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "adapters need peft: pip install 'engram-lm[peft]', or leave lora out of --arms; without that control it would "
            "stay open whether a memory does more than as many parameters elsewhere."
        ) from None
    return peft


def add_adapter(model: nn.Module, rank: int, seed: int) -> Any:
    """LoRA on all linear layers of a model, in place; alpha is twice the rank."""
    peft = require_peft()
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it has given up
        return peft.get_peft_model(model, config)


def matched_rank(model: nn.Module, parameters: int) -> tuple[int, int, int]:
    """The rank whose adapters come nearest to so many parameters; the parameters of one rank; the largest sensible rank.

    Adapters grow with their rank in a straight line. At the largest sensible rank they are as big as the smallest matrix
    that they adapt.
    """
    adapter = add_adapter(model, 1, 0)
    try:
        each = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
        sizes = [(module.in_features, module.out_features) for module in adapted]
    finally:
        adapter.unload()
        model.requires_grad_(False)
    largest = max(1, min(n * m // (n + m) for n, m in sizes))
    return min(max(1, round(parameters / each)), largest), each, largest
