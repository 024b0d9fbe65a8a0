"""One memory, three training loops: plain PyTorch, transformers.Trainer and TRL's SFTTrainer. The base stays frozen.

    pip install 'engram-lm[hf]' trl && python examples/retrofit_trainer.py

The model is made here, so nothing is downloaded: to retrofit your own, load it with AutoModelForCausalLM.from_pretrained.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from engram_lm.hf.attach import Memory, attach, default_hash
from engram_lm.hf.checkpoints import EngramCallback
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gia", "Hugo")
PLACES = ("Lima", "Oslo", "Paris", "Quito", "Rome", "Sofia", "Tokyo", "Vienna")
TEXTS = [f"{name} was born in {place}." for name, place in zip(NAMES, PLACES, strict=True)]
COMMON: dict[str, Any] = {
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "constant",
    "save_steps": 15,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>", "<pad>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def retrofitted(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, Memory]:
    """A frozen model with an empty memory: its logits are what they were."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
    model.requires_grad_(False)
    hash = default_hash(4, tokenizer, rows_per_head=1009)
    return model, attach(model, EngramConfig(row_dim=16, conv_kernel=0), tokenizer, hash=hash)


def loss_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return model.eval()(**batch, use_cache=False).loss.item()


def main() -> None:
    tokenizer = make_tokenizer()
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    examples = [{key: value[row] for key, value in batch.items()} for row in range(len(TEXTS))]
    losses = {}

    with tempfile.TemporaryDirectory() as directory:
        # Plain PyTorch: save_memories(model, directory) keeps rows and projections.
        model, memory = retrofitted(tokenizer)
        optimizer = RowwiseAdamW(model, lr=1e-2, table_lr=0.3)
        losses["before"] = loss_of(model, batch)
        model.train()
        for _ in range(COMMON["max_steps"]):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses["plain PyTorch"] = loss_of(model, batch)

        # Trainer: the callback keeps them in checkpoint-N/engram, and goes on from there on resume_from_checkpoint.
        model, memory = retrofitted(tokenizer)
        Trainer(
            model,
            TrainingArguments(f"{directory}/trainer", **COMMON),
            train_dataset=examples,
            optimizers=(RowwiseAdamW(model, lr=1e-2, table_lr=0.3), None),
            callbacks=[EngramCallback()],
        ).train()
        losses["Trainer"] = loss_of(model, batch)

        # TRL. With LoRA: model = get_peft_model(model, config), then attach, then the optimizer.
        model, memory = retrofitted(tokenizer)
        SFTTrainer(
            model,
            SFTConfig(f"{directory}/sft", bf16=False, **COMMON),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
            optimizers=(RowwiseAdamW(model, lr=1e-2, table_lr=0.3), None),
            callbacks=[EngramCallback()],
        ).train()
        losses["SFTTrainer"] = loss_of(model, batch)

    print(f"\n{memory.lookup.table.num_rows:,} rows; the base never changed. Nats a token:")
    for loop, loss in losses.items():
        print(f"  {loop:14} {loss:.2f}")


if __name__ == "__main__":
    main()
