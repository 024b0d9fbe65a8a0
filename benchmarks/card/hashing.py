"""Ids a second, of V4.1's plan: three orders, eight heads, two layers."""

from __future__ import annotations

import torch

from engram_lm.hashing import HashConfig, HashPlan, hash_ngrams, reference_hash_ngrams

from .bench import Bench
from .samples import at_least
from .timing import compare

VOCABULARY = 99_092  # canonical ids of V4.1's tokenizer


def run(bench: Bench) -> None:
    """Of a training batch, of a long text, and of a decoding step with its histories."""
    plan = HashPlan.build(HashConfig.deepseek_v41(), vocab_size=VOCABULARY, pad=2)
    each = len(plan.layers) * len(plan.orders) * plan.heads
    for what, shape, bar in (
        ("8192 tokens", bench.size((4, 2048), (2, 8)), at_least(1.0)),
        ("256 k tokens", bench.size((64, 4096), (2, 16)), None),
        ("512 tokens of a decoding step", bench.size((512, 1), (4, 1)), None),
    ):
        texts = [bench.integers(VOCABULARY, *shape) for _ in range(8)]
        _, history = hash_ngrams(plan, bench.integers(VOCABULARY, shape[0], 4))
        same = (torch.equal(got.cpu(), want) for got, want in zip(*both(plan, texts[0], history), strict=True))
        bench.check(f"{what}: ids and history are the truth's, bit for bit", all(same))
        times = compare(
            bench, {"": lambda turn, texts=texts, past=history: hash_ngrams(plan, texts[turn % 8], history=past)}
        )[""]
        bench.figure(what, times.rate(texts[0].numel() * each / 1e9), "G ids/s", bar=bar)


def both(plan, text, history):
    """What the kernel gives, and the truth."""
    truth = reference_hash_ngrams(plan, text.cpu(), history=history.cpu())
    return hash_ngrams(plan, text, history=history), truth
