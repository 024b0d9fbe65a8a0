"""A model's scores: by what it writes, as published, or by what it prefers, which small models can do too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ...errors import ConfigError, DataError
from ...generate import advance, generate
from ...model.lm import LanguageModel
from ...model.lookup import Lookup
from ...train.tokenizer import encode_texts, separator_id
from .metrics import METRICS, interval
from .samples import Sample, make_samples
from .tasks import ONE_ANSWER, ONE_NEEDLE, TASKS

Progress = Callable[[], None]  # called after each sample


def run_task(
    model: LanguageModel,
    lookup: Lookup | None,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Let the model answer, greedily and from its cache, and score the samples of one task by the task's metric.

    Returns plain values: task, metric, count, score (0 to 1) with its 95 % interval, tokens (of the longest sample), and for each
    sample its output, references, score, depths and tokens. Raises DataError for no samples, or those of several tasks.
    """
    task = _task_of(samples)
    score, end = METRICS[TASKS[task].metric], separator_id(tokenizer)
    outputs = []
    for sample in samples:
        prompt = _tokens(model, tokenizer, sample.text)
        written = generate(model, lookup, prompt, TASKS[task].budget, end_id=end)[0, prompt.shape[1] :]
        output = tokenizer.decode(written.tolist())
        outputs.append({"output": output, "score": score(output, sample.references)} | _facts(sample))
        if progress:
            progress()
    return _result(task, TASKS[task].metric, samples, outputs)


@torch.no_grad()
def prefer_task(
    model: LanguageModel,
    lookup: Lookup | None,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    others: int = 9,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score needle tasks of one answer by whether it is likelier than the answers of `others` further samples, which are not there.

    A model that cannot find the needle is right once in others + 1 times ("chance"): there is something to see long
    before a model writes seven digits without a fault. Otherwise as run_task, with the metric "preference"; an output is
    the value that the model likes best. Raises DataError as run_task does, and when there are too few samples;
    ConfigError for a task whose samples have several answers.
    """
    task = _task_of(samples)
    if task not in ONE_ANSWER:
        raise ConfigError(f"{task}: preference is for needle tasks with one answer ({', '.join(ONE_ANSWER)}).")
    if not 1 <= others < len(samples):
        raise DataError(
            f"{task}: an answer is compared with those of {others} others, but there are {len(samples)} samples."
        )
    answers = [sample.references[0] for sample in samples]
    outputs = []
    for number, sample in enumerate(samples):
        candidates = [answers[(number + i) % len(samples)] for i in range(others + 1)]
        likelihoods = log_likelihoods(model, lookup, tokenizer, sample.text, [f" {value}" for value in candidates])
        best = int(torch.tensor(likelihoods).argmax())
        outputs.append({"output": candidates[best], "score": float(best == 0)} | _facts(sample))
        if progress:
            progress()
    return _result(task, "preference", samples, outputs) | {"chance": 1 / (others + 1)}


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, lookup: Lookup | None, tokenizer: Tokenizer, text: str, continuations: Sequence[str]
) -> list[float]:
    """Natural logarithm of each continuation's probability after a text, which is read once."""
    model.eval()
    logits, state = advance(model, lookup, _tokens(model, tokenizer, text))
    result = []
    for ids in encode_texts(tokenizer, continuations):
        tokens = torch.from_numpy(ids.astype("int64")).to(logits.device)[None]
        steps = [logits]
        if tokens.shape[1] > 1:
            rows = lookup.rows(tokens[:, :-1], history=state.history)[0] if lookup else None
            hidden, _ = model(tokens[:, :-1], rows, state=state.model)
            steps.append(model.logits(hidden)[0].float())
        result.append(-float(F.cross_entropy(torch.cat(steps), tokens[0], reduction="sum")))
    return result


def grid(
    model: LanguageModel,
    lookup: Lookup | None,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int,
    corpus: Sequence[str] = (),
    *,
    task: str = "",
    run: Callable[..., dict[str, Any]] = run_task,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores of a single needle by length and depth.

    task: of one needle; "" is niah_single_2 with a corpus and niah_single_1 without. run: run_task or prefer_task.
    Returns task, metric, lengths [L], depths [D] in percent, scores [L][D], intervals [L][D] of 95 %, counts [L][D].
    Raises as make_samples and `run` do.
    """
    task = task or ("niah_single_2" if corpus else "niah_single_1")
    if task not in ONE_NEEDLE or not lengths or not depths:
        raise ConfigError(
            f"a grid needs lengths, depths, and a task of one needle ({', '.join(ONE_NEEDLE)}), not {task}."
        )
    cells = [
        [
            run(
                model,
                lookup,
                tokenizer,
                make_samples(task, tokenizer, length, count, seed, corpus, depth=depth),
                progress=progress,
            )
            for depth in depths
        ]
        for length in lengths
    ]
    return {
        "task": task,
        "metric": cells[0][0]["metric"],
        "lengths": list(lengths),
        "depths": list(depths),
        "scores": [[cell["score"] for cell in row] for row in cells],
        "intervals": [[cell["interval"] for cell in row] for row in cells],
        "counts": [[cell["count"] for cell in row] for row in cells],
    }


def _task_of(samples: Sequence[Sample]) -> str:
    tasks = {sample.task for sample in samples}
    if len(tasks) != 1:
        raise DataError(f"samples of one task are scored together, not of {len(tasks)} ({', '.join(sorted(tasks))}).")
    return tasks.pop()


def _tokens(model: LanguageModel, tokenizer: Tokenizer, text: str) -> Tensor:
    """[1, T] on the model's device: the text as the beginning of a document."""
    (ids,) = encode_texts(tokenizer, [text])
    return torch.tensor([[separator_id(tokenizer), *ids.tolist()]], device=model.embedding.weight.device)


def _facts(sample: Sample) -> dict[str, Any]:
    return {"references": list(sample.references), "depths": list(sample.depths), "tokens": sample.tokens}


def _result(task: str, metric: str, samples: Sequence[Sample], outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = [float(output["score"]) for output in outputs]
    return {
        "task": task,
        "metric": metric,
        "count": len(scores),
        "score": sum(scores) / len(scores),
        "interval": list(interval(scores)),
        "tokens": max(sample.tokens for sample in samples),
        "samples": list(outputs),
    }
