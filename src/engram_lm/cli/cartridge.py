"""`engram-lm cartridge`: look into trained memories that were saved on their own, check them, publish them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

from rich.console import Console
from tyro.conf import Positional, arg, subcommand

from .table import _bar, _bytes, _say


@dataclass(frozen=True)
class Inspect:
    """Print what a cartridge says about itself: the model and tokenizer it belongs to, its layers and rows."""

    directory: Positional[Path]
    """Cartridge."""

    def run(self, console: Console) -> int:
        """Read, print."""
        _say(console, description(self.directory))
        return 0


@dataclass(frozen=True)
class Verify:
    """Compare every file of a cartridge, and every block of rows, with its checksum. Exit code 1 when anything is damaged."""

    directory: Positional[Path]
    """Cartridge."""

    def run(self, console: Console) -> int:
        """Read everything; what is damaged is an error."""
        from ..hf.cartridge import verify

        with _bar(console, "verifying") as progressed:
            facts = verify(self.directory, progressed)
        _say(console, f"{self.directory}: intact, {facts.rows:,} rows, {facts.rows_written:,} of them written")
        return 0


@dataclass(frozen=True)
class Push:
    """Upload a cartridge to a model repository of the Hugging Face Hub, made if need be. It is verified first."""

    directory: Positional[Path]
    """Cartridge."""
    repo_id: Positional[str]
    """Repository: NAME or OWNER/NAME."""
    private: bool = False
    """Make a new repository private."""
    revision: str = ""
    """Branch, made if need be. Default: the main one."""
    message: str = "Add a cartridge of engram-lm"
    """Of the commit."""

    def run(self, console: Console) -> int:
        """Upload, print the URL."""
        from ..hf.cartridge import push_to_hub

        url = push_to_hub(
            self.directory,
            self.repo_id,
            private=self.private or None,
            revision=self.revision or None,
            commit_message=self.message,
        )
        _say(console, url)
        return 0


Command = Union[  # noqa: UP007  (tyro reads it)
    Annotated[Inspect, subcommand("inspect")],
    Annotated[Verify, subcommand("verify")],
    Annotated[Push, subcommand("push")],
]


@dataclass(frozen=True)
class Cartridge:
    """Look into, check and publish cartridges: trained memories that were saved on their own."""

    command: Annotated[Command, arg(name="")]

    def run(self, console: Console) -> int:
        """Run what was chosen."""
        return self.command.run(console)


def description(directory: Path) -> str:
    """What a cartridge says about itself, and what it takes on disk."""
    from ..hf.cartridge import read

    facts = read(directory)
    status = [path.stat() for path in directory.iterdir()]
    hash, engram = facts.memory.hash, facts.memory.engram
    accumulators = "with" if facts.trainable else "without"
    lines = {
        "model": str(facts.model),
        "layers": ", ".join(map(str, hash.layers)),
        "addresses": f"n-grams of {', '.join(map(str, hash.orders))} tokens, {hash.heads} heads, digest {facts.addresses}",
        "rows": f"{facts.rows:,} of {engram.row_dim} numbers, {facts.rows_written:,} of them written",
        "encoding": f"{facts.encoding}, {accumulators} accumulators; weights {facts.dtype}",
        "tokenizer": facts.tokenizer,
        "size": f"{_bytes(sum(s.st_size for s in status))}, of which {_bytes(512 * sum(s.st_blocks for s in status))} on disk",
        "written by": f"engram-lm {facts.engram_lm}",
    }
    return "\n".join([str(directory), *(f"  {name:<15} {value}" for name, value in lines.items())])
