"""lm-evaluation-harness on models with memories: the likelihoods and texts are the model's own."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import SENTENCES, tiny_memory, tiny_model, tiny_tokenizer

from engram_lm.errors import ConfigError, DataError
from engram_lm.hf import cartridge
from engram_lm.hf.attach import using

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")  # of transformers, in lm_eval

PAIRS = [
    ("The capital of France is", " Paris; the capital of Peru"),
    ("The capital", " of France is Paris"),
    ("", "Alice was born in Paris"),
    ("Alice was born in Paris in 1912, and", " Bob"),
    ("She sells sea shells by", " the sea shore"),
]


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture
def model() -> Any:
    model = tiny_model()
    tiny_memory(model)
    return model


def harness_of(model: Any, **options: Any) -> Any:
    from engram_lm.hf.harness import harness

    return harness(model, deepcopy(tiny_tokenizer()), **options)  # the harness sets its padding


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0, metadata=("t", 0, 1)) for given in arguments]


def encoded(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


@torch.no_grad()
def likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    """Directly, one sequence at a time, without a cache."""
    tokens = torch.tensor([context + continuation])
    scores = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)[0, :-1]
    chosen = scores.gather(1, tokens[0, 1:, None])[:, 0]
    return chosen[-len(continuation) :].sum().item()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_those_of_the_model(model: Any, batch_size: int):
    found = harness_of(model, batch_size=batch_size).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    start = [tiny_tokenizer().bos_token_id]
    for (context, continuation), (score, _) in zip(PAIRS, found, strict=True):
        head = encoded(context) or start
        tail = encoded(context + continuation)[len(head) if context else 0 :]
        assert score == pytest.approx(likelihood(model, head, tail), abs=1e-4)


def test_the_memory_is_read(model: Any):
    lm, asked = harness_of(model, batch_size=4), requests("loglikelihood", PAIRS)
    on = [score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    with using(model):
        off = [score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    bare = [score for score, _ in harness_of(tiny_model(), batch_size=4).loglikelihood(asked, disable_tqdm=True)]
    assert off == pytest.approx(bare, abs=1e-4)
    assert all(abs(one - other) > 1e-2 for one, other in zip(on, off, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_likelihoods_are_sums_over_windows(model: Any, batch_size: int):
    lm = harness_of(model, batch_size=batch_size, max_length=16)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(SENTENCES[0],), (SENTENCES[1],)]), True)
    for text, score in zip(SENTENCES, found, strict=False):
        tokens, expected = encoded(text), 0.0
        for first in range(0, len(tokens), 16):
            part = tokens[first : first + 16]
            if first == 0:
                context = [tiny_tokenizer().bos_token_id]
            else:  # as much of what was read as fits
                context = tokens[first + len(part) - 17 : first]
            expected += likelihood(model, context, part)
        assert len(tokens) > 16
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_those_of_generate(model: Any, batch_size: int):
    prompts = [context for context, _ in PAIRS if context]
    asked = requests(
        "generate_until", [(p, {"until": ["zzz"], "max_gen_toks": 8, "do_sample": False}) for p in prompts]
    )
    found = harness_of(model, batch_size=batch_size).generate_until(asked, disable_tqdm=True)
    with using(model):
        without = harness_of(model, batch_size=batch_size).generate_until(asked, disable_tqdm=True)
    tokenizer = tiny_tokenizer()
    for prompt, text in zip(prompts, found, strict=True):
        tokens = torch.tensor([encoded(prompt)])
        out = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert text == tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
    assert found != without


def test_a_text_ends_where_it_is_told_to(model: Any):
    (whole,) = harness_of(model).generate_until(
        requests("generate_until", [("The capital", {"until": [], "max_gen_toks": 12})]), disable_tqdm=True
    )
    stop = whole[3:5]
    (cut,) = harness_of(model).generate_until(
        requests("generate_until", [("The capital", {"until": [stop], "max_gen_toks": 12})]), disable_tqdm=True
    )
    assert cut == whole[: whole.index(stop)]


def test_local_tasks(model: Any, tmp_path: Path):
    from engram_lm.hf.harness import evaluate_tasks, write_answers, write_choices, write_texts

    lm = harness_of(model, batch_size=4)
    items = [("The capital of France is", ["Paris", "Lima"]), ("The quick brown", ["fox", "dog", "sea shells"])]
    scores = [
        [
            likelihood(model, encoded(prompt), encoded(f"{prompt} {choice}")[len(encoded(prompt)) :])
            for choice in choices
        ]
        for prompt, choices in items
    ]
    best = [max(range(len(each)), key=each.__getitem__) for each in scores]
    right = [(*item, answer) for item, answer in zip(items, best, strict=True)]
    wrong = [(*item, (answer + 1) % len(item[1])) for item, answer in zip(items, best, strict=True)]
    write_choices(tmp_path, "right", right)
    write_choices(tmp_path, "mixed", [right[0], wrong[1]])
    (text,) = lm.generate_until(
        requests("generate_until", [("The capital", {"until": ["\n"], "max_gen_toks": 6})]), disable_tqdm=True
    )
    write_answers(tmp_path, "answers", [("The capital", text.strip()), ("Alice", "nothing of it")], max_tokens=6)
    write_texts(tmp_path, "texts", SENTENCES[:3])

    found = evaluate_tasks(lm, ["right", "mixed", "answers", "texts"], include_path=tmp_path)
    assert found["right"]["acc,none"] == 1.0
    assert found["mixed"]["acc,none"] == 0.5
    assert found["answers"]["exact_match,none"] == 0.5
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in SENTENCES[:3]]), True)
    bits = -sum(rolling) / sum(len(text.encode()) for text in SENTENCES[:3]) / torch.tensor(2.0).log().item()
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert evaluate_tasks(lm, ["mixed"], include_path=tmp_path, limit=1)["mixed"]["acc,none"] == 1.0


def test_tasks_that_cannot_be_meant_are_refused(tmp_path: Path):
    from engram_lm.hf.harness import write_choices, write_texts

    with pytest.raises(DataError, match="item 1 of odd: answer 2 of 2 choices"):
        write_choices(tmp_path, "odd", [("a", ["b", "c"], 0), ("a", ["b", "c"], 2)])
    with pytest.raises(DataError, match="no items"):
        write_texts(tmp_path, "empty", [])


def saved(directory: Path) -> tuple[Path, Path, Any]:
    """A base and a cartridge for it on disk, and the model with both."""
    model = tiny_model()
    base = directory / "base"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    tiny_memory(model)
    cartridge.save(model, directory / "facts", tiny_tokenizer())
    return base, directory / "facts", model


def test_cartridges_are_mounted_by_name(tmp_path: Path):
    from lm_eval.api.registry import get_model

    from engram_lm.hf import harness

    base, facts, model = saved(tmp_path)
    expected = harness_of(model).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    kind = get_model("engram")
    assert kind is harness.EngramHFLM
    for tier in ("auto", "disk"):
        lm = kind.create_from_arg_string(
            f"pretrained={base},cartridge={facts},tier={tier}", {"device": "cpu", "batch_size": 2}
        )
        found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    with pytest.raises(ConfigError, match="tier"):
        kind.create_from_arg_string(f"pretrained={base},cartridge={facts},tier=dusk", {"device": "cpu"})
    with pytest.raises(ConfigError, match="mount it there"):
        harness_of(model, cartridge=str(facts))


def test_the_harness_has_our_models_on_its_own_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval._cli import HarnessCLI
    from lm_eval.tasks import TaskManager

    from engram_lm.hf.harness import write_choices

    local = partialmethod(TaskManager.__init__, include_defaults=False)  # or it reads thousands of files
    monkeypatch.setattr(TaskManager, "__init__", local)
    base, facts, _ = saved(tmp_path)
    write_choices(tmp_path / "tasks", "capitals", [("The capital of France is", ["Paris", "Lima"], 0)])
    arguments = ["--model", "engram", "--model_args", f"pretrained={base},cartridge={facts}", "--tasks", "capitals"]
    arguments += ["--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["harness", "run", *arguments])
    command = HarnessCLI()
    command.execute(command.parse_args())
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text(encoding="utf-8"))["results"]["capitals"]["acc,none"] in (0.0, 1.0)
