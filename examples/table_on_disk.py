"""Train a memory whose table is a file, be killed on the way, go on, then serve it from a read-only file of small rows.

    python examples/table_on_disk.py [TEXT]

The table is a sparse file of 20 M rows: it takes disk space only where rows were written. Less than a minute on two cores.
"""

import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from engram_lm.generate import generate
from engram_lm.model.lookup import Lookup
from engram_lm.model.presets import get_preset
from engram_lm.tables import DiskTable, TableConfig
from engram_lm.tables.file import TableFile
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.loader import Loader
from engram_lm.train.loop import TrainConfig, Training, train
from engram_lm.train.run import build_lookup, fit_vocabulary, load_run, prepare_text
from engram_lm.train.sources import standard_library
from engram_lm.train.tokenizer import tokenizer_digest

source = sys.argv[1] if len(sys.argv) > 1 else str(Path(standard_library()) / "email")
keep_freed_memory()


def resume(directory: Path) -> Training:
    """The run in `directory`, begun or gone on with."""
    data, tokenizer = prepare_text(source, directory, vocab_size=2048, held_out=0.15)
    tiny = get_preset("tiny")
    memory = replace(tiny.memory, hash=tiny.memory.hash.sized(rows=20_000_000))
    config = TrainConfig(
        replace(tiny, memory=memory),
        steps=40,
        batch_size=8,
        length=128,
        eval_every=0,
        checkpoint_every=10,
        table=TableConfig("disk", "bf16", memory=0.1),  # 100 MB of RAM for hot rows
    )
    config = fit_vocabulary(config, tokenizer)
    lookup = build_lookup(config, tokenizer, directory)
    batches = Loader(data.train, config.batch_size, config.length)
    facts = {"tokenizer_digest": tokenizer_digest(tokenizer)}
    return Training(config, directory, batches, lookup, facts=facts, resume=True)
