"""Models with memories under EleutherAI's lm-evaluation-harness (`lm_eval`, 0.4.13), on its tasks or on local ones.

    write_choices("tasks", "capitals", [("The capital of France is", ["Paris", "Lima"], 0)])
    scores = evaluate_tasks(harness(model, tokenizer, batch_size=8), ["capitals"], include_path="tasks")

or by the harness's own command line, which has no plugins, so that this module is what starts it:

    python -m engram_lm.hf.harness run --model engram --model_args pretrained=DIR,cartridge=DIR --tasks capitals --include_path tasks

The harness pads on the right without a mask: n-grams look back only, so no scored token sees the padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from .. import config as configs
from ..errors import ConfigError, DataError
from ..tables import TableConfig
from . import modeling  # noqa: F401  (AutoModelForCausalLM knows our models then)
from .cartridge import mount


@register_model("engram")
class EngramHFLM(HFLM):
    """lm-eval's `hf` model with cartridges mounted on it; without any, a model of ours or a plain one.

    cartridge: a directory or Hub id, or several in a list. tier: where their rows live, see `TableConfig`; the rest is `hf`'s.
    """

    def __init__(
        self, pretrained: Any, *args: Any, cartridge: str | Sequence[str] = (), tier: str = "auto", **kwargs: Any
    ) -> None:
        self.cartridges = [cartridge] if isinstance(cartridge, str) else list(cartridge)
        self.table = configs.from_dict(TableConfig, {"tier": tier}, "model_args")
        if self.cartridges and not isinstance(pretrained, str):
            raise ConfigError(
                "cartridge was given with a model that is loaded: mount it there, with hf.cartridge.mount."
            )
        super().__init__(pretrained, *args, **kwargs)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        for cartridge in self.cartridges:
            mount(self._model, cartridge, tokenizer=self.tokenizer, table=self.table)


def harness(model: Any, tokenizer: Any, **options: Any) -> EngramHFLM:
    """A model in memory, with whatever is mounted on it, as lm-eval's `LM`; options are those of its `HFLM`, batch_size say."""
    return EngramHFLM(model, tokenizer=tokenizer, **options)


def evaluate_tasks(
    lm: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | str | None = None,
    limit: float | None = None,
    shots: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores by task and metric, as lm-eval names them (`acc,none`, with `acc_stderr,none` where it knows an error).

    tasks: names, of lm-eval's own (which need their data from the Hub) or of the YAML files in `include_path`. limit: of
    documents a task; below 1 a fraction. shots: examples in front of each document. The harness leaves the model in
    evaluation mode, and seeds Python's, NumPy's and torch's random numbers.

    Raises ConfigError for a task that does not exist.
    """
    path = str(include_path) if include_path is not None else None
    manager = TaskManager(include_path=path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)  # reads thousands of files
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            f"no task is called {', '.join(unknown)}: not in lm-eval, nor in {path or 'an include_path'}."
        )
    found = simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False
    )
    assert found is not None  # one process
    return {
        name: {key: float(score) for key, score in scores.items() if "," in key and score != "N/A"}
        for name, scores in found["results"].items()
    }


# --- tasks from local data ------------------------------------------------------------------------------------------


def write_choices(directory: Path | str, name: str, items: Iterable[tuple[str, Sequence[str], int]]) -> Path:
    """A multiple-choice task of (prompt, choices, number of the right one): accuracy, also by likelihood a byte.

    A space stands between prompt and choice. Returns the task's YAML file; data lies beside it, and is named by its full path.
    """
    lines: list[dict[str, Any]] = []
    for prompt, choices, answer in items:
        if not 0 <= answer < len(choices):
            raise DataError(f"item {len(lines)} of {name}: answer {answer} of {len(choices)} choices.")
        lines.append({"prompt": prompt, "choices": list(choices), "answer": answer})
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    }
    return _write(directory, name, lines, task)


def write_answers(
    directory: Path | str,
    name: str,
    items: Iterable[tuple[str, str]],
    *,
    until: Sequence[str] = ("\n",),
    max_tokens: int = 32,
) -> Path:
    """A task of (prompt, answer) in which the model writes, greedily, until one of `until` or `max_tokens`: exact match."""
    task = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": list(until), "max_gen_toks": max_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [_mean("exact_match")],
    }
    return _write(directory, name, [{"prompt": prompt, "answer": answer} for prompt, answer in items], task)


def write_texts(directory: Path | str, name: str, texts: Iterable[str]) -> Path:
    """A task of texts: bits a byte and perplexities, in windows as long as the model reads."""
    task = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
    }
    return _write(directory, name, [{"text": text} for text in texts], task)


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _write(directory: Path | str, name: str, lines: list[dict[str, Any]], task: dict[str, Any]) -> Path:
    if not lines:
        raise DataError(f"the task {name} has no items: its score would have been that of nothing.")
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    data, file = directory / f"{name}.jsonl", directory / f"{name}.yaml"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    facts = {"task": name, **source, **task, "metadata": {"version": 1.0}}
    file.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")  # JSON is YAML
    return file


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
