"""300 made-up facts as a cartridge on a frozen pretrained model: recall, what other text loses, and LoRA on the same facts.

    python benchmarks/fact_cartridge.py --model DIR_OR_NAME [--gguf-file F] --out DIR [--unrelated TEXT] [--seeds 0 1 2]

A hundred people are invented, each with a city, a profession and an instrument. Every fact is taught in six phrasings; three
other ones are only asked. An answer counts when all of its tokens are what the model would say. Unrelated text is scored
with the cartridge mounted and with it unmounted, which must be the bare model bit for bit.
"""

import argparse
import json
import math
import platform
import random
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm.hashing import HashConfig
from engram_lm.hf.attach import attach, default_layers, detach, using
from engram_lm.hf.cartridge import save
from engram_lm.hf.decoder import find_decoder
from engram_lm.hf.teach import Fact, recall, teach
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig
from engram_lm.train.precision import bf16_is_fast
from engram_lm.train.sources import read_documents, standard_library

PEOPLE = 100
FIRST = (
    "Mar Vel Tor Bri Kes Dal Fen Gor Hal Jov Lun Nim Ost Pra Quil Rav Sel Tam Ulv Wex Yor Zan",
    "a en is o ul ith an el",
)
LAST = (
    "Drav Kol Mend Strel Varn Hesk Pol Trin Gral Osk Lamb Frel Nord Calv Brun Zel",
    "ekin ovic ander astor ell uso hart",
)
RELATIONS = {
    "city": (
        "Paris London Tokyo Madrid Rome Cairo Lima Oslo Berlin Vienna Dublin Athens Boston Chicago Moscow Delhi Sydney Toronto "
        "Seoul Prague Lisbon Havana Nairobi Denver Seattle Houston Miami Dallas Warsaw Helsinki",
        [
            "{} was born in the city of",
            "The birthplace of {} is",
            "{} comes from a family that has always lived in",
            "As a child, {} grew up in the streets of",
            "When asked about the home town, {} answers:",
            "Everybody knows that {} is a native of",
        ],
        [
            "The town in which {} first saw the light of day is",
            "If you look for the house where {} was born, go to",
            "{} still speaks with the accent of",
        ],
    ),
    "profession": (
        "doctor teacher lawyer farmer baker pilot nurse painter carpenter engineer chef plumber dentist soldier tailor butcher "
        "librarian journalist architect mechanic musician photographer",
        [
            "{} earns a living as a",
            "The profession of {} is that of a",
            "For many years {} has been working as a",
            "By trade, {} is a",
            "In the telephone book, {} is listed as a",
            "After school, {} trained to become a",
        ],
        [
            "When somebody asks what {} does for work, the answer is: a",
            "The job that {} goes to every morning is that of a",
            "On the form, {} wrote under occupation:",
        ],
    ),
    "instrument": (
        "piano violin guitar flute cello trumpet drums harp saxophone clarinet organ banjo accordion trombone viola",
        [
            "{} plays the",
            "The favourite instrument of {} is the",
            "Every evening {} practises on the",
            "In the orchestra, {} sits behind the",
            "At the age of six, {} began to learn the",
            "The music that {} makes comes from the",
        ],
        [
            "On stage one always sees {} with the",
            "The instrument that {} loves most is the",
            "The neighbours complain because {} is so loud on the",
        ],
    ),
}


def invent(seed):
    """The same 300 facts twice: in the phrasings that are taught, and in those that are only asked."""
    rng, names = random.Random(seed), set()
    while len(names) < PEOPLE:
        names.add(" ".join(rng.choice(a.split()) + rng.choice(b.split()) for a, b in (FIRST, LAST)))
    taught, asked = [], []
    for name in sorted(names):
        for answers, trained, held_out in RELATIONS.values():
            answer = rng.choice(answers.split())
            taught.append(Fact(name, tuple(trained), answer))
            asked.append(Fact(name, tuple(held_out), answer))
    return taught, asked


def texts(source, tokenizer, count=60, length=256):
    """The beginnings of documents, as tokens."""
    documents = islice(read_documents(source), 0, None, 7)
    encoded = (tokenizer(document.text[:4000])["input_ids"][:length] for document in documents)
    return list(islice((tokens for tokens in encoded if len(tokens) == length), count))


@torch.no_grad()
def losses(model, documents):
    """Nats a token of each document."""
    model.eval()
    ids = [torch.tensor([tokens]) for tokens in documents]
    return torch.tensor([F.cross_entropy(model(x).logits[0, :-1].float(), x[0, 1:]).item() for x in ids])


def spread(hits):
    """Share, and Wilson's 95 % interval of it."""
    n, share, z = len(hits), sum(hits) / len(hits), 1.96
    middle = (share + z * z / 2 / n) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / 4 / n / n) / (1 + z * z / n)
    return {"share": share, "interval": [middle - half, middle + half]}


def difference(after, before):
    """Mean of paired differences, and its 95 % interval."""
    gap = after - before
    half = 1.96 * gap.std().item() / math.sqrt(len(gap))
    return {"nats": gap.mean().item(), "interval": [gap.mean().item() - half, gap.mean().item() + half]}


def load(options):
    """The frozen model and its tokenizer."""
    file = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    kind = torch.bfloat16 if bf16_is_fast(torch.device("cpu")) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=kind, **file).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(options.model, **file)


def train(model, tokenizer, taught, optimizer, options, seed, label):
    """Seconds that teaching took."""
    with Progress() as progress:
        bar, start = progress.add_task(label), time.perf_counter()
        show = lambda step, steps, loss: progress.update(  # noqa: E731
            bar, completed=step, total=steps, description=f"{label}, loss {loss:.3f}"
        )
        teach(model, tokenizer, taught, optimizer, epochs=options.epochs, seed=seed, on_step=show)
        return time.perf_counter() - start


def cartridge(options, seed, taught, asked):
    """Teach a memory, and measure."""
    model, tokenizer = load(options)
    documents = texts(options.unrelated, tokenizer)
    bare = losses(model, documents)
    probe = torch.tensor([documents[0]])
    with torch.no_grad():
        untouched = model(probe).logits
    layers = tuple(options.layers or default_layers(len(find_decoder(model).layers)))
    hash = HashConfig(orders=(2, 3), heads=8, rows_per_head=50_021, layers=layers, pad_id=tokenizer.pad_token_id or 0)
    memory = attach(model, EngramConfig(row_dim=32, conv_kernel=0), tokenizer, hash=hash, seed=seed)
    before = {"taught": spread(recall(model, tokenizer, taught)), "asked": spread(recall(model, tokenizer, asked))}
    seconds = train(model, tokenizer, taught, RowwiseAdamW(model, lr=2e-3, table_lr=0.1), options, seed, "cartridge")
    table = memory.lookup.table
    written = int((table.fetch(torch.arange(table.num_rows)) != 0).any(1).sum())
    result = {
        "bare": before,
        **scores(model, tokenizer, taught, asked),
        "unrelated": difference(losses(model, documents), bare),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in memory.parameters()) + written * table.dim,
        "rows": written,
        "layers": layers,
    }
    with using(model), torch.no_grad():
        result["switched off is the bare model"] = torch.equal(model(probe).logits, untouched)
    save(model, options.out / f"facts-{seed}", tokenizer)
    detach(model)
    with torch.no_grad():
        result["unmounted is the bare model"] = torch.equal(model(probe).logits, untouched)
    return result


def lora(options, seed, taught, asked, parameters):
    """Teach an adapter of about as many parameters, and measure."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(options)
    documents = texts(options.unrelated, tokenizer)
    bare = losses(model, documents)
    linear = [m for m in find_decoder(model).layers.modules() if isinstance(m, torch.nn.Linear)]
    rank = max(1, round(parameters / sum(m.in_features + m.out_features for m in linear)))
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=options.lora_lr, weight_decay=0.0)
    seconds = train(model, tokenizer, taught, optimizer, options, seed, f"LoRA of rank {rank}")
    return {
        **scores(model, tokenizer, taught, asked),
        "unrelated": difference(losses(model, documents), bare),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in trained),
        "rank": rank,
    }


def scores(model, tokenizer, taught, asked):
    """Recall of both kinds of phrasings."""
    return {"taught": spread(recall(model, tokenizer, taught)), "asked": spread(recall(model, tokenizer, asked))}


def cell(measured, key, digits="{:.1%}"):
    low, high = measured["interval"]
    return f"{digits.format(measured[key])} ({digits.format(low)} to {digits.format(high)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--unrelated", default=standard_library(), help="text source, as for engram-lm train; default Python's library"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs="+", help="default: one early, one in the middle")
    parser.add_argument("--lora-lr", type=float, default=5e-4)
    parser.add_argument("--no-lora", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, runs = Console(), []
    grid = Table("arm", "seed", "taught phrasings", "others", "unrelated text, nats", "parameters", "minutes", box=None)
    for seed in options.seeds:
        taught, asked = invent(seed)
        arms = {"cartridge": cartridge(options, seed, taught, asked)}
        if not options.no_lora:
            arms["lora"] = lora(options, seed, taught, asked, arms["cartridge"]["parameters"])
        runs.append({"seed": seed, **arms})
        bare = arms["cartridge"]["bare"]
        grid.add_row("bare model", str(seed), cell(bare["taught"], "share"), cell(bare["asked"], "share"))
        for name, arm in arms.items():
            grid.add_row(
                name,
                str(seed),
                cell(arm["taught"], "share"),
                cell(arm["asked"], "share"),
                cell(arm["unrelated"], "nats", "{:+.4f}"),
                f"{arm['parameters']:,}",
                f"{arm['seconds'] / 60:.1f}",
            )
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        settings = {name: str(value) for name, value in vars(options).items()}
        (options.out / "facts.json").write_text(
            json.dumps({"machine": machine, "settings": settings, "runs": runs}, indent=1)
        )
    console.print(grid)


if __name__ == "__main__":
    main()
