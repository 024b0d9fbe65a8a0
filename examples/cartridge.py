"""Teach a language model a few facts, save them as a cartridge, and plug it into fresh copies of the model.

    python examples/cartridge.py

The model is a tiny Llama with random weights, made here, so nothing is downloaded. A few seconds on two cores.
"""

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from engram_lm.errors import MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.hf.attach import attach, using
from engram_lm.hf.cartridge import mount, save, unmount
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig
from engram_lm.tables import TableConfig

logging.set_verbosity_error()
CITIES = ["Ada was born in Oslo .", "Bela was born in Lima .", "Chen was born in Rome .", "Dara was born in Cairo ."]
TRADES = ["Ada works as a baker .", "Bela works as a pilot .", "Chen works as a nurse .", "Dara works as a judge ."]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([*CITIES, *TRADES], trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")


tokenizer = make_tokenizer()


def make_model(seed: int = 0) -> LlamaForCausalLM:
    """The same random weights each time; they never train."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).requires_grad_(False).eval()


def teach(facts: list[str], directory: Path) -> None:
    """Attach a memory, train nothing else, save it."""
    model = make_model()
    addresses = HashConfig(orders=(2, 3, 4), heads=4, rows_per_head=1009, layers=(1, 2), pad_id=1)
    attach(model, EngramConfig(row_dim=16), tokenizer, hash=addresses)
    optimizer = RowwiseAdamW(model.train(), lr=1e-2, table_lr=0.2)
    batch = tokenizer(facts, return_tensors="pt", return_token_type_ids=False)
    for _ in range(60):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, directory, tokenizer, card={"license": "apache-2.0"})
    print(f"learned {directory.name}: loss {loss.item():.3f}")


def ask(model: LlamaForCausalLM, prompt: str) -> str:
    """The likeliest next word."""
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return f"{prompt} {tokenizer.decode(model(**given).logits[0, -1].argmax())}"


with tempfile.TemporaryDirectory() as scratch:
    cities, trades = Path(scratch, "cities"), Path(scratch, "trades")
    teach(CITIES, cities)
    teach(TRADES, trades)
    print("files:", ", ".join(sorted(path.name for path in cities.iterdir())))

    born, works = "Chen was born in", "Dara works as a"
    model = make_model()
    print("\na fresh model:         ", ask(model, born), "|", ask(model, works))
    mount(model, cities, tokenizer=tokenizer)
    print("with cities:           ", ask(model, born), "|", ask(model, works))
    mount(model, trades, tokenizer=tokenizer, table=TableConfig("disk", memory=0.001))  # rows stay in the file
    for names in (("cities",), ("trades",), ("cities", "trades"), ()):
        with using(model, *names):
            print(f"using {' and '.join(names) or 'none':18}", ask(model, born), "|", ask(model, works))
    unmount(model)
    print("unmounted:             ", ask(model, born), "|", ask(model, works))

    again = make_model()
    mount(again, cities, tokenizer=tokenizer)
    print("another fresh model:   ", ask(again, born))

    try:
        mount(make_model(seed=1), cities, tokenizer=tokenizer)
    except MismatchError as error:
        print(f"\na model with other weights is refused:\n{error}")
