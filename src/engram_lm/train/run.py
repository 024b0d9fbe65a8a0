"""From text to a run directory, and from a run directory back to a model.

DIRECTORY/
  tokenizer.json   shards/         the text's tokenizer and tokens (here or above, shared by sibling runs)
  config.json      metrics.jsonl   everything needed to run it again; a line a step or evaluation
  checkpoints/step-000400/         model, optimizer, table; their facts and checksums
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .. import config as configs
from ..errors import CheckpointError, DataError, MismatchError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup, address_digest, build_plan, build_vocabulary
from ..tables import Table, build_table
from ..tables.pieces import load_table
from ..tables.sharded import build_sharded
from . import checkpoint as checkpoints
from .loop import TrainConfig, choose_device, explain_mismatch
from .ranks import Ranks
from .shards import TokenData, open_shards, write_shards
from .sources import read_documents
from .tokenizer import id_limit, load_tokenizer, tokenizer_digest, train_tokenizer


def prepare_text(
    source: str,
    directory: Path,
    *,
    tokenizer: str = "",
    vocab_size: int = 4096,
    held_out: float = 0.05,
    say: Callable[[str], None] = print,
    ranks: Ranks | None = None,
) -> tuple[TokenData, Tokenizer]:
    """Tokenizer and token shards of a text source in `directory`, made unless an earlier start left them there.

    tokenizer: a file, directory or hub name; "" trains a byte-level BPE of `vocab_size` on every fourth document. ranks: all that
    will use it; one of them prepares it, the others wait and open it.
    Raises DataError when `directory` holds the tokens of another source, MismatchError when another tokenizer made them.
    """

    def prepare() -> tuple[TokenData, Tokenizer]:
        return _prepare(source, directory, tokenizer, vocab_size, held_out, say)

    def alone() -> tuple[TokenData, Tokenizer]:
        with checkpoints.claim(directory):
            return prepare()

    return (ranks or Ranks()).first(alone) or prepare()


def _prepare(
    source: str, directory: Path, tokenizer: str, vocab_size: int, held_out: float, say: Callable[[str], None]
) -> tuple[TokenData, Tokenizer]:
    kept = directory / "tokenizer.json"
    if kept.exists() and (directory / "shards" / "meta.json").exists():
        found = load_tokenizer(kept)
        data = open_shards(directory / "shards", tokenizer_digest(found))
        if source and data.meta.source != source:
            raise DataError(
                f"{directory} holds the tokens of {data.meta.source}, not of {source}; choose another --out."
            )
        if tokenizer and tokenizer_digest(load_tokenizer(tokenizer)) != data.meta.tokenizer:
            raise MismatchError(
                f"{directory} holds tokens of another tokenizer than {tokenizer}; choose another --out."
            )
        return data, found
    if not source:
        raise DataError(f"{directory} holds no text yet: name a source with --data.")
    if tokenizer:
        found = load_tokenizer(tokenizer)
    else:
        say(f"Training a tokenizer of {vocab_size:,} tokens on {source}")
        few = list(islice(read_documents(source), 0, None, 4))
        found = train_tokenizer((document.text for document in few), vocab_size)
    skipped: list[str] = []
    say(f"Tokenizing {source}")
    data = write_shards(read_documents(source, skipped), found, directory / "shards", source=source, held_out=held_out)
    if skipped:
        say(f"Skipped {len(skipped)} files without usable text, the first: {skipped[0]}")
    checkpoints.write_whole(kept, found.to_str(pretty=True))
    return data, found


def build_lookup(
    config: TrainConfig, tokenizer: Tokenizer, directory: Path, *, write: bool = True, ranks: Ranks | None = None
) -> Lookup | None:
    """Vocabulary, plan and table of a run in `directory`; None for a model without a memory.

    The table is empty, or a file that is there already; `write` opens that to be trained. ranks: all that the rows are divided
    among.
    """
    memory = config.model.memory
    if memory is None:
        return None
    vocabulary = build_vocabulary(memory.hash, tokenizer)
    plan = build_plan(memory.hash, vocabulary)
    build: Callable[..., Table] = partial(build_table, write=write)
    if ranks and ranks.group is not None:
        build = partial(build_sharded, group=ranks.group)
    table = build(
        config.table,
        plan.num_rows,
        memory.engram.row_dim,
        digest=address_digest(vocabulary, plan),
        directory=directory,
        device=choose_device(config.device),
    )
    return Lookup(vocabulary, plan, table, shuffled=memory.hash.scheme == "shuffled")


def fit_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The configuration with an embedding row for every token id."""
    return replace(config, model=replace(config.model, vocab_size=id_limit(tokenizer)))


@dataclass(frozen=True)
class TrainedModel:
    """A model as its newest checkpoint left it, ready to evaluate or generate."""

    config: TrainConfig
    model: LanguageModel
    lookup: Lookup | None
    tokenizer: Tokenizer
    device: torch.device
    step: int


def load_run(directory: Path, device: str = "auto") -> TrainedModel:
    """Load a run directory's newest checkpoint.

    Raises CheckpointError when there is none or it is damaged, and MismatchError when the tokenizer beside it is another one
    or sends n-grams to other rows.
    """
    newest = checkpoints.latest(directory / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"{directory} holds no checkpoint: it is not a run directory, or the run has not saved one yet."
        )
    saved = checkpoints.Checkpoint(newest)
    config = configs.from_dict(TrainConfig, saved.facts["config"], str(newest))
    path = beside(directory, "tokenizer.json")
    if not path.exists():
        raise CheckpointError(
            f"{directory} holds a run without a tokenizer.json: its tokens could not be told from text."
        )
    tokenizer = load_tokenizer(path)
    if saved.facts.get("tokenizer_digest") not in (None, tokenizer_digest(tokenizer)):
        raise MismatchError(
            f"{newest} was trained with tokenizer {saved.facts.get('tokenizer_digest')}, the one beside it is "
            f"{tokenizer_digest(tokenizer)}: every token would mean another string."
        )
    where = choose_device(device)
    model = LanguageModel.build(config.model, device=where)
    model.load_state_dict(saved.part("model"))
    table = config.table
    if table.tier == "disk" and any(newest.glob("table-*-of-*")):  # several files: read into memory as one
        table = replace(table, tier="host", file="")
    lookup = build_lookup(replace(config, device=str(where), table=table), tokenizer, directory, write=False)
    if lookup:
        if saved.facts["address_digest"] != lookup.digest:
            raise MismatchError(
                f"{newest}: {explain_mismatch('address_digest', saved.facts['address_digest'], lookup.digest)}"
            )
        load_table(lookup.table, newest, saved.facts["table_clock"])
    return TrainedModel(config, model.eval(), lookup, tokenizer, where, int(saved.facts["step"]))


def beside(directory: Path, name: str) -> Path:
    """A file of a run: in its own directory or, shared with sibling runs, up to three above; where it would be if nowhere."""
    shared = [folder / name for folder in (directory, *list(directory.absolute().parents)[:3])]
    return next((path for path in shared if path.exists()), shared[1])
