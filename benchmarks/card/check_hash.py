"""Addresses: the truth's bits in every layout."""

from __future__ import annotations

from itertools import product

import torch

from engram_lm.hashing import HashConfig, HashPlan, hash_ngrams, reference_hash_ngrams

from .bench import Bench
from .equal import deterministic, same

VOCABULARY, PAD = 99_092, 2


def layouts(bench: Bench) -> dict[str, HashConfig]:
    few = HashConfig(orders=(1, 3), heads=3, rows_per_head=97, layers=(0, 2, 5))
    published = {"paper": HashConfig.paper(), "v41": HashConfig.deepseek_v41(), "ple": HashConfig.qwen_ple(PAD)}
    return {"few": few, "capacity_1": HashConfig(scheme="capacity_1")} | bench.size(
        published, {"ple": published["ple"]}
    )


def ids_and_histories(bench: Bench) -> None:
    """Ids and histories are the truth's: in every layout, with and without segments, dead positions and a history."""
    for (name, config), shape in product(layouts(bench).items(), bench.size([(3, 5), (1, 1), (4, 2048)], [(2, 5)])):
        plan = HashPlan.build(config, vocab_size=VOCABULARY, pad=PAD)
        for segmented, spans in product((False, True), repeat=2):
            text = bench.integers(VOCABULARY, *shape)
            text[bench.integers(9, *shape) == 0] = PAD
            given = {
                "segments": (bench.integers(5, *shape) == 0).cumsum(1) if segmented else None,
                "dead": bench.integers(6, *shape) == 0 if spans else None,
            }
            history = reference_hash_ngrams(plan, bench.integers(VOCABULARY, shape[0], 7).cpu())[1].to(bench.device)
            for past in (None, history):
                with deterministic(poisoned=True):
                    got = hash_ngrams(plan, text, history=past, **given)
                there = {key: None if x is None else x.cpu() for key, x in {**given, "history": past}.items()}
                want = reference_hash_ngrams(plan, text.cpu(), **there)
                seen = ", ".join(key for key, x in there.items() if x is not None)
                bench.check(f"hash {name} {list(shape)} {seen}", all(map(same, got, want)))


def unknown_tokens(bench: Bench) -> None:
    """An id outside of the vocabulary gives row -1 wherever it is seen, and changes nothing else."""
    plan = HashPlan.build(HashConfig(rows_per_head=97), vocab_size=VOCABULARY, pad=PAD)
    text = bench.integers(VOCABULARY, 2, 9)
    right, _ = hash_ngrams(plan, text)
    text[0, 4] = VOCABULARY
    wrong, _ = hash_ngrams(plan, text)
    seen = torch.zeros_like(wrong, dtype=torch.bool)
    seen[0, 4] = seen[0, 5] = True
    seen[0, 6, :, plan.heads :] = True  # by trigrams alone
    bench.check("ids outside of the vocabulary", same(wrong, right.masked_fill(seen, -1)))


CHECKS = (ids_and_histories, unknown_tokens)
