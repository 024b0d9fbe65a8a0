"""RULER's thirteen task structures (arXiv 2404.06654), of any length, from any text, without a network.

    samples = make_samples("niah_single_2", tokenizer, 4096, 20, seed=0, corpus=texts)
    result = run_task(model, lookup, tokenizer, samples)
    result["score"], result["interval"]

Structures, counts, generation budgets and metrics are as published; every sentence is worded by us. Scores therefore compare
models with each other, not with published tables: for those, run lm-eval's own RULER tasks (`hf.harness`), where their data
is at hand. Known differences of lm-eval 0.4.13 from the original: `metrics.string_match_part` says how its QA metric differs; its
variable-tracking prompt says "assgined"; its needles are drawn without a seed, so that no two runs read the same samples.
"""

from .metrics import string_match_all, string_match_part
from .run import grid, prefer_task, run_task
from .samples import Sample, make_samples
from .sources import Question, read_questions
from .tasks import ONE_ANSWER, TASKS

__all__ = [
    "ONE_ANSWER",
    "TASKS",
    "Question",
    "Sample",
    "grid",
    "make_samples",
    "prefer_task",
    "read_questions",
    "run_task",
    "string_match_all",
    "string_match_part",
]
