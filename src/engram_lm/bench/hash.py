"""Hashing: DeepSeek-V4.1's layout, 2 memory layers x 24 ids a token, on canonical ids as its vocabulary has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..hashing import HashConfig, HashPlan, hash_ngrams, reference_hash_ngrams
from . import peers
from .measure import Contender, Meter
from .results import Results

VOCAB_SIZE = 99_092  # canonical ids of DeepSeek-V4.1's tokenizer
LENGTH = 1024


def bench_hash(*, tokens: Sequence[int] = (16_384, 65_536), rounds: int = 25) -> Results:
    """Tokens hashed a second, in calls of so many `tokens` (random ones; sequences of 1024)."""
    config = HashConfig.deepseek_v41()
    plan = HashPlan.build(config, vocab_size=VOCAB_SIZE, pad=config.pad_id)
    meter = Meter("hash", rounds)
    theirs = peers.engram_peft_hash(config, VOCAB_SIZE, meter.left_out)

    def true(ids: Tensor | np.ndarray, canonical: Tensor) -> bool:
        return bool((torch.as_tensor(ids) == reference_hash_ngrams(plan, canonical)[0]).all())

    def in_range(ids: dict[int, np.ndarray], canonical: Tensor) -> bool:
        """Theirs are other n-grams; of the shape and the heads they are."""
        return all(
            ids[layer].shape == (*canonical.shape, config.rows_per_token) and bool((ids[layer] < sizes).all())
            for layer, sizes in zip(plan.layers, plan.sizes, strict=True)
        )

    for count in tokens:
        shape = (max(1, count // LENGTH), min(count, LENGTH))

        def some(shape: tuple[int, int] = shape) -> tuple[Tensor]:
            return (torch.randint(VOCAB_SIZE, shape),)

        contenders = [
            Contender("engram-lm", lambda canonical: hash_ngrams(plan, canonical)[0], true, some),
            Contender(
                "engram-lm, the slow truth", lambda canonical: reference_hash_ngrams(plan, canonical)[0], true, some
            ),
            Contender(
                "numpy, the demo's form",
                lambda canonical: peers.numpy_hash(plan, canonical.numpy()),
                true,
                some,
                "the published demo's algorithm, written from its description",
            ),
        ]
        if theirs is not None:
            note = "1.2.7; n-grams of its own, by design, but of the same layers, orders and primes; without heads' offsets"
            contenders.append(Contender("engram-peft", theirs, in_range, some, note))
        meter.measure(f"{count:,} tokens a call", contenders, unit="tokens", work=shape[0] * shape[1], awake=True)
    return meter.results()
