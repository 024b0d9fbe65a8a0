"""Three arms on the same batches of a directory's text: no memory, a memory of one row (the control), a memory.

python examples/train_tiny.py [DIRECTORY]        default: the source of Python's asyncio

Twenty steps show how the parts fit together. They are too few to show what a memory does: that is `engram-lm quickstart`.
"""

import asyncio
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from engram_lm.evaluate.controls import DESCRIPTIONS, model_of_arm
from engram_lm.evaluate.loss import bytes_of_tokens, difference, measure
from engram_lm.model import get_preset
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.loader import Loader, windows
from engram_lm.train.loop import TrainConfig, Training, train_together
from engram_lm.train.run import build_lookup, fit_vocabulary, prepare_text

STEPS, BATCH, LENGTH = 20, 8, 128

source = sys.argv[1] if len(sys.argv) > 1 else str(Path(asyncio.__file__).parent)
keep_freed_memory()  # a third of the step's time on a CPU with glibc
preset = replace(get_preset("tiny"), vocab_size=2048)

with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch)
    data, tokenizer = prepare_text(source, out, vocab_size=preset.vocab_size, held_out=0.15)

    runs = {}
    for arm in ("base", "capacity_1", "engram"):
        model = model_of_arm(preset, arm)
        config = TrainConfig(model, steps=STEPS, batch_size=BATCH, length=LENGTH, eval_every=0, checkpoint_every=0)
        config = fit_vocabulary(config, tokenizer)
        lookup = build_lookup(config, tokenizer, out / arm)  # vocabulary, plan and table; None for the base arm
        runs[arm] = Training(config, out / arm, Loader(data.train, BATCH, LENGTH), lookup)
    train_together(runs)

    sizes = bytes_of_tokens(tokenizer)
    losses = {arm: measure(run.model, run.lookup, windows(data.val, BATCH, LENGTH), sizes) for arm, run in runs.items()}
    for arm, loss in losses.items():
        over, interval = difference(loss, losses["base"])
        print(f"{arm}: {DESCRIPTIONS[arm]}")
        print(f"    held-out loss {loss.mean:.3f} nats a token, {over:+.3f} ± {interval:.3f} over base")
