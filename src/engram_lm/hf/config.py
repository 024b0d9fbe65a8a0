"""What a retrofit is asked to do. Light: it imports neither transformers nor peft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import ConfigError
from ..tables import TableConfig
from ..train.precision import Precision

ArmName = Literal["engram", "lora", "bias", "capacity_1", "frozen_random", "engram+lora", "full"]

DESCRIPTIONS: dict[str, str] = {
    "base": "the pretrained model as it is",
    "engram": "a memory: rows addressed by n-grams, and the projections that fuse them",
    "lora": "low-rank adapters on all linear layers, with as many trained parameters as the memory",
    "bias": "one learned vector in front of the memory's layers: what a memory without content can learn at least",
    "capacity_1": "the memory's branch with the same projections, but every n-gram reads the same rows, one a head",
    "frozen_random": "the memory with random rows that never train: addresses without learned content",
    "engram+lora": "the memory and the adapters together",
    "full": "all weights of the model, without a memory",
}


@dataclass(frozen=True)
class RetrofitConfig:
    """One retrofit, with everything needed to run it again."""

    model: str
    """Pretrained decoder-only model: a directory or a hub name."""
    data: str
    """Text to learn: .txt, .md, .py, .jsonl[.gz|.xz|.zst], .parquet, a directory of such, or hf:DATASET[:SPLIT]."""
    gguf_file: str = ""
    """GGUF file of the model, where its weights come as one."""
    outside: str = ""
    """Text outside the domain, to measure forgetting on. Default: forgetting is not measured."""
    arms: tuple[ArmName, ...] = ("engram", "lora", "bias", "capacity_1", "frozen_random")
    """What is trained, each arm by itself on the same batches. The base is always measured too."""
    base: Literal["frozen", "lora", "full"] = "frozen"
    """What trains of the model itself beside a memory: nothing, adapters on its linear layers, or all of its weights."""
    tokens: int = 0
    """Training tokens of each arm. Default: `epochs` over the text."""
    epochs: float = 1.0
    """Passes over the text where `tokens` says nothing."""
    batch_size: int = 4
    """Sequences a step."""
    length: int = 512
    """Tokens a sequence; documents are packed."""
    lr: float = 1e-3
    """Peak learning rate of the memory's projections."""
    table_lr: float = 0.05
    """Peak learning rate of its rows."""
    lora_lr: float = 5e-4
    """Peak learning rate of adapters."""
    bias_lr: float = 5e-3
    """Peak learning rate of the bias-only arm."""
    base_lr: float = 2e-5
    """Peak learning rate of the model's own weights, where they train."""
    lora_rank: int = 0
    """Rank of adapters; 0 for as many trained parameters as the memory has."""
    layers: tuple[int, ...] = ()
    """Layers, from 0, that a memory goes in front of. Default: an early one and one in the middle."""
    orders: tuple[int, ...] = (2, 3)
    """The n of the n-grams."""
    heads: int = 8
    """Hash functions an order."""
    rows: int = 1_000_000
    """Rows of the table at most, all layers together."""
    row_dim: int = 32
    """Numbers in a row."""
    conv_kernel: int = 0
    """Taps of the short convolution; 0 for none."""
    table: TableConfig = field(default_factory=TableConfig)
    """Where the rows live, and how they are encoded."""
    seeds: tuple[int, ...] = (0,)
    """Of weights and of the order of batches; each arm is trained once a seed. The cartridge is the first one's."""
    held_out: float = 0.1
    """Share of the documents to measure on."""
    eval_tokens: int = 65_536
    """Tokens measured at the end, spread over all held-out documents, and as many outside the domain; 0 for all."""
    evaluations: int = 8
    """Points of the validation curve, each on an eighth of those tokens."""
    precision: Precision = "auto"
    """Of the frozen model's weights and products; auto is bfloat16 where it is fast. What trains is float32."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "row_dim", "heads", "rows", "evaluations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("tokens", "lora_rank", "eval_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("epochs", "lr", "table_lr", "lora_lr", "bias_lr", "base_lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("arms", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"{name} must name different ones, got {getattr(self, name)}.")
        if self.table.file:
            raise ConfigError(
                f"table.file {self.table.file!r}: every arm has a table in its own directory, and they would share that file."
            )

    def adapts(self, arm: str) -> bool:
        """Whether an arm trains adapters."""
        return arm in ("lora", "engram+lora") or (self.base == "lora" and has_memory(arm))

    def trains_base(self, arm: str) -> bool:
        """Whether an arm trains the model's own weights."""
        return arm == "full" or (self.base == "full" and has_memory(arm))


def has_memory(arm: str) -> bool:
    """Whether an arm attaches a memory or what stands in its place."""
    return arm in ("engram", "engram+lora", "capacity_1", "frozen_random", "bias")
