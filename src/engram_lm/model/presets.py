"""Named models: two to work with, and the four of the paper (arXiv 2601.07372, table 5).

What the paper gives: vocabulary, layers, width, heads, experts and their counts, hyper-connections of 4
streams, the memory's sizes, and the totals. What it does not give was chosen so that the totals hold
(`tests/test_count.py`):

    MLA ranks       queries 768, keys and values 512; head 128 + 64 (RoPE), value 128: 22.8 M a layer
    expert width    1536: the 17 experts that Engram-27B gives up in 29 layers are then its tables (5.82 B to
    5.79 B) dense widths    8192 in the leading block of the MoE models (3.8 B active), 11904 in Dense-4B
    embeddings      untied
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from ..errors import ConfigError
from ..hashing import HashConfig
from ..memory import EngramConfig
from .attention import AttentionConfig
from .ffn import MoEConfig
from .lm import MemoryConfig, ModelConfig

TINY = ModelConfig(
    vocab_size=4096,
    dim=128,
    layers=4,
    attention=AttentionConfig("gqa", heads=4, kv_heads=4, head_dim=32),
    ffn_width=384,
    memory=MemoryConfig(
        HashConfig(orders=(2, 3), heads=4, rows_per_head=100_000, layers=(1,), pad_id=0),
        EngramConfig(row_dim=32, conv_dilation=3),
    ),
)

SMALL = ModelConfig(
    vocab_size=32_768,
    dim=768,
    layers=12,
    attention=AttentionConfig("gqa", heads=12, kv_heads=12, head_dim=64),
    ffn_width=2304,
    tie_embeddings=True,
    memory=MemoryConfig(
        HashConfig(orders=(2, 3), heads=8, rows_per_head=262_144, layers=(1, 6), pad_id=0),
        EngramConfig(row_dim=64),
    ),
)

DENSE_4B = ModelConfig(
    vocab_size=129_280,
    dim=2560,
    layers=30,
    attention=AttentionConfig("mla", heads=32, nope_dim=128, rope_dim=64, value_dim=128, q_rank=768, kv_rank=512),
    ffn_width=11_904,
    streams=4,
)

MOE_27B = replace(DENSE_4B, ffn_width=8192, moe=MoEConfig(experts=72, active=6, shared=2, width=1536, dense_layers=1))


def _with_engram(rows_per_head: int) -> ModelConfig:
    """MoE-27B with 17 of its 72 experts traded for memories of d_mem = 2 x 8 x 80 in blocks 1 and 14."""
    hashing = HashConfig(orders=(2, 3), heads=8, rows_per_head=rows_per_head, layers=(1, 14))
    assert MOE_27B.moe is not None
    return replace(
        MOE_27B, moe=replace(MOE_27B.moe, experts=55), memory=MemoryConfig(hashing, EngramConfig(row_dim=80))
    )


PRESETS: dict[str, ModelConfig] = {
    "tiny": TINY,
    "small": SMALL,
    "dense-4b": DENSE_4B,
    "moe-27b": MOE_27B,
    "engram-27b": _with_engram(2_262_400),
    "engram-40b": _with_engram(7_239_680),
}


def get_preset(name: str) -> ModelConfig:
    """The preset of that name. Raises ConfigError, with the nearest name, for one that does not exist."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"No preset is called {name!r}.{hint} There are {', '.join(PRESETS)}.")
