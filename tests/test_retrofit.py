"""Retrofits from end to end: the same batches for every arm, memories that come off, reports that say what was measured."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_tiny import tiny_model, tiny_tokenizer
from test_cli import call
from tiny import write_texts
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError, TrainingError
from engram_lm.hf.arms import Arm, Bias, add_adapter, matched_rank
from engram_lm.hf.attach import using
from engram_lm.hf.base import DocumentLosses, load_base, measure, positions
from engram_lm.hf.cartridge import mount
from engram_lm.hf.config import RetrofitConfig
from engram_lm.hf.retrofit import retrofit
from engram_lm.report.retrofit import render, write_report
from engram_lm.report.verdict import quantity
from engram_lm.statistics import ratio_interval
from engram_lm.train.loader import Batch, windows
from engram_lm.train.loop import read_metrics
from engram_lm.train.shards import open_shards

ALL = ("engram", "lora", "bias", "capacity_1", "frozen_random", "engram+lora", "full")


@pytest.fixture(scope="module", autouse=True)
def short_examples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engram_lm.hf.retrofit.CONTINUATION", 3)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), files=10, words=120)


@pytest.fixture(scope="module")
def settings(pretrained, texts) -> RetrofitConfig:
    return RetrofitConfig(
        model=str(pretrained),
        data=str(texts),
        outside=str(texts / "0.txt"),
        arms=ALL,
        tokens=240,
        batch_size=2,
        length=12,
        rows=3000,
        row_dim=4,
        heads=2,
        layers=(1, 2),
        lr=0.01,
        held_out=0.3,
        eval_tokens=0,
        evaluations=2,
        precision="float32",
        device="cpu",
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("retrofit")
    assert retrofit(settings, out, say=lambda line: None) is not None
    return out


@pytest.fixture(scope="module")
def results(finished) -> dict:
    return json.loads((finished / "results.json").read_text())


def quiet(config: RetrofitConfig, out: Path, **options):
    return retrofit(config, out, say=lambda line: None, **options)


# --- what is compared ---------------------------------------------------------------------------------------


def test_every_arm_takes_the_same_steps_on_the_same_batches(finished, results, settings):
    first = {}
    for run in results["runs"]:
        assert (run["steps"], run["tokens"]) == (10, 240)
        lines = read_metrics(finished / "arms" / run["arm"] / "seed-0" / "metrics.jsonl")
        first[run["arm"]] = next(line["loss"] for line in lines if "loss" in line)
        assert [line["tokens"] for line in lines if "loss" in line] == list(range(24, 264, 24))
        assert [line["tokens"] for line in lines if "val_loss" in line] == [0, 120, 240]
    # nothing is added at the start, so the first batch's loss is the same in all arms: it is the same batch
    assert len(set(first.values())) == 1
    # and the validation curve begins at the same loss
    starts = {
        read_metrics(finished / "arms" / name / "seed-0" / "metrics.jsonl")[0]["val_loss"] for name in settings.arms
    }
    assert len(starts) == 1


def test_only_what_an_arm_trains_is_counted(results, settings):
    counted = {run["arm"]: run["parameters"] for run in results["runs"]}
    rows = {run["arm"]: run["rows_read"] for run in results["runs"]}
    dense = 2 * (4 * 4 * 2 * 32 + 2 * 32)  # two layers: (orders x heads x row_dim) to a key and a value; two gains
    assert counted["engram"] == {"projections": dense, "rows": 4 * rows["engram"]}
    assert counted["capacity_1"] == {"projections": dense, "rows": 4 * 8}  # one row a head, in two layers
    assert counted["frozen_random"] == {"projections": dense}
    assert counted["bias"] == {"bias": 2 * 32}
    assert counted["engram+lora"] == counted["engram"] | counted["lora"]
    assert counted["full"] == {"weights": results["model"]["parameters"]}
    assert results["lora"]["memory_parameters"] == sum(counted["engram"].values())
    assert counted["lora"] == {"adapters": results["lora"]["parameters"]}


def test_rows_read_are_the_rows_that_change(finished, results, pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    memory = mount(model, finished / "cartridge")
    table = memory.lookup.table
    changed = table.fetch(torch.arange(table.num_rows)).abs().sum(1) > 0
    read = next(run["rows_read"] for run in results["runs"] if run["arm"] == "engram")
    assert 0 < int(changed.sum()) <= read  # the last token before another document is read, and predicts nothing
    assert int(changed.sum()) > 0.9 * read


def test_the_rank_is_the_nearest_and_no_larger_than_is_sensible(pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained).requires_grad_(False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    rank, each, largest = matched_rank(model, 3 * 1856 + 100)
    adapter = add_adapter(model, rank, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter.unload()
    assert (rank, trained) == (3, 3 * each)
    assert matched_rank(model, 10**9)[0] == largest == min(32 * 16 // 48, 32 * 48 // 80)
    assert matched_rank(model, 1)[0] == 1
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_documents_do_not_see_each_other(settings, pretrained):
    base = load_base(settings)
    tokens = torch.randint(3, 380, (1, 12), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 5 + [2] * 7])
    batch = Batch(tokens, tokens, segments)
    alone = Batch(tokens[:, 5:], tokens[:, 5:], segments[:, 5:])
    arm = Arm("engram", base, settings, seed=0, rank=1, directory=Path())
    table = arm.memory.lookup.table
    table.write(torch.arange(table.num_rows), torch.randn(table.num_rows, table.dim))
    torch.testing.assert_close(base.logits(batch)[:, 5:], base.logits(alone), atol=1e-4, rtol=1e-4)
    joined = base.logits(Batch(tokens, tokens, torch.ones_like(segments)))
    assert not torch.allclose(joined[:, 5:], base.logits(alone), atol=1e-2)


def test_positions_begin_anew_with_each_document():
    segments = torch.tensor([[4, 4, 4, 5, 6, 6], [1, 2, 2, 2, 2, 3]])
    assert positions(segments).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 0]]


# --- what is measured ---------------------------------------------------------------------------------------


def test_losses_are_those_of_each_document_by_itself(finished, settings, results):
    base, split = load_base(settings), open_shards(finished / "shards").val
    measured = measure(base, windows(split, 1, len(split.tokens)), len(split.starts))
    ends = [*split.starts[1:], len(split.tokens)]
    for number, (start, end) in enumerate(zip(split.starts, ends, strict=True)):
        tokens = torch.from_numpy(split.tokens[start:end].astype(np.int64))[None]
        with torch.no_grad():
            alone = base.model(input_ids=tokens, labels=tokens).loss
        assert measured.tokens[number] == end - start - 1
        assert measured.nats[number] / measured.tokens[number] == pytest.approx(float(alone), rel=1e-4)
    assert sum(results["base"]["held_out"]["tokens"]) == len(split.tokens) - len(split.starts)


def test_differences_are_paired_and_weighted_by_tokens(results):
    runs = {run["arm"]: run["held_out"] for run in results["runs"]} | {"base": results["base"]["held_out"]}
    for name, own in results["arms"].items():
        tokens = np.array(runs["base"]["tokens"])
        assert own["held_out"]["loss"] == pytest.approx(np.sum(runs[name]["nats"]) / tokens.sum())
        assert own["held_out"]["less"].keys() == runs.keys() - {name}
        for other, less in own["held_out"]["less"].items():
            difference = np.array(runs[name]["nats"]) - np.array(runs[other]["nats"])
            assert less["difference"] == pytest.approx(difference.sum() / tokens.sum())
            assert less["interval"] == pytest.approx(ratio_interval(difference, tokens))
            assert less["interval"][0] <= less["difference"] <= less["interval"][1]


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(80):
        counts = rng.integers(50, 400, 60)
        sums = counts * rng.normal(0.3, 0.2, 60)
        low, high = ratio_interval(sums, counts, seed=trial)
        covered.append(low <= 0.3 <= high)
    assert np.mean(covered) >= 0.85
    assert ratio_interval(np.ones(1), np.ones(1)) is None
    assert ratio_interval(np.full(5, 2.0), np.full(5, 4)) == (0.5, 0.5)


def test_switched_off_the_model_is_the_base_bit_for_bit(results):
    for run in results["runs"]:
        if run["arm"] == "full":
            assert run["off"] is None
        else:
            assert run["off"]["equal"]
            assert run["off"]["largest_difference"] == 0
            assert run["off"]["largest_difference_on"] > 1e-4  # and switched on it is another


def test_a_base_that_does_not_come_back_is_reported(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("engram_lm.hf.arms.using", lambda model: using(model, "memory"))  # as if off did nothing
    config = replace(settings, arms=("engram",))
    quiet(config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["runs"][0]["off"]["equal"]
    assert "NOT equal" in render(results, {"engram": ((0.0, 1.0), (1.0, 1.0))})


def test_the_cartridge_gives_the_loss_that_was_reported(finished, results, settings):
    base, split = load_base(settings), open_shards(finished / "shards").val
    mount(base.model, finished / "cartridge", tokenizer=base.tokenizer)
    measured = measure(base, windows(split, settings.batch_size, settings.length), len(split.starts))
    assert measured.mean == pytest.approx(results["arms"]["engram"]["held_out"]["loss"], rel=1e-6)
    assert measured.mean < results["arms"]["base"]["held_out"]["loss"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_and_weights_give_the_losses_that_were_reported(finished, results, settings):
    from peft import PeftModel

    split = open_shards(finished / "shards").val

    def loss(model) -> float:
        base = replace(load_base(settings), model=model)
        return measure(base, windows(split, settings.batch_size, settings.length), len(split.starts)).mean

    arms = finished / "arms"
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(settings.model), arms / "lora/seed-0/adapter"
    )
    full = AutoModelForCausalLM.from_pretrained(arms / "full/seed-0/model")
    assert loss(adapted) == pytest.approx(results["arms"]["lora"]["held_out"]["loss"], rel=1e-5)
    assert loss(full) == pytest.approx(results["arms"]["full"]["held_out"]["loss"], rel=1e-5)


def test_a_bias_is_added_and_taken_off():
    model = tiny_model("gpt2")
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        bias = Bias(model, (0, 2))
        assert torch.equal(model(input_ids=tokens).logits, before)
        bias.vectors["2"].fill_(0.5)
        assert not torch.allclose(model(input_ids=tokens).logits, before)
        bias.remove()
        assert torch.equal(model(input_ids=tokens).logits, before)


# --- going on -----------------------------------------------------------------------------------------------


def test_finished_arms_are_kept_and_more_may_be_asked_for(settings, tmp_path):
    some = replace(settings, arms=("bias", "engram"))
    quiet(some, tmp_path)
    kept = tmp_path / "arms/bias/seed-0/result.json"
    before = kept.stat().st_mtime_ns
    (tmp_path / "arms/engram/seed-0/result.json").unlink()  # as if killed while it was saved
    more = replace(settings, arms=("bias", "engram", "capacity_1"))
    results = quiet(more, tmp_path, resume=True)
    assert kept.stat().st_mtime_ns == before
    assert [run["arm"] for run in results["runs"]] == ["bias", "engram", "capacity_1"]
    assert (tmp_path / "cartridge/cartridge.json").exists()
    with pytest.raises(MismatchError, match=r"lr: 0\.01 then, 0\.02 now"):
        quiet(replace(more, lr=0.02), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="already holds a retrofit"):
        quiet(more, tmp_path)


def test_an_interrupted_arm_begins_again_and_ends_the_same(settings, finished, results, tmp_path, monkeypatch):
    config, steps = replace(settings, arms=("capacity_1", "engram")), 0
    from engram_lm.hf.retrofit import Runner

    step = Runner._step

    def interrupted(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == 14:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_step", interrupted)
        assert quiet(config, tmp_path) is None
    assert (tmp_path / "arms/capacity_1/seed-0/result.json").exists()
    assert not (tmp_path / "arms/engram/seed-0/result.json").exists()
    assert not (tmp_path / "results.json").exists()
    again = quiet(config, tmp_path, resume=True)
    for name in ("capacity_1", "engram"):
        assert again["arms"][name]["held_out"]["loss"] == results["arms"][name]["held_out"]["loss"]


def test_seeds_are_separate_runs_and_losses_their_means(settings, finished, results, tmp_path):
    several = quiet(replace(settings, arms=("engram",), seeds=(0, 1)), tmp_path)
    own = several["arms"]["engram"]["held_out"]
    assert len(set(own["seeds"])) == 2
    assert own["loss"] == pytest.approx(np.mean(own["seeds"]))
    assert own["seeds"][0] == results["arms"]["engram"]["held_out"]["loss"]
    assert len(own["less"]["base"]["seeds"]) == 2
    assert (tmp_path / "arms/engram/seed-1/cartridge/cartridge.json").exists()
    assert "loss of each seed" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("base", ["lora", "full"])
def test_a_base_that_trains_too(settings, tmp_path, base):
    run = quiet(replace(settings, arms=("engram",), base=base), tmp_path)["runs"][0]
    part = {"lora": "adapters", "full": "weights"}[base]
    assert run["parameters"].keys() == {"projections", "rows", part}
    where = tmp_path / "arms/engram/seed-0" / {"lora": "adapter", "full": "model"}[base]
    assert where.is_dir()
    if base == "full":  # the cartridge belongs to the weights that trained with it
        model = AutoModelForCausalLM.from_pretrained(where)
        mount(model, tmp_path / "cartridge", tokenizer=AutoTokenizer.from_pretrained(where))


def test_rows_on_disk_train_the_same(settings, results, tmp_path):
    table = replace(settings.table, tier="disk", memory=0.001)
    on_disk = quiet(replace(settings, arms=("engram",), table=table), tmp_path)
    assert on_disk["arms"]["engram"]["held_out"]["loss"] == results["arms"]["engram"]["held_out"]["loss"]


# --- the report ---------------------------------------------------------------------------------------------


def test_the_reports_figures_are_those_of_the_results(finished, results):
    page = write_report(finished).read_text().replace("−", "-")
    for name, own in results["arms"].items():
        row = re.search(rf'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', page).group(1)
        cells = re.findall(r"<td>(.*?)</td>", row)
        assert cells[0] == f"{own['held_out']['loss']:.4f}"
        if name != "base":
            less = own["held_out"]["less"]["base"]
            low, high = less["interval"]
            assert cells[1] == f"{less['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
    for run in results["runs"]:
        assert all(f"{part} {quantity(count)} at " in page for part, count in run["parameters"].items())
    assert f"rank {results['lora']['rank']}" in page
    assert "did not search for better ones" in page
    assert "<script" not in page


def test_without_outside_text_the_report_says_so(settings, tmp_path):
    quiet(replace(settings, arms=("bias",), outside=""), tmp_path)
    assert "Forgetting was not measured" in write_report(tmp_path).read_text()


def test_texts_of_models_are_escaped(finished, results):
    evil = "<script>alert('x')</script>$style"
    results["base"]["examples"][0]["written"] = evil
    results["model"]["name"] = evil
    page = render(results, {"engram": ((0.0, 1.0), (1.0, 1.0))})
    assert "<script" not in page


# --- what cannot be done ------------------------------------------------------------------------------------


@pytest.fixture
def command(capfd):
    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        code = call("retrofit", *arguments)
        output, errors = capfd.readouterr()
        assert "Traceback" not in errors
        return code, output + errors

    return run


def test_the_command_ends_with_a_table_and_a_report(command, settings, tmp_path):
    code, said = command(
        *("--model", settings.model, "--data", settings.data, "--out", tmp_path / "o", "--arms", "bias", "engram"),
        *"--tokens 48 --batch-size 2 --length 12 --rows 3000 --row-dim 4 --held-out 0.3 --device cpu".split(),
    )
    assert code == 0
    assert (tmp_path / "o/report.html").exists()
    results = json.loads((tmp_path / "o/results.json").read_text())
    for name, own in results["arms"].items():
        assert re.search(rf"{name} .*{own['held_out']['loss']:.4f}", said)
    assert results["command"].startswith("engram-lm retrofit --model")
    assert "Forgetting was not measured" in said


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"data": "nowhere.txt"}, DataError, "no such file"),
        ({"outside": "nowhere.txt"}, DataError, "no such file"),
        ({"model": "/nowhere"}, DataError, "no decoder-only model could be loaded"),
        ({"layers": (9,)}, ConfigError, "beyond the model's last"),
        ({"table_lr": 1e38}, TrainingError, "the loss is"),
        ({"batch_size": 4096}, DataError, "no step could be taken"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing_behind(settings, tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        quiet(replace(settings, arms=("engram",), **changes), tmp_path / "o")
    assert not (tmp_path / "o/results.json").exists()


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"lr": 0.0}, {"seeds": ()}, {"arms": ("bias", "bias")}])
def test_settings_that_cannot_be_meant(settings, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        replace(settings, **changes)


def test_one_line_and_exit_code_1(command, settings, tmp_path):
    code, said = command("--model", settings.model, "--data", "nowhere.txt", "--out", tmp_path / "o")
    assert code == 1
    assert said.strip().splitlines()[-1].startswith("Error: nowhere.txt: no such file")


def test_a_model_that_is_no_decoder_is_refused(settings, tmp_path):
    words = {f"w{n}": n for n in range(50)} | {"</s>": 50}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.save_pretrained(tmp_path / "bert")
    config = BertConfig(vocab_size=51, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="layers where a memory could go"):
        quiet(replace(settings, model=str(tmp_path / "bert")), tmp_path / "o")


def test_missing_packages_are_named(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"engram-lm\[peft\]"):
        quiet(settings, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    quiet(replace(settings, arms=("bias",)), tmp_path / "o")


def test_losses_of_documents_survive_json():
    losses = DocumentLosses(np.array([1.5, 2.5]), np.array([3.0, 5.0]))
    again = DocumentLosses.of(json.loads(json.dumps(losses.json())))
    assert again.mean == losses.mean == 0.5
