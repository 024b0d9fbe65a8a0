"""The command line: the only file that knows everyone. Each command is a dataclass of its options and a `run`."""

from __future__ import annotations

import math
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro
from rich.console import Console
from rich.text import Text
from tyro import MISSING_NONPROP
from tyro.conf import AvoidSubcommands, Positional, arg, subcommand

from .. import config as configs
from ..errors import ConfigError, DataError, EngramError
from ..model.presets import PRESETS, get_preset
from ..study.compare import CompareConfig
from ..tables import TableConfig
from ..train.allocator import keep_freed_memory
from ..train.loop import TrainConfig
from .bench import Bench
from .cartridge import Cartridge
from .compare import Compare
from .facts import Facts
from .needle import Needle
from .plan import Plan
from .probe import Probe
from .retrofit import Retrofit
from .sweep import Sweep
from .table import Table

if TYPE_CHECKING:
    from ..train.loop import Training
    from ..train.ranks import Ranks

DESCRIPTION = """engram-lm: conditional memory for language models.

  engram-lm quickstart                      what a memory does, in minutes and without a download
  engram-lm train tiny --data texts/        train a model with a memory on your own text
  engram-lm eval runs/train                 its loss on held-out text, with the uncertainty
  engram-lm generate runs/train             let it write
  engram-lm export runs/train hf/           hand it to transformers: AutoModelForCausalLM, generate, Trainer
  engram-lm compare tiny --data texts/ --seeds 3        is it memory? controls, slices, probes, one report
  engram-lm sweep memory|allocation                     how loss falls with rows; experts or memory?
  engram-lm facts --hard --real geonames                how many facts does a model hold, with and without a memory?
  engram-lm probe runs/train                            what the memory does, and what would be lost without it
  engram-lm needle runs/train                           does it find what is far away in its context?
  engram-lm retrofit --model M --data texts/ --out run/  a memory for a pretrained model, beside controls
  engram-lm cartridge inspect|verify|push                trained memories that are mounted on their model
  engram-lm count engram-27b                parameters, FLOPs and bytes of a preset
  engram-lm plan deepseek-v41 --ranks 8 64              a table on many machines: traffic, time, memory, price
  engram-lm table create|inspect|verify|convert|compact|stats|import|export    table files, released layouts
  engram-lm bench hash|gather|update|step|decode         what things cost here, beside what others' cost

`engram-lm COMMAND --help` explains a command."""


@dataclass(frozen=True)
class Quickstart:
    """See what a memory does, in a few minutes and without a download: two experiments and one report.

    Act one trains three small models side by side on the same text: without a memory, with a memory of one row a head
    (the control), and with a memory. Act two has them learn made-up people. The report explains what you see.
    """

    data: str = ""
    """Text to learn: .txt, .md, .py, .jsonl[.gz|.xz|.zst], .parquet, a directory of such, or hf:DATASET[:SPLIT].
    Default: the source of Python's standard library."""
    budget: Literal["short", "standard", "long"] = "standard"
    """How long to train: about a minute, a few minutes, or half an hour on two cores."""
    out: Path = Path("runs/quickstart")
    """Directory of the run; the report is OUT/report.html. The same command goes on with an interrupted one."""
    seed: int = 0
    """Seed of weights, batches and people."""
    table: TableConfig = field(default_factory=TableConfig)

    def run(self, console: Console) -> int:
        """Train, measure, write the report."""
        from ..quickstart import BUDGETS, Settings, quickstart

        path = quickstart(self.data, Settings(BUDGETS[self.budget], self.seed, self.table), self.out, console)
        if path is None:
            return 130
        console.print(f"\nReport: [bold]{path}[/bold] (open it in a browser)")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a model: engram-lm train PRESET_OR_CONFIG.json --data TEXT. Every setting has a dotted name that overrides it.

    The run directory holds config.json, metrics.jsonl and checkpoints. Killed at any moment, it goes on bit-identically:
    engram-lm train --resume --out DIR

    Several processes share a run (--parallel.*, docs/scaling.md) and go on by themselves when torchrun has to restart them:
    torchrun --nproc-per-node 2 --max-restarts 3 -m engram_lm train tiny --data TEXT
    """

    config: Annotated[TrainConfig, arg(name="")]
    data: str = ""
    """Text to learn: .txt, .md, .py, .jsonl[.gz|.xz|.zst], .parquet, a directory of such, or hf:DATASET[:SPLIT]."""
    tokenizer: str = ""
    """tokenizer.json, a directory that holds one, or a hub name. Default: train a byte-level BPE on the text."""
    out: Path = Path("runs/train")
    """Run directory."""
    resume: bool = False
    """Go on with the run in OUT."""

    def run(self, console: Console) -> int:
        """Find the other ranks, if any, prepare the text, train, and print the last evaluation."""
        from ..train.loop import train
        from ..train.parallel import start_ranks
        from ..train.watch import Watch

        ranks = start_ranks(self.config.parallel.timeout, self.config.device)
        console.quiet = ranks.rank > 0
        with Watch(ranks):
            training = self.prepare(console, ranks)
        if not train(training, label=self.out.name):
            console.print(f"Stopped and saved. Go on with: engram-lm train --resume --out {self.out}", soft_wrap=True)
            return 130
        last = next(line for line in reversed(training.metrics.lines) if "val_loss" in line)
        console.print(
            f"val loss {with_interval(last['val_loss'], last['val_interval'])} nats a token, "
            f"{last['bits_per_byte']:.4f} bits a byte"
        )
        return 0

    def prepare(self, console: Console, ranks: Ranks) -> Training:
        """Everything that is there before the first step."""
        import torch

        from .. import __version__
        from ..evaluate.loss import bytes_of_tokens, measure
        from ..train.alike import require_equal, source_digest
        from ..train.loader import Loader, windows
        from ..train.loop import Training
        from ..train.run import build_lookup, fit_vocabulary, prepare_text
        from ..train.tokenizer import tokenizer_digest

        if ranks.size > 1:  # a process alone need not read its own source
            versions = {"engram_lm": __version__, "torch": torch.__version__, "its source": source_digest()}
            require_equal(ranks, {"the command": configs.to_dict(self), **versions})
        data, tokenizer = prepare_text(
            self.data,
            self.out,
            tokenizer=self.tokenizer,
            vocab_size=self.config.model.vocab_size,
            say=console.print,
            ranks=ranks,
        )
        # each machine's torchrun counts only the failures that it saw
        restarted = any(ranks.everyones(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
        config = fit_vocabulary(self.config, tokenizer)
        facts = {"tokenizer_digest": tokenizer_digest(tokenizer), "text": data.meta.train.tokens_crc32}
        require_equal(ranks, facts)
        token_bytes = bytes_of_tokens(tokenizer)

        def evaluate(model, lookup):  # type: ignore[no-untyped-def]
            held_out = windows(data.val, max(1, config.batch_size // ranks.size), config.length, 256)
            losses = measure(model, lookup, held_out, token_bytes, ranks)
            return {"val_loss": losses.mean, "val_interval": losses.interval, "bits_per_byte": losses.bits_per_byte}

        return Training(
            config,
            self.out,
            Loader(data.train, config.batch_size, config.length, config.seed),
            build_lookup(config, tokenizer, self.out, ranks=ranks),
            evaluate=evaluate,
            facts=facts,
            resume=self.resume or restarted,
            tensorboard=True,
            ranks=ranks,
        )


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model's loss on its held-out text, or on other text, with a 95 % interval over documents."""

    directory: Positional[Path]
    """Run directory."""
    data: str = ""
    """Other text to measure on, all of it. Default: the documents that training held out."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def run(self, console: Console) -> int:
        """Load, measure, print."""
        from ..evaluate.loss import bytes_of_tokens, measure
        from ..train.loader import windows
        from ..train.precision import autocast
        from ..train.run import beside, load_run
        from ..train.shards import open_shards, split_in_memory
        from ..train.sources import read_documents

        trained = load_run(self.directory, self.device)
        config, tokenizer = trained.config, trained.tokenizer
        if self.data:
            split = split_in_memory(read_documents(self.data), tokenizer)
        else:
            split = open_shards(beside(self.directory, "shards")).val
        with autocast(config.precision, trained.device):
            batches = windows(split, config.batch_size, config.length)
            losses = measure(trained.model, trained.lookup, batches, bytes_of_tokens(tokenizer))
        console.print(
            f"step {trained.step}: {with_interval(losses.mean, losses.interval)} nats a token, "
            f"{losses.bits_per_byte:.4f} bits a byte ({int(losses.tokens.sum()):,} tokens, {len(losses.tokens):,} documents)"
        )
        return 0


@dataclass(frozen=True)
class Generate:
    """Let a trained model continue a prompt, token by token as they are drawn."""

    directory: Positional[Path]
    """Run directory."""
    prompt: str = ""
    """Text to continue. Default: the beginning of a document."""
    max_new_tokens: int = 200
    """Longest continuation."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int = 40
    """Draw from so many likeliest tokens; 0 for all."""
    seed: int = 0
    """Seed of the draw."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def run(self, console: Console) -> int:
        """Load, generate, print."""
        import torch

        from ..generate import generate
        from ..train.run import load_run
        from ..train.tokenizer import separator_id

        trained = load_run(self.directory, self.device)
        separator = separator_id(trained.tokenizer)
        ids = [separator, *trained.tokenizer.encode(self.prompt, add_special_tokens=False).ids]
        shown: list[int] = []

        def show(token: torch.Tensor) -> None:
            """Print what the new token adds to the text, once its characters are whole."""
            before = trained.tokenizer.decode(shown)
            text = trained.tokenizer.decode([*shown, int(token[0])])
            shown.append(int(token[0]))
            if not text.endswith("\ufffd"):
                sys.stdout.write(text[len(before.rstrip("\ufffd")) :])
                sys.stdout.flush()

        sys.stdout.write(self.prompt)
        generate(
            trained.model,
            trained.lookup,
            torch.tensor([ids], device=trained.device),
            self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            end_id=separator,
            on_token=show,
        )
        sys.stdout.write("\n")
        return 0


@dataclass(frozen=True)
class Export:
    """Write a trained model as a directory of `transformers`: engram-lm export runs/train hf/

    Then, after `import engram_lm.hf.modeling`, AutoModelForCausalLM.from_pretrained("hf/") loads it.
    """

    directory: Positional[Path]
    """Run directory."""
    out: Positional[Path]
    """Directory to write."""

    def run(self, console: Console) -> int:
        """Load, write, print."""
        try:
            from ..hf.modeling import export_run
        except ImportError as error:
            raise ConfigError(f"export needs transformers ({error}): pip install 'engram-lm[hf]'") from None

        console.print(f"Wrote {export_run(self.directory, self.out)}", soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Count:
    """Count a model on paper (no weights are made): parameters, FLOPs a token, table bytes read a token."""

    model: Positional[str]
    """Preset or configuration file."""
    context: int = 4096
    """Tokens that attention's cost is counted at."""

    def run(self, console: Console) -> int:
        """Count and print."""
        from ..model.count import count

        console.print(count(load_config(self.model).model, context=self.context))
        return 0


def with_interval(value: float, half_width: float) -> str:
    """`4.1234 ± 0.0210`; a single document has no interval."""
    return (
        f"{value:.4f} ± {half_width:.4f}" if math.isfinite(half_width) else f"{value:.4f} (one document, no interval)"
    )


def load_config(name: str) -> TrainConfig:
    """A preset's training configuration, or the one in a file."""
    if name.endswith(".json"):
        return configs.load(TrainConfig, name)
    return TrainConfig(model=get_preset(name))


def parse(arguments: Sequence[str]) -> Any:
    """The command and its options.

    `train` and `compare` take a preset or a file first, which becomes the default that dotted options override; `train` with
    --resume and neither takes the run directory's own configuration, `compare` the tiny preset.
    """
    arguments = list(arguments)
    base = TrainConfig(model=get_preset("tiny"))
    if arguments and arguments[0] in ("train", "compare") and len(arguments) > 1 and not arguments[1].startswith("-"):
        base = load_config(arguments.pop(1))
    elif arguments[:1] == ["train"]:
        if "--resume" in arguments:
            out = ArgumentParser(add_help=False, allow_abbrev=False)
            out.add_argument("--out", type=Path, default=Train.out)
            base = configs.load(TrainConfig, out.parse_known_args(arguments)[0].out / "config.json")
        elif "--help" not in arguments and "-h" not in arguments:
            raise DataError(
                f"train what? Name a preset ({', '.join(PRESETS)}) or a configuration file: engram-lm train tiny"
            )
    commands = {
        "quickstart": Quickstart,
        "train": Train,
        "eval": Evaluate,
        "generate": Generate,
        "export": Export,
        "compare": Compare,
        "sweep": Sweep,
        "facts": Facts,
        "probe": Probe,
        "needle": Needle,
        "plan": Plan,
        "retrofit": Retrofit,
        "cartridge": Cartridge,
        "count": Count,
        "table": Table,
        "bench": Bench,
    }
    defaults: dict[str, Any] = {"train": Train(base)}
    if arguments[:1] == ["compare"]:
        defaults["compare"] = Compare(CompareConfig(replace(base, keep_checkpoints=1)))
    either: Any = Union[  # noqa: UP007  (of as many as there are)
        tuple(
            Annotated[kind, subcommand(name, default=defaults.get(name, MISSING_NONPROP), prefix_name=False)]
            for name, kind in commands.items()
        )
    ]
    # AvoidSubcommands: a memory or a mixture of experts that the preset has is set by dotted names, like all else
    return tyro.cli(either, prog="engram-lm", description=DESCRIPTION, args=arguments, config=(AvoidSubcommands,))


def main() -> None:
    """Entry point of `engram-lm`."""
    try:
        command = parse(sys.argv[1:])
        if not isinstance(command, Bench):  # which measures others as their users have them
            keep_freed_memory()
        sys.exit(command.run(Console()))
    except EngramError as error:
        Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:  # outside of training, which saves first
        sys.exit(130)
