"""Cartridges: a trained memory in a directory of its own, for the model that it was trained on. docs/format.md specifies it.

    save(model, "facts", tokenizer)               # the memory that is on the model
    mount(fresh, "facts", tokenizer=tokenizer)    # on the same model elsewhere; a Hub id does as well
    unmount(fresh, "facts")                       # and it is as before, bit for bit

Logits are those from before `save`, bit for bit, wherever the rows live. What would make a memory silently wrong is
refused: other weights, another tokenizer, a file that was altered or belongs to another cartridge.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import __version__
from ..config import digest, to_json
from ..errors import CheckpointError, ConfigError, MismatchError
from ..model.lm import MemoryConfig
from ..model.lookup import Lookup, build_plan
from ..tables import DeviceTable, DiskTable, Table, TableConfig
from ..tables.copied import copy_table, write_table
from ..tables.file import sync
from ..tables.records import Newest, ever_written
from ..tables.rows import Encoding, RowFormat
from ..tables.tiers import host_table
from ..tokens import CanonicalVocabulary
from ..train.checkpoint import checksum
from .attach import Memory, _require_place, detach, mounted, place
from .decoder import find_decoder
from .hub import fetch, upload
from .manifest import (
    CARD,
    FACTS,
    FILES,
    FORMAT,
    TABLE,
    VOCABULARY,
    WEIGHTS,
    Checksums,
    Facts,
    ModelFacts,
    card_text,
    head_checksum,
    open_table,
    read,
    read_vocabulary,
    read_weights,
    tokenizer_digest,
    verify,
)

__all__ = ["mount", "push_to_hub", "read", "save", "unmount", "verify"]

# --- saving ---------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    directory: Path | str,
    tokenizer: Any,
    *,
    name: str | None = None,
    encoding: Encoding | None = None,
    serving: bool = False,
    card: dict[str, Any] | None = None,
) -> Path:
    """Write a memory that is on a model as a cartridge: whole or not at all; one that was there is replaced.

    tokenizer: the model's, with which the memory was attached. name: which memory, where there are several. encoding: of
    the rows, theirs by default; in another one they are rounded to the nearest. serving: leave out the accumulators, so
    that the cartridge cannot be trained further; where rows start at random, all of them are written and rounded then. card: fields of the model card, such as license, language or tags.

    A table on disk gives its newest rows and commits its journal.

    Raises:
        ConfigError: when there is no such memory, or no telling which.
        MismatchError: when the tokenizer folds into another vocabulary than the memory's; when adapters are in the memory.
        DataError: when a block of a table on disk is damaged.
        CheckpointError: when it cannot be written, or the directory holds other files, which would have been lost.
    """
    directory, memory = Path(directory).resolve(), _the_memory(model, name)
    lookup, weights = memory.lookup, _weights(memory, find_decoder(model).dim)
    folded = memory.config.hash.scheme != "ple"
    if folded and CanonicalVocabulary.from_tokenizer(tokenizer).digest != lookup.vocabulary.digest:
        raise MismatchError(
            f"the tokenizer is not the one that the memory {memory.name!r} was attached with: the cartridge would have been "
            "refused with the right one, and mounted with this."
        )
    with _replacing(directory) as partial:
        safetensors.torch.save_file(weights, partial / WEIGHTS)
        canonical = torch.from_numpy(lookup.vocabulary.lookup).to(torch.int32)
        safetensors.torch.save_file({"lookup": canonical}, partial / VOCABULARY)
        with copy_table(lookup.table, partial / TABLE, encoding=encoding, serving=serving) as table:
            facts = Facts(
                format=FORMAT,
                engram_lm=__version__,
                model=ModelFacts.of(model),
                memory=memory.config,
                tokenizer=tokenizer_digest(tokenizer),
                vocabulary=lookup.vocabulary.digest,
                addresses=lookup.digest,
                rows=table.num_rows,
                rows_written=sum(int(ever_written(records).sum()) for _, records in Newest(table).written()),
                encoding=table.form.encoding,
                trainable=table.form.trainable,
                dtype=str(next(iter(weights.values())).dtype).removeprefix("torch."),
                checksums=Checksums(
                    weights=checksum(partial / WEIGHTS),
                    vocabulary=checksum(partial / VOCABULARY),
                    table=head_checksum(table),
                ),
            )
        facts = replace(facts, digest=digest(facts))
        (partial / FACTS).write_text(to_json(facts), encoding="utf-8")
        (partial / CARD).write_text(card_text(facts, directory.name, card or {}), encoding="utf-8")
    return directory


def _the_memory(model: nn.Module, name: str | None) -> Memory:
    there = mounted(model)
    if name is None and len(there) == 1:
        return next(iter(there.values()))
    if name not in there:
        which = "name one of them" if name is None else f"none is called {name!r}"
        raise ConfigError(f"the model has the memories {', '.join(there) or '(none)'}: {which}.")
    return there[name]


def _weights(memory: Memory, dim: int) -> dict[str, Tensor]:
    """Parameters of the Engrams, without anything that was wrapped around them."""
    weights = {key: value.detach().cpu().contiguous() for key, value in memory.state_dict().items()}
    plain = _blank(memory.name, memory.config, memory.lookup, dim).state_dict()
    if weights.keys() != plain.keys():
        others = ", ".join(sorted(weights.keys() ^ plain.keys())[:3])
        raise MismatchError(
            f"the memory {memory.name!r} has other parameters than a memory has ({others}): adapters in it would have been "
            "lost. Merge them first, or keep them out of it (peft: target_modules)."
        )
    return weights


def _blank(name: str, config: MemoryConfig, lookup: Lookup, dim: int) -> Memory:
    """A memory whose parameters have shapes and no numbers, so none are drawn."""
    with torch.device("meta"):
        return Memory(name, config, lookup, dim)


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A directory to fill, which then takes the place of `directory`; when anything fails, all is as before.

    A kill leaves NAME.partial behind or, between the two renames, the old cartridge as NAME.old and none under its name.
    """
    partial, old = (directory.with_name(f"{directory.name}.{end}") for end in ("partial", "old"))
    try:
        if others := {path.name for path in directory.iterdir()} - set(FILES) if directory.exists() else set():
            raise CheckpointError(f"it holds {', '.join(sorted(others)[:3])}, which would have been lost")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        _exchange(directory, partial, old)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(
            f"{directory}: no cartridge can be written there ({error}). What was there is intact."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(directory: Path, partial: Path, old: Path) -> None:
    """Rename `partial` to `directory`, whose files are gone then."""
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    try:
        partial.rename(directory)
        sync(directory.parent)
    except OSError:
        if old.exists():
            shutil.rmtree(directory, ignore_errors=True)
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


# --- mounting -------------------------------------------------------------------------------------------------------


def mount(
    model: nn.Module,
    source: Path | str,
    *,
    tokenizer: Any = None,
    name: str | None = None,
    table: TableConfig | None = None,
    trainable: bool = False,
    strict: bool = True,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> Memory:
    """Put a cartridge on the model that it was trained for; several may be on it at once.

    source: a directory, or a model id of the Hub, of which `revision`, `token`, `cache_dir` and `local_files_only` say how to
    get it. tokenizer: the model's, to be compared with the one of training; without one only sizes are. name: what the memory
    is called, the source's last part by default. table: the tier and its memory; on tier disk rows are read from the
    cartridge itself, and hardly any RAM is taken. trainable: go on training it; the cartridge stays as it is, so tier
    disk wants a `table.file` to copy its rows to. strict: refuse other weights, not just another shape.

    Raises:
        DataError: when there is no cartridge, or a file of it is missing, altered or damaged. Rows on tier disk are not
            read for that: `verify` does.
        MismatchError: for another model or tokenizer, and for a newer format.
        ConfigError: for a name that is taken, and for settings of the table that are the cartridge's own.
    """
    directory = fetch(
        source, FILES, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    facts = read(directory)
    _require_model(facts, model, strict)
    if tokenizer is not None and (found := tokenizer_digest(tokenizer)) != facts.tokenizer:
        raise MismatchError(
            f"the cartridge was trained with the tokenizer {facts.tokenizer}, this one is {found}: other tokens would have "
            "addressed its rows, and it would have answered for other words."
        )
    name = name or Path(source).resolve().name.replace(".", "-")
    _require_place(model, name, facts.memory)
    vocabulary = read_vocabulary(directory, facts)
    weights = read_weights(directory, facts)
    decoder = find_decoder(model)
    rows = _mounted_table(directory, facts, table or TableConfig(), trainable, next(decoder.stack.parameters()).device)
    try:
        lookup = Lookup(vocabulary, build_plan(facts.memory.hash, vocabulary), rows)
        memory = _blank(name, facts.memory, lookup, decoder.dim)
        memory.load_state_dict(weights, assign=True)
        memory.train_rows = trainable
        memory.requires_grad_(trainable)
        return place(model, memory)
    except BaseException:
        rows.close()
        raise


def unmount(model: nn.Module, name: str | None = None) -> None:
    """Take a memory, or all of them, off a model, which is then exactly as it was, and release the table.

    What was trained and not saved is lost. Raises ConfigError when there is none of that name.
    """
    for memory in detach(model, name):
        memory.lookup.table.close()


def _require_model(facts: Facts, model: nn.Module, strict: bool) -> None:
    """Raise MismatchError unless the memory belongs to the model."""
    expected, found = facts.model, ModelFacts.of(model)
    sizes = [
        size for size in ("hidden_size", "layers", "vocab_size") if getattr(expected, size) != getattr(found, size)
    ]
    if sizes:
        raise MismatchError(
            f"the cartridge was trained on {expected}, this model is {found}: they differ in {', '.join(sizes)}, so what it "
            "adds would have meant nothing here, or not fit at all."
        )
    if strict and expected.fingerprint != found.fingerprint:
        raise MismatchError(
            f"the cartridge was trained on {expected}, this model is {found}: what it adds fits the hidden states of those "
            "weights, and would have misled these. strict=False mounts it on any model of the same shape."
        )


def _mounted_table(directory: Path, facts: Facts, config: TableConfig, trainable: bool, device: torch.device) -> Table:
    """The cartridge's rows on the tier that is asked for."""
    tier = config.tier if config.tier != "auto" else "device" if device.type == "cuda" else "host"
    path = directory / TABLE
    with open_table(directory, facts) as file:
        form, clock = file.form, file.clock
        _require_settings(config, form, trainable and tier == "disk")
        if trainable and not form.trainable:
            raise ConfigError(
                f"{path}: was saved for serving, without accumulators: its rows cannot be trained. Mount it without trainable."
            )
        if config.file:
            path = Path(config.file)
            write_table(Newest(file), path, form, digest=file.digest, clock=clock).close()
    if tier == "disk":
        memory, journal = int(config.memory * 1e9), int(config.journal * 1e9)
        return DiskTable(
            path, write=trainable, memory=memory, journal=journal, device=device, asynchronous=config.asynchronous
        )
    table = (
        DeviceTable(facts.rows, form, device)
        if tier == "device"
        else host_table(facts.rows, form, device, asynchronous=config.asynchronous)
    )
    table.bind(facts.addresses, facts.rows)
    table.load(directory, clock)
    return table


def _require_settings(config: TableConfig, form: RowFormat, trained_on_disk: bool) -> None:
    """Raise ConfigError for settings that a cartridge decides itself, and for training its own file."""
    for name in ("encoding", "std", "seed"):
        given, own = getattr(config, name), getattr(form, name)
        if given not in (getattr(TableConfig, name), own):
            raise ConfigError(
                f"table.{name} is {given!r}, but the cartridge's rows have {own!r}: it would have been ignored. `save` writes "
                "a cartridge in another encoding."
            )
    if trained_on_disk and not config.file:
        raise ConfigError(
            "training on tier disk would change the cartridge itself: give a table.file, which its rows are copied to."
        )
    if config.file and not trained_on_disk:
        raise ConfigError(
            f"table.file {config.file!r} would have been ignored: rows are read from the cartridge's own file, and copied to "
            "another one only to be trained on tier disk."
        )


# --- the Hub --------------------------------------------------------------------------------------------------------


def push_to_hub(
    directory: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Add a cartridge of engram-lm",
) -> str:
    """Upload a cartridge to a model repository of the Hub, made if need be; returns its URL.

    revision: branch, made if need be; the main one by default. Rows that were never written take space there.

    Raises what `verify` raises for a damaged cartridge, which is not uploaded, and CheckpointError when the Hub refuses.
    """
    verify(directory)
    return upload(directory, FILES, repo_id, private=private, token=token, revision=revision, message=commit_message)
