"""Models of `transformers` as small as they come, and a tokenizer for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from engram_lm.hashing import HashConfig
from engram_lm.hf.attach import Memory, attach
from engram_lm.memory import EngramConfig
from engram_lm.tables import TableConfig

SENTENCES = [
    "The quick brown fox jumps over the lazy dog while the memory looks up what it has seen.",
    "Alice was born in Paris in 1912, and Bob was born in Lima in 1935.",
    "The capital of France is Paris; the capital of Peru is Lima; the capital of Japan is Tokyo.",
    "A table of rows is read by the numbers of its rows, and each row is a vector.",
    "She sells sea shells by the sea shore, and the shells that she sells are sea shells.",
    "Who wrote the letter? Bob wrote the letter to Alice, and Alice answered on Monday.",
    "In the beginning there was nothing in the cache, and then there was a token.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
]
HASH = HashConfig(orders=(2, 3), heads=2, rows_per_head=211, layers=(1, 2), pad_id=1)
ENGRAM = EngramConfig(row_dim=4)  # with a convolution: four taps, three positions apart
PLAIN = EngramConfig(row_dim=4, conv_kernel=0)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 380 tokens; ids 0 to 2 are <s>, </s> (end of text) and <pad>. It adds none of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}
_GROUPED = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_CONFIGS: dict[str, Any] = {
    "llama": lambda **ids: LlamaConfig(**_GROUPED, **ids),
    "qwen2": lambda **ids: Qwen2Config(**_GROUPED, **ids),
    "qwen3": lambda **ids: Qwen3Config(**_GROUPED, **ids),
    "gemma2": lambda **ids: Gemma2Config(**_GROUPED, sliding_window=6, query_pre_attn_scalar=8, **ids),
    "gemma3_text": lambda **ids: Gemma3TextConfig(
        **_GROUPED,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **ids,
    ),
    "mistral": lambda **ids: MistralConfig(**_GROUPED, sliding_window=6, **ids),
    "gpt_neox": lambda **ids: GPTNeoXConfig(**_SIZES, intermediate_size=48, **ids),
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=256, **ids),
}
KINDS = tuple(_CONFIGS)  # mistral, gemma2 and gemma3_text have sliding windows of 6 positions


def tiny_model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A causal model of four layers of 32 with random weights, in eval mode.

    Its embedding has 400 entries, more than the tokenizer. `changes` go to the configuration.
    """
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 400}
    config = _CONFIGS[kind](**ids)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if "gemma" in kind else "sdpa")
    with torch.no_grad():  # far from uniform: greedy and sampled texts vary, and no two logits tie
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def tiny_memory(
    model: nn.Module,
    config: EngramConfig = ENGRAM,
    *,
    hash: HashConfig = HASH,
    live: bool = True,
    seed: int = 0,
    **options: Any,
) -> Memory:
    """A memory on the model; a live one has random rows and convolutions, so that whatever it reads matters."""
    memory = attach(model, config, tiny_tokenizer(), hash=hash, seed=seed, **{"table": TableConfig("device")} | options)
    return enliven(memory, seed) if live else memory


@torch.no_grad()
def enliven(memory: Memory, seed: int = 0) -> Memory:
    """Random rows, and parameters moved by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    table = memory.lookup.table
    table.write(torch.arange(table.num_rows), torch.randn(table.num_rows, table.dim, generator=generator))
    for parameter in memory.parameters():
        parameter += (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return memory


def tiny_batch(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random tokens [batch, length] of the tokenizer, no special ones."""
    return torch.randint(3, 380, (batch, length), generator=torch.Generator().manual_seed(seed))
