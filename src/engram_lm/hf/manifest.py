"""What a cartridge says of itself, and whether its files are those that were saved. docs/format.md specifies it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from .. import __version__
from ..config import digest, from_dict
from ..errors import ConfigError, DataError, MismatchError
from ..model.lm import MemoryConfig
from ..tables.file import PIECE, TableFile
from ..tables.journal import journal_path
from ..tables.rows import Encoding
from ..tokens import CanonicalVocabulary
from .decoder import find_decoder, fingerprint

FORMAT = "engram-cartridge/1"
HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
FACTS, WEIGHTS, VOCABULARY, TABLE, CARD = FILES = (
    "cartridge.json",
    "model.safetensors",
    "vocabulary.safetensors",
    "table.safetensors",
    "README.md",
)


@dataclass(frozen=True)
class ModelFacts:
    """The model that a memory was trained on."""

    name: str  # on the Hub; "" for one that has only a path
    model_type: str
    architecture: str  # class of the decoder
    hidden_size: int
    layers: int
    vocab_size: int
    fingerprint: str  # of its weights

    @staticmethod
    def of(model: nn.Module) -> ModelFacts:
        """What a model says of itself, adapters and memories left out."""
        decoder, name = find_decoder(model), str(getattr(model, "name_or_path", ""))
        config: Any = decoder.stack.config
        public = re.fullmatch(HUB_ID, name) and not Path(name).exists()
        return ModelFacts(
            name=name if public else "",  # where it lies on its maker's disk is nobody's business
            model_type=config.model_type,
            architecture=type(decoder.stack).__name__,
            hidden_size=decoder.dim,
            layers=len(decoder.layers),
            vocab_size=config.vocab_size,
            fingerprint=fingerprint(model),
        )

    def __str__(self) -> str:
        name = self.name or self.architecture
        return f"{name} ({self.layers} layers of {self.hidden_size}, {self.vocab_size:,} tokens, weights {self.fingerprint})"


@dataclass(frozen=True)
class Checksums:
    """SHA-256 of the files; of the table up to its rows, which the checksums of its blocks lie in front of."""

    weights: str
    vocabulary: str
    table: str


@dataclass(frozen=True)
class Facts:
    """What cartridge.json says."""

    format: str
    engram_lm: str  # version that wrote it
    model: ModelFacts
    memory: MemoryConfig
    tokenizer: str  # digest
    vocabulary: str  # digest of the canonical ids
    addresses: str  # digest of vocabulary and plan
    rows: int
    rows_written: int
    encoding: Encoding
    trainable: bool  # whether rows have their accumulators
    dtype: str  # of the weights
    checksums: Checksums
    digest: str = ""  # of all this, as written with an empty one


def tokenizer_digest(tokenizer: Any) -> str:
    """Sixteen hex digits of how a fast tokenizer cuts texts and numbers the pieces; how it pads, truncates and frames them
    may change from call to call and does not count."""
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"expected a fast tokenizer (tokenizers.Tokenizer or one that wraps it), got {tokenizer!r}")
    said = json.loads(tokenizer.to_str())
    kept = {key: said[key] for key in said.keys() - {"padding", "truncation", "post_processor"}}
    return digest(kept)


# --- reading --------------------------------------------------------------------------------------------------------


def read(directory: Path | str) -> Facts:
    """What a cartridge says of itself. Only cartridge.json is read; the other files must be there.

    Raises DataError for what is no cartridge, or one that is incomplete or altered, and MismatchError for a newer format.
    """
    directory = Path(directory)
    path = directory / FACTS
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        old = directory.with_name(f"{directory.name}.old")
        hint = f" A save was killed while it took the place of {old}: rename that." if (old / FACTS).exists() else ""
        raise DataError(f"{directory}: no cartridge, for there is no {FACTS} in it.{hint}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise DataError(f"{path}: damaged, it is no JSON any more ({error}).") from None
    version = str(said.get("format", "")) if isinstance(said, dict) else ""
    if not version.startswith(FORMAT.split("/")[0]):
        raise DataError(f"{path}: does not say that it is a cartridge's, of format {FORMAT}.")
    if version != FORMAT:
        raise MismatchError(
            f"{path}: has format {version}, this version of engram-lm ({__version__}) reads {FORMAT}: it was written by "
            f"engram-lm {said.get('engram_lm', 'of another version')}."
        )
    try:
        facts = from_dict(Facts, said)
    except ConfigError as error:
        raise DataError(f"{path}: altered or damaged ({error})") from None
    if facts.digest != digest(replace(facts, digest="")):
        raise DataError(
            f"{path}: altered or damaged, its digest differs; the memory might have been fused another way."
        )
    for name in (WEIGHTS, VOCABULARY, TABLE):
        if not (directory / name).is_file():
            raise DataError(f"{directory}: incomplete, there is no {name} in it.")
    return facts


def verify(directory: Path | str, progress: Callable[[int, int], None] = lambda done, total: None) -> Facts:
    """Read a cartridge completely, every block of rows included, and return what it says of itself.

    progress: called with the number of blocks that are done, and of all.

    Raises DataError for whatever is damaged, and what `read` raises.
    """
    directory, facts = Path(directory), read(directory)
    read_weights(directory, facts)
    read_vocabulary(directory, facts)
    with open_table(directory, facts) as file:
        if damaged := file.verify(progress):
            raise DataError(
                f"{file.path}: {len(damaged):,} of {file.num_blocks:,} blocks are damaged, the first of them {damaged[0]}."
            )
    return facts


def _tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    """The tensors of a file, from the very bytes that were compared with its checksum."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    if hashlib.sha256(data).hexdigest() != checksum:
        raise DataError(f"{path}: truncated, altered, or of another cartridge: its checksum is not the one in {FACTS}.")
    return safetensors.torch.load(data)


def read_weights(directory: Path, facts: Facts) -> dict[str, Tensor]:
    """Parameters by name. Raises DataError when they are not those that were saved."""
    return _tensors(directory / WEIGHTS, facts.checksums.weights)


def read_vocabulary(directory: Path, facts: Facts) -> CanonicalVocabulary:
    """Canonical ids of the tokens. Raises DataError when they are not those that were saved."""
    canonical = _tensors(directory / VOCABULARY, facts.checksums.vocabulary)["lookup"]
    return CanonicalVocabulary(canonical.to(torch.int64).numpy())


def open_table(directory: Path, facts: Facts) -> TableFile:
    """The table's file, open for reading, all checked but its rows."""
    file = TableFile.open(directory / TABLE, digest=facts.addresses)
    try:
        if head_checksum(file) != facts.checksums.table:
            raise DataError(
                f"{file.path}: altered, or the table of another cartridge: other rows would have been read."
            )
        if lost := _lost(file):
            raise DataError(
                f"{file.path}: incomplete, {lost:,} blocks of rows are holes: they would have read as zeros."
            )
        if journal_path(file).exists():
            raise DataError(
                f"{journal_path(file)}: the cartridge's own table was trained, so its rows are no longer those that were "
                "saved. Remove the journal to have them back."
            )
    except BaseException:
        file.close()
        raise
    return file


def _lost(file: TableFile) -> int:
    """Blocks that have a checksum and no bytes, as in a copy or download that was cut short after the file was allocated."""
    kept = np.zeros(file.num_blocks, np.bool_)
    for numbers in file.written():
        kept[numbers] = True
    return int(np.count_nonzero(file.checksums(0, file.num_blocks)[~kept]))


def head_checksum(file: TableFile) -> str:
    """SHA-256 of a table file up to its rows: of its header, its clock, and the checksums of all blocks."""
    sha = hashlib.sha256()
    for first in range(0, file.rows_offset, PIECE):
        sha.update(os.pread(file.descriptor, min(PIECE, file.rows_offset - first), first))
    return sha.hexdigest()


def card_text(facts: Facts, name: str, given: dict[str, Any]) -> str:
    """The model card: front matter as the Hub reads it, what the cartridge is, and how to use it."""
    from huggingface_hub import ModelCardData

    fields = {"library_name": "engram-lm", "pipeline_tag": "text-generation"} | given
    if facts.model.name:
        fields = {"base_model": facts.model.name, "base_model_relation": "adapter"} | fields
    fields["tags"] = list(dict.fromkeys(["engram", "conditional-memory", *given.get("tags", [])]))
    base = fields.get("base_model", "BASE_MODEL")
    hash, engram = facts.memory.hash, facts.memory.engram
    model = f"[{base}](https://huggingface.co/{base})" if facts.model.name else facts.model.architecture
    return f"""---
{ModelCardData(**fields).to_yaml()}
---

# {name}

A trained memory for {model} as a cartridge of engram-lm: mounted on that model, it adds what it has learned in front of the
layers {", ".join(map(str, hash.layers))}; unmounted, the model is as before, bit for bit.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm.hf.cartridge import mount, unmount

model = AutoModelForCausalLM.from_pretrained("{base}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
memory = mount(model, "THIS_DIRECTORY_OR_REPOSITORY", tokenizer=tokenizer)
```

| | |
|---|---|
| model | {facts.model} |
| rows | {facts.rows:,} of {engram.row_dim} numbers ({facts.encoding}), {facts.rows_written:,} of them written |
| addresses | n-grams of {", ".join(map(str, hash.orders))} tokens, {hash.heads} heads, digest {facts.addresses} |
| tokenizer | {facts.tokenizer} |
| written by | engram-lm {facts.engram_lm} |
"""
