"""The backbone: a decoder-only language model with a place for a memory in any block."""

from .attention import AttentionConfig
from .count import Count, count
from .ffn import MoEConfig
from .lm import LanguageModel, MemoryConfig, ModelConfig, ModelState
from .presets import PRESETS, get_preset

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "Count",
    "LanguageModel",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelState",
    "count",
    "get_preset",
]
