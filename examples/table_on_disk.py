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


def size_on_disk(path: Path) -> str:
    """What a file says and what it takes."""
    return f"{path.name}: {path.stat().st_size / 1e6:,.0f} MB long, {path.stat().st_blocks * 512 / 1e6:,.1f} MB on disk"


if sys.argv[-2:-1] == ["--in"]:  # the process that will be killed
    train(resume(Path(sys.argv[-1])))
    sys.exit()

with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch)
    victim = subprocess.Popen([sys.executable, __file__, source, "--in", str(out)])
    while not (out / "checkpoints" / "step-000020").exists():
        if victim.poll() is not None:
            sys.exit("The first process ended before it could be killed.")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    print("\nKilled after 20 steps. A new process goes on from its last checkpoint, to the bit:")
    run = resume(out)
    train(run)
    run.lookup.table.close()
    print(size_on_disk(out / "table.safetensors"))
    print(size_on_disk(out / "table.safetensors.journal"))

    trained = out / "table.safetensors"
    served = out / "served.safetensors"
    convert = ["-m", "engram_lm", "table", "convert", trained, served, "--encoding", "int8", "--serving"]
    subprocess.run([sys.executable, *convert], check=True)
    print(size_on_disk(served))
    loaded = load_run(out)
    lookup = loaded.lookup
    with torch.no_grad():
        prompt = torch.tensor([loaded.tokenizer.encode("import ").ids])
        before = generate(loaded.model, lookup, prompt, 24)
        table = DiskTable(served, memory=20_000_000)  # read-only, 20 MB of RAM for hot rows
        served_by = Lookup(lookup.vocabulary, lookup.plan, table)
        after = generate(loaded.model, served_by, prompt, 24)
    print(f"Served from disk, rows in int8: {loaded.tokenizer.decode(after[0].tolist())!r}")
    print(f"The same text as with the rows that were trained: {torch.equal(before, after)}")
    counts = table.store.counts
    print(f"{counts.hits + counts.misses} distinct rows were asked for, {counts.hit_rate:.0%} of them were in RAM")
    table.close()
