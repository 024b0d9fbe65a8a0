"""The comparison as a whole, on a text of a few words: every arm, slices, probes, one report; killed and resumed."""

import json
from dataclasses import replace

import pytest
import tiny
from test_cli import SMALL, call, engram  # noqa: F401  (a fixture)

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.evaluate.controls import ARMS
from engram_lm.study.compare import CompareConfig, compare, distinct_arms
from engram_lm.study.facts import FactsConfig, facts_study
from engram_lm.study.sweep import MemorySweep, sweep

CONFIG = CompareConfig(
    tiny.config(replace(tiny.ENGRAM, vocab_size=280), keep_checkpoints=1),
    arms=("base", "engram", "capacity_1"),
    seeds=2,
    eval_windows=16,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return str(tiny.write_texts(tmp_path_factory.mktemp("texts"), files=24))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    """A comparison's directory and its results."""
    out = tmp_path_factory.mktemp("study") / "compare"
    return out, compare(CONFIG, texts, out, command="engram-lm compare", say=lambda line: None)


def test_results_are_what_the_file_holds(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_differences_are_between_the_losses_that_are_shown(finished):
    arms = finished[1]["arms"]
    for name, arm in arms.items():
        assert arm["loss"] == pytest.approx(sum(arm["seeds"]) / 2)
        for other, less in arm["less"].items():
            assert less["difference"] == pytest.approx(arm["loss"] - arms[other]["loss"])
            pairs = zip(arm["seeds"], arms[other]["seeds"], strict=True)
            assert less["seeds"] == pytest.approx([mine - theirs for mine, theirs in pairs])
            assert less["interval"][0] <= less["difference"] <= less["interval"][1], name
            assert less["seed_interval"][0] <= less["difference"] <= less["seed_interval"][1]


def test_what_is_equal_is_said(finished):
    arms = finished[1]["arms"]
    assert arms["capacity_1"]["against_engram"]["flops"] == arms["capacity_1"]["against_engram"]["active"] == 1.0
    assert arms["base"]["against_engram"]["flops"] < 1.0
    assert arms["engram"]["equal"].startswith("same tokens, FLOPs 1 x")


def test_slices_hold_every_token_once(finished):
    slices = finished[1]["slices"]
    assert {"seen 2-gram", "seen 3-gram", "position", "token class"} <= set(slices)
    for kind in slices.values():
        assert sum(kind["share"]) == pytest.approx(1.0)
        for arm in kind["arms"].values():
            losses = [share * (loss or 0.0) for share, loss in zip(kind["share"], arm["loss"], strict=True)]
            assert len(losses) == len(kind["labels"])


def test_the_slices_add_up_to_the_loss(finished):
    results = finished[1]
    for name, arm in results["slices"]["position"]["arms"].items():
        whole = sum(s * (l or 0.0) for s, l in zip(results["slices"]["position"]["share"], arm["loss"], strict=True))
        assert whole == pytest.approx(results["arms"][name]["loss"], abs=1e-4)


def test_probes_are_there(finished):
    probes = finished[1]["probes"]
    assert {"knockout", "gates", "usage", "gate_view", "lens", "cka", "seconds"} <= set(probes)
    assert set(probes["lens"]) == {"base", "engram"}


def test_the_same_call_measures_nothing_again(finished, texts):
    out, results = finished
    again = compare(CONFIG, texts, out, command="engram-lm compare", say=lambda line: None)
    assert again["arms"] == results["arms"]


def test_more_arms_join_a_finished_comparison(finished, texts):
    out, results = finished
    more = compare(replace(CONFIG, arms=(*CONFIG.arms, "shuffled")), texts, out, say=lambda line: None)
    assert more["arms"]["engram"]["loss"] == results["arms"]["engram"]["loss"]
    assert "shuffled" in more["arms"]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"steps": 7}, "train.steps: 6 then, 7 now"), ({"batch_size": 2}, "batch_size")],
)
def test_another_configuration_is_refused(finished, texts, change, named):
    other = replace(CONFIG, train=replace(CONFIG.train, **change))
    with pytest.raises(MismatchError, match=named):
        compare(other, texts, finished[0], say=lambda line: None)


def test_a_directory_holds_one_study(finished, texts):
    out, results = finished
    with pytest.raises(MismatchError, match="kind: 'compare' then, 'facts' now"):
        facts_study(FactsConfig(counts=(24,)), out, say=lambda line: None)
    rows = (11, 23, 47, 97)
    with pytest.raises(MismatchError, match="kind: 'compare' then, 'memory' now"):
        sweep(MemorySweep(CONFIG.train, rows), texts, out, say=lambda line: None)
    assert json.loads((out / "results.json").read_text())["arms"].keys() >= results["arms"].keys()


def test_another_text_is_refused(finished, tmp_path):
    other = tiny.write_texts(tmp_path / "other", files=24)
    with pytest.raises(DataError, match="holds the tokens of"):
        compare(CONFIG, str(other), finished[0], say=lambda line: None)


def test_arms_that_come_out_as_the_same_model_run_once():
    config = replace(CONFIG, train=replace(CONFIG.train, model=replace(tiny.ENGRAM, ffn_width=64)), arms=ARMS)
    runs, same = distinct_arms(config)
    assert set(runs) | set(same) == set(ARMS)
    for arm, twin in same.items():
        assert arm not in runs
        assert twin in runs


def test_a_comparison_needs_an_origin():
    with pytest.raises(ConfigError, match="lack base"):
        replace(CONFIG, arms=("engram",))
    with pytest.raises(ConfigError, match="starts from a model with a memory"):
        CompareConfig(tiny.config(tiny.BASE))


def test_from_the_command_line(engram, texts, tmp_path):  # noqa: F811
    out = tmp_path / "compare"
    command = ("compare", "tiny", "--data", texts, "--out", out, *SMALL.split(), "--arms", "base", "engram", "bigram")
    code, output = engram(*command, "--seeds", 1, "--eval-windows", 8)
    assert code == 0, output
    assert "report.html" in output
    assert "bigram" in (out / "report.html").read_text()
    code, output = engram("eval", out / "arms" / "engram" / "seed-0")
    assert (code, "nats a token" in output) == (0, True)
