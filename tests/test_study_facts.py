"""The facts study: arms that differ in one thing, sizes that grow until nothing is recalled, and what is concluded."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny import ENGRAM

from engram_lm.cli.facts import Facts, print_results, summary
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.evaluate.biographies import FORMS, invent
from engram_lm.hashing import prime_sizes
from engram_lm.model.count import count
from engram_lm.report.facts import write_report
from engram_lm.study import facts as study
from engram_lm.study.facts import (
    ARMS,
    BUDGETS,
    DESCRIPTIONS,
    FactsConfig,
    facts_study,
    holds,
    hopeless,
    point,
    ratio,
    train_config,
    train_of_arm,
)
from engram_lm.train.loop import TrainConfig

TINY = FactsConfig(
    model=ENGRAM,
    counts=(24, 48),
    exposures=(2,),
    values=6,
    names=(5, 5, 5),
    steps_per_epoch=2,
    min_batch=8,
    hard_facts=16,
    hard_attributes=2,
    hard_exposures=1,
    hard_arms=("iso_flop", "engram"),
    give_up=0.0,
    device="cpu",
    precision="float32",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    source = out / "facts.jsonl"
    lines = [{"subject": f"Land {n}", "relation": "pays in", "object": ["Taler", "Krone"][n % 2]} for n in range(30)]
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = replace(TINY, hard=True, real=str(source), real_vocab=300)
    return config, out, facts_study(config, out, command="engram-lm facts", say=silent)


def test_the_curve_holds_every_arm_at_every_number(done):
    config, _, results = done
    for arm in config.arms:
        points = results["curve"]["2"][arm]
        assert [one["facts"] for one in points] == [24, 48]
        for one in points:
            assert 0 <= one["interval"][0] <= one["recall"] <= one["interval"][1] <= 1
            assert one["kinds"] == {"as told": one["recall"]}
            size = results["parameters"][arm]
            assert one["bits_per_parameter"] == pytest.approx(one["bits"] / size["total"])
            assert one["bits_per_active"] == pytest.approx(one["bits"] / size["active"])
            assert 0 <= one["value_bits"] <= min(one["bits"], one["facts"] * math.log2(6))
    assert results["not_run"] == {"2": {"iso_flop": [], "engram": []}}
    assert results["holds_90"]["2"].keys() == {"iso_flop", "engram"}


def test_hard_cases_of_every_form(done):
    config, _, results = done
    assert tuple(results["hard"]) == FORMS
    for form in FORMS:
        kinds = list(invent(form, 8, attributes=2, values=6).questions(8))
        for arm in config.hard_arms:
            assert list(results["hard"][form][arm]) == kinds
            for kind, recall in results["hard"][form][arm].items():
                low, high = results["hard_intervals"][form][arm][kind]
                assert low <= recall <= high


def test_real_facts_grow_to_all_there_are(done):
    _, _, results = done
    real = results["real"]
    assert (real["source"], real["facts"], real["skipped"]) == ("facts.jsonl", 30, {})
    assert real["answer_bits"] == pytest.approx(1)
    assert [one["facts"] for one in real["curve"]["2"]["engram"]] == [24, 30]
    assert real["curve"]["2"]["engram"][0]["loss_name"] is None


def test_results_are_plain_json(done):
    _, out, results = done
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))


def test_what_is_finished_is_not_run_again(done):
    config, out, results = done
    again = facts_study(config, out, say=silent)
    for part in ("curve", "hard", "real"):
        assert json.dumps(again[part]) == json.dumps(results[part])


def test_runs_of_another_form_are_not_mixed_in(done):
    config, out, _ = done
    with pytest.raises(MismatchError, match="another configuration"):
        facts_study(replace(config, form="long"), out, say=silent)


def test_tables_show_every_part(done):
    *_, results = done
    console = Console(width=200)
    with console.capture() as capture:
        print_results(results, console)
    shown = capture.get()
    assert "made-up facts, told 2 times" in shown
    assert "30 facts; left out: none." in shown
    assert "question, told as a statement" in shown


def test_the_report_takes_the_results(done):
    _, out, _ = done
    page = write_report(out).read_text(encoding="utf-8")
    assert "iso" in page
    assert "held-out phrasing" in page


def test_ctrl_c_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_jobs", lambda groups: None)
    lines = []
    assert facts_study(TINY, tmp_path, say=lines.append) is None
    assert lines[-1].startswith("Stopped.")
    assert not (tmp_path / "results.json").exists()


def test_the_command_takes_the_budget_and_what_overrides_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "facts_study", lambda config, out, **_: asked.append((config, out)))
    assert Facts(budget="quick", counts=(10, 20), hard=True, real="geonames", out=tmp_path).run(Console()) == 130
    quick = BUDGETS["quick"]
    assert asked == [(replace(quick, counts=(10, 20), hard=True, real="geonames"), tmp_path)]


# --- what is trained ----------------------------------------------------------------------------------------


def test_every_arm_is_described():
    assert set(ARMS) == set(DESCRIPTIONS)


@pytest.mark.parametrize("budget", BUDGETS)
def test_arms_of_the_budgets(budget):
    """As much arithmetic without the memory; as many rows in two layers."""
    config = BUDGETS[budget]
    people = invent("single", 10)
    runs = {arm: train_config(config, arm, people, 1, 0) for arm in ARMS}
    sizes = {arm: count(run.model, context=run.length) for arm, run in runs.items()}
    assert sizes["iso_flop"].training_flops == pytest.approx(sizes["engram"].training_flops, rel=0.01)
    assert sizes["second_layer"].tables == pytest.approx(sizes["engram"].tables, rel=0.001)
    assert len(runs["second_layer"].model.memory.hash.layers) == len(config.model.memory.hash.layers) + 1
    assert runs["no_convolution"].model.memory.engram.conv_kernel == 0
    assert sizes["no_convolution"].tables == sizes["engram"].tables
    assert sizes["base"].total < sizes["iso_flop"].total


def test_two_layers_share_the_rows_of_one():
    train = TrainConfig(replace(ENGRAM, memory=replace(ENGRAM.memory, hash=replace(ENGRAM.memory.hash, layers=(0,)))))
    both = train_of_arm(train, "second_layer").model.memory.hash
    assert both.layers == (0, 1)
    assert (
        0.9 * prime_sizes(train.model.memory.hash).sum()
        < prime_sizes(both).sum()
        <= prime_sizes(train.model.memory.hash).sum()
    )
    with pytest.raises(ConfigError, match="beyond the last"):
        train_of_arm(TrainConfig(ENGRAM), "second_layer")


@pytest.mark.parametrize(("facts", "batch", "steps"), [(60, 16, 12), (128, 32, 12), (1000, 250, 12), (1001, 250, 13)])
def test_every_fact_is_told_as_often_in_about_as_many_steps(facts, batch, steps):
    config = replace(TINY, steps_per_epoch=4, min_batch=16)
    train = train_config(config, "engram", invent("single", facts), 3, 0)
    assert (train.batch_size, train.steps) == (batch, steps)
    assert 0 <= train.steps * train.batch_size - 3 * facts < batch


@pytest.mark.parametrize(
    "changes",
    [
        {"model": replace(ENGRAM, memory=None)},
        {"counts": ()},
        {"counts": (8, 8)},
        {"exposures": (0,)},
        {"seeds": 0},
        {"attributes": 4, "counts": (3,)},
        {"hard_facts": 1},
        {"curve": False},
    ],
)
def test_what_cannot_be_meant_is_refused(changes):
    with pytest.raises(ConfigError):
        replace(TINY, **changes)


# --- what is concluded --------------------------------------------------------------------------------------


def points(*recalls: float, steps: int = 100) -> list[dict]:
    return [{"facts": 1000 * 2**n, "recall": recall, "steps": steps} for n, recall in enumerate(recalls)]


def test_what_is_held():
    assert holds(points(0.5, 0.1)) == {"facts": 0, "interpolated": None, "open": False}
    assert holds(points(0.95, 1.0)) == {"facts": 2000, "interpolated": None, "open": True}
    found = holds(points(1.0, 0.95, 0.85, 0.1))
    assert (found["facts"], found["open"]) == (2000, False)
    assert found["interpolated"] == pytest.approx(2000 * math.sqrt(2))
    assert holds(points(0.9, 0.1))["interpolated"] == pytest.approx(1000)
    assert holds(points(0.6, 0.95, 0.2))["facts"] == 2000  # the smallest size had too few steps


def test_a_ratio_says_whether_it_is_a_bound():
    held, more, all_held, none = (holds(points(*r)) for r in ((0.9, 0), (1, 1, 0.9, 0), (1, 1, 1, 1), (0.1, 0)))
    assert ratio(more, held, 1000) == (pytest.approx(4), False)
    assert ratio(all_held, held, 1000) == (pytest.approx(8), True)
    assert ratio(more, none, 1000) == (pytest.approx(4), True)
    assert ratio(none, held, 1000) == ratio(more, all_held, 1000) == (None, False)


def test_larger_sizes_are_given_up_unless_the_smaller_one_had_too_few_steps():
    config = replace(TINY, give_up=0.5, steps_per_epoch=10)
    assert not hopeless([], config, 10)
    assert not hopeless(points(1.0, 0.5), config, 10)
    assert hopeless(points(1.0, 0.49), config, 10)
    assert not hopeless(points(0.3, steps=99), config, 10)


def test_sizes_that_are_given_up_are_said(tmp_path, monkeypatch):
    config = replace(TINY, counts=(24, 48, 96), give_up=0.5)
    asked = []

    def run(groups):
        asked.append([job.directory.parent.name for job in groups[0]])
        kinds = [
            {"as told": {"right": 10 * (job.config.model.memory is not None), "asked": 10, "loss": 1.0}}
            for job in groups[0]
        ]
        return [[{"kinds": one, "loss_name": 1.0, "step_seconds": [1.0]} for one in kinds]]

    monkeypatch.setattr(study, "run_jobs", run)
    results = facts_study(config, tmp_path, say=silent)
    assert asked == [["iso_flop", "engram"], ["engram"], ["engram"]]
    assert results["not_run"] == {"2": {"iso_flop": [48, 96], "engram": []}}
    assert results["holds_90"]["2"]["engram"] == {"facts": 96, "interpolated": None, "open": True}
    assert (results["ratio"], results["ratio_at_least"]) == ({"2": 4.0}, {"2": True})
    assert (
        summary("2", results)
        == "at 90 % recall: iso_flop fewer than were tried; engram at least 96; at least 4 times as many"
    )


def test_seeds_are_pooled(tmp_path):
    people = invent("single", 100, values=16)
    job = study.job(TINY, "engram", people, 1, 0, tmp_path)

    def seed(right: int, loss: float) -> dict:
        kinds = {"as told": {"right": right, "asked": 100, "loss": loss}}
        return {"kinds": kinds, "loss_name": people.name_bits * math.log(2), "step_seconds": [2.0]}

    found = point(job, people, [seed(50, 0.0), seed(100, 2 * math.log(2))])
    assert (found["recall"], found["seeds"], found["seconds"]) == (0.75, [0.5, 1.0], 2.0)
    assert found["interval"] == pytest.approx((0.686, 0.805), abs=0.001)
    assert found["value_bits"] == pytest.approx(100 * (4 - 1))  # all but one of four bits each
    assert found["bits"] == pytest.approx(found["value_bits"])  # of names nothing is known


def test_a_memory_is_handed_the_rows_of_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FLIPPED", 8)
    curve = facts_study(replace(TINY, counts=(24,)), tmp_path, say=silent)["curve"]["2"]
    flips = curve["engram"][0]["flips"]
    assert flips["pairs"] + flips["same"] == 8
    assert curve["iso_flop"][0]["flips"] is None


def test_rows_are_exchanged_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FLIPPED", 2)
    config = replace(TINY, curve=False, hard=True, values=50, hard_arms=("engram",))
    flips = facts_study(config, tmp_path, say=silent)["hard_flips"]
    assert {form: arms["engram"]["pairs"] + arms["engram"]["same"] for form, arms in flips.items()} == dict.fromkeys(
        FORMS, 2
    )
