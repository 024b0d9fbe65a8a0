"""Pages of studies, from made-up results: no figure in this file was ever measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import cache

import numpy as np
import pytest
from test_report import EVIL, Page, make_gates

from engram_lm import config
from engram_lm.report import compare as study
from engram_lm.report import compare_verdict as study_verdict
from engram_lm.report import facts as facts_page
from engram_lm.report import plots, verdict
from engram_lm.report import sweep as sweep_page
from engram_lm.report.differences import number, outcome, signed
from engram_lm.report.plots import style
from engram_lm.report.plots.sweep import band
from engram_lm.statistics import wilson
from engram_lm.study.fits import log_linear, u_curve

ENVIRONMENT = {"machine": "Linux x86_64, 2 cores", "device": "cpu", "threads": 2, "versions": {"torch": "2.13.0"}}
RUN = {"command": "engram-lm compare tiny", "environment": ENVIRONMENT, "minutes": 61.0, "seeds": [0, 1, 2]}
DATA = {
    "source": "some text",
    "train_tokens": 10_000_000,
    "train_documents": 5000,
    "held_out_tokens": 500_000,
    "held_out_documents": 250,
    "read_tokens": 4_000_000,
}
CHANGES = {  # of a comparison that goes well
    "base": 0.0,
    "bigram": -0.2,
    "engram": -0.4,
    "capacity_1": -0.01,
    "frozen_random": -0.03,
    "shuffled": 0.02,
    "ffn": -0.05,
    "iso_flop": -0.06,
    "moe": -0.1,
}


def less(change: float, half: float = 0.02, seeds: int = 3, spread: float = 0.01) -> dict:
    """A paired difference, its interval over documents `half` wide to either side, seeds `spread` apart."""
    each = [change + spread * (seed - (seeds - 1) / 2) for seed in range(seeds)]
    interval = [change - 2.5 * spread, change + 2.5 * spread] if seeds > 1 else None
    return {"difference": change, "interval": [change - half, change + half], "seeds": each, "seed_interval": interval}


def make_study(changes: dict[str, float] = CHANGES, steps: int = 400, **how: float) -> dict:
    """Arms that end at 5 nats and what `changes` says; `how`: see `less`."""
    tokens = np.linspace(1e4, 4e6, steps)
    arms = {}
    for name, change in changes.items():
        curve = np.stack([tokens, 5 + change + 3e5 / tokens], 1).tolist()
        arms[name] = {
            "description": f"the arm {name}",
            "equal": "tokens",
            "same_as": None,
            "against_engram": {"flops": 1.001, "active": 0.8, "total": 0.1, "seconds": 0.7},
            "parameters": {"total": 14_000_000, "active": 1_900_000, "tables": 12_000_000},
            "flops_per_token": 8e6,
            "bytes_per_token": 1024,
            "step_seconds": 0.25,
            "loss": 5 + change,
            "interval": [4.9 + change, 5.1 + change],
            "seeds": [5 + change - 0.01, 5 + change, 5 + change + 0.01],
            "bits_per_byte": 2.1,
            "less": {other: less(change - theirs, **how) for other, theirs in changes.items() if other != name},
            "curve": curve,
            "val_curve": curve[:: max(1, steps // 10)],
        }
    return {**RUN, "data": DATA, "arms": arms}


def make_slices(results: dict, seen: float = 1.6, unseen: float = 0.1) -> dict:
    """Gains of `seen` and `unseen` times the whole one."""
    labels, shares = ["start", "0", "1-3", "4-31", "32+"], [0.05, 0.35, 0.2, 0.2, 0.2]
    arms = {}
    for name in results["arms"]:
        change = CHANGES[name]
        gains = [0.0, *(change * times for times in (unseen, seen, seen, seen))]
        part = [share * gain / change for share, gain in zip(shares, gains, strict=True)] if change else [None] * 5
        arms[name] = {"loss": [5 + gain for gain in gains], "less_base": [less(gain) for gain in gains], "part": part}
        arms[name]["less_base"][0] = None
    kinds = ("seen 2-gram", "seen 3-gram", "seen 2-gram with its next token", "position", "token class")
    return {**results, "slices": {kind: {"labels": labels, "share": shares, "arms": arms} for kind in kinds}}


def make_probes(layers: int = 4) -> dict:
    """What every probe returns."""
    points = np.linspace(0, 1, layers + 1)
    parts = {"all on": (0.0, None), "no memory": (0.5, [0.45, 0.55]), "no 2-grams": (0.2, [0.1, 0.3])}
    ngrams = [{"text": " of\n", "mean": 0.9, "times": 30}, {"text": "你", "mean": 0.8, "times": 4}]
    stream = {"mean": 0.4, "quartiles": [0.2, 0.4, 0.6], "closed": 0.01, "open": 0.0, "histogram": [0.05] * 20}
    by_seen = {"seen": ["0", "1-3", "4-31", "32+"], "share": [0.25] * 4, "mean": [0.1, 0.2, None, 0.6]}
    block = {"rows": 1000, "coverage": 0.4, "ngrams": 900, "ngrams_per_row": 1.5, "shared": 0.3, "shared_reads": 0.5}
    return {
        "knockout": {
            "tokens": 9000,
            "documents": 50,
            "variants": {
                name: {"loss": 4.6 + rise, "difference": rise, "interval": over} for name, (rise, over) in parts.items()
            },
        },
        "gates": {
            "tokens": 9000,
            "layers": [
                {
                    "layer": layer,
                    "streams": [stream],
                    "delta_rms": 0.1,
                    "hidden_rms": 1.0,
                    "relative": 0.1,
                    "by_seen": {"2": by_seen, "3": by_seen},
                    "highest": ngrams,
                    "lowest": ngrams[::-1],
                }
                for layer in (1, 2)
            ],
        },
        "gate_view": config.to_dict(make_gates()),
        "usage": {
            "tokens": 100_000,
            "reads": 800_000,
            "rows": 4000,
            "used": 1500,
            "coverage": 0.375,
            "histogram": {"reads": ["0", "1", "2-3"], "rows": [2500, 1000, 500], "share_of_reads": [0, 0.4, 0.6]},
            "blocks": [{**block, "layer": 1, "order": order, "indistinguishable": 0.01} for order in (2, 3)],
            "norms": {"unmoved": 0.02, "by_reads": [{"reads": "1", "rows": 1000, "norm": 0.5, "moved": 0.4}]},
            "hot": {"rows": [1, 4, 16, 1500], "share": [0.1, 0.2, 0.4, 1.0]},
            "cache": {"tokens": 8192, "slots": [8, 64, 512], "s3fifo": [0.2, 0.4, 0.6], "static": [0.2, 0.5, 0.6]},
        },
        "lens": {
            name: {
                "layers": list(range(layers + 1)),
                "kl": (height * (1 - points)).tolist(),
                "kl_interval": [[max(0.0, kl - 0.05), kl + 0.05] for kl in height * (1 - points)],
                "agreement": points.tolist(),
                "tokens": 1000,
            }
            for name, height in (("engram", 3.0), ("base", 4.0))
        },
        "cka": {
            "cka": [[None, *row[1:]] for row in np.exp(-np.abs(points[:, None] - points)).tolist()],
            "alignment": [None, 2.5, 3.0, 3.2, 3.9],
            "alignment_error": [None, 0.1, 0.1, 0.2, 0.2],
            "k": 2,
            "samples": 128,
            "minibatches": 40,
        },
        "seconds": {"knockout": 1.0},
    }


def full_study() -> dict:
    return {**make_slices(make_study()), "probes": make_probes()}


def make_sweep(
    kind: str = "memory", slope: float = -0.05, bend: float = 0.0, seeds: int = 2, spread: float = 0.001
) -> dict:
    """Points on a line over log10(rows), or on a U over shares; seeds `spread` apart, in turns."""
    if kind == "memory":
        x = np.geomspace(1000, 400_000, 7)
        heights = 5 + slope * np.log10(x) + bend * (np.log10(x) - 4.3) ** 2
        paper_x, paper_y, fit = (
            np.geomspace(2e5, 1e7, 5),
            1.94 - 0.0284 * np.log10(np.geomspace(2e5, 1e7, 5)),
            log_linear,
        )
    else:
        x = np.array([1.0, 0.95, 0.85, 0.75, 0.65, 0.55, 0.4])
        heights = 5 + bend * (x - 0.7) ** 2 + slope * (1 - x)
        paper_x, paper_y, fit = x, 1.71 + 0.13 * (x - 0.75) ** 2, u_curve
    noise = 0.0005 * np.cos(np.arange(len(x)) * 2.4)
    one_way_then_the_other = (-1.0) ** np.arange(len(x))[:, None]
    losses = (heights + noise)[:, None] + spread * one_way_then_the_other * (np.arange(seeds) - (seeds - 1) / 2)

    def point(name: str, place: float, of_seeds: np.ndarray, first: np.ndarray) -> dict:
        return {
            "name": name,
            "rows": int(place) if kind == "memory" else 5000,
            "rho": None if kind == "memory" else float(place),
            "total": 10_000_000,
            "active": 1_000_000,
            "flops_per_token": 8e6,
            "seeds": of_seeds.tolist(),
            "loss": float(of_seeds.mean()),
            "interval": [float(of_seeds.mean()) - 0.05, float(of_seeds.mean()) + 0.05],
            "less": less(float((of_seeds - first).mean()), 0.004, seeds, 0.0005),
        }

    base = np.full(seeds, 5.1)
    first = base if kind == "memory" else losses[0]
    curve = {"label": "the paper", "x": paper_x.tolist(), "y": paper_y.tolist(), "fit": fit(paper_x, paper_y[:, None])}
    return {
        **RUN,
        "seeds": list(range(seeds)),
        "kind": kind,
        "points": [point(f"point-{place:g}", place, own, first) for place, own in zip(x, losses, strict=True)],
        "base": point("base", 0, base, base) if kind == "memory" else None,
        "fit": fit(x, losses),
        "paper": curve,
        "paper_also": [curve],
        "data": DATA,
    }


def make_facts(times: float = 40.0) -> dict:
    """The memory holds `times` times what iso_flop holds: recall falls from all to nothing over a decade."""
    counts, crossing = [500 * 2**power for power in range(9)], {"iso_flop": 1000.0, "engram": 1000.0 * times}

    def points(arm: str) -> list[dict]:
        return [
            {
                "facts": facts,
                "recall": (recall := 1 / (1 + (facts / crossing[arm] / 1.7) ** 4)),
                "interval": list(wilson(recall, 4000)),
                "bits_per_parameter": 0.1,
                "bits_per_active": 0.5,
            }
            for facts in counts
        ]

    def held(arm: str) -> dict:
        return {"facts": int(crossing[arm]), "interpolated": crossing[arm], "open": False}

    size = {"total": 10_000_000, "active": 100_000, "tables": 9_000_000, "flops_per_token": 600_000}
    told = ("10", "100")
    hard = {
        "single": {"iso_flop": {"direct": 0.1}, "engram": {"direct": 0.99}, "no_convolution": {"direct": 0.9}},
        "paraphrase": {
            "iso_flop": {"told": 0.1, "held out": 0.1},
            "engram": {"told": 0.9, "held out": 0.1},
            "no_convolution": {"told": 0.9, "held out": 0.1},
        },
        "long": {"iso_flop": {"direct": 0.5}, "engram": {"direct": 0.2}, "no_convolution": {"direct": 0.2}},
    }
    flips = {"pairs": 63, "same": 1, "right": 0.984, "flipped": 0.25, "shift": -3.21}
    run = {name: value for name, value in RUN.items() if name != "minutes"}
    curves = {
        "curve": {exposures: {arm: points(arm) for arm in crossing} for exposures in told},
        "not_run": {},
        "holds_90": {exposures: {arm: held(arm) for arm in crossing} for exposures in told},
        "ratio": dict.fromkeys(told, times),
        "ratio_at_least": {"10": False, "100": True},
        "parameters": dict.fromkeys(crossing, size),
    }
    return {
        **run,
        "wall_minutes": 30.0,
        "arms": {name: f"the arm {name}" for name in ("base", "iso_flop", "engram", "no_convolution")},
        **curves,
        "hard": hard,
        "hard_intervals": {
            form: {arm: {kind: [r - 0.02, r + 0.02] for kind, r in kinds.items()} for arm, kinds in arms.items()}
            for form, arms in hard.items()
        },
        "hard_flips": {
            form: {"iso_flop": None, "engram": flips} for form, flips in (("single", flips), ("long", None))
        },
        "real": {**curves, "source": "cities.jsonl", "facts": 4000, "skipped": {"without an answer": 3}},
    }


@cache
def all_pages() -> dict[str, str]:
    return {
        "study": study.render(full_study()),
        "memory": sweep_page.render(make_sweep("memory")),
        "allocation": sweep_page.render(make_sweep("allocation", 0.0, 0.2)),
        "facts": facts_page.render(make_facts()),
    }


@pytest.fixture
def undrawn(monkeypatch):
    """Notes in the place of figures: for what is about words."""

    def missing(what="this figure"):
        raise plots.MissingExtraError(f"{what}: pip install 'engram-lm[plot]'")

    monkeypatch.setattr(style, "figure_class", missing)


# --- pages ----------------------------------------------------------------------------------------------------------


def test_pages_are_whole_small_and_ask_for_nothing_from_the_network():
    for name, page in all_pages().items():
        parsed = Page(page)  # fails where tags do not nest
        assert len(page.encode()) < 5_000_000, name
        assert parsed.all("svg"), name
        assert not re.search(r"\$[a-z]", parsed.text), name
        assert "None" not in parsed.text, name
        assert "nan" not in parsed.text.split(), name
        ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), name
        for tag, attributes in parsed.elements:
            assert tag not in {"link", "img", "image", "iframe", "object", "embed"}, name
            links = [value for key, value in attributes.items() if key in {"src", "href", "xlink:href"}]
            assert all(link.startswith("#") for link in links), name
        policy = next(meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
        assert policy.startswith("default-src 'none'"), name


def test_a_study_of_realistic_size_stays_small():
    results = {**make_slices(make_study(steps=5000)), "probes": make_probes()}
    results["probes"]["gate_view"] = config.to_dict(make_gates("words of a text " * 30, layers=(1, 2, 5), streams=4))
    assert len(study.render(results).encode()) < 5_000_000


@pytest.mark.parametrize("write", [study.write_report, sweep_page.write_report, facts_page.write_report])
def test_reports_are_written_beside_their_results(write, tmp_path, undrawn):
    results = {study: full_study, sweep_page: make_sweep, facts_page: make_facts}
    make = next(make for module, make in results.items() if module.write_report is write)
    (tmp_path / "results.json").write_text(json.dumps(make()), encoding="utf-8")
    assert write(tmp_path) == tmp_path / "report.html"
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_hostile_text_stays_text(undrawn):
    results = full_study()
    results["command"] = results["data"] = EVIL
    results["data"] = {**DATA, "source": EVIL}
    results["environment"] = {**ENVIRONMENT, "machine": EVIL}
    results["arms"]["engram"]["description"] = EVIL
    results["probes"]["gate_view"] = config.to_dict(dataclasses.replace(make_gates(EVIL), source=EVIL))
    for layer in results["probes"]["gates"]["layers"]:
        layer["highest"] = layer["lowest"] = [{"text": EVIL, "mean": 0.5, "times": 9}]
    facts = make_facts()
    facts["arms"]["engram"] = facts["command"] = facts["real"]["source"] = EVIL
    facts["real"]["skipped"] = {EVIL: 3}
    sweep = make_sweep()
    sweep["paper"] = {**sweep["paper"], "label": EVIL}
    sweep["points"][0]["name"] = sweep["command"] = EVIL
    calm = all_pages()
    for name, page in (
        ("study", study.render(results)),
        ("facts", facts_page.render(facts)),
        ("memory", sweep_page.render(sweep)),
    ):
        parsed = Page(page)
        assert "<script>alert('x')</script>" in parsed.text
        assert len(parsed.all("script")) == len(Page(calm[name]).all("script"))
        assert not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", page)
        assert not any(key.startswith("on") for _, attributes in parsed.elements for key in attributes)


def test_what_was_not_measured_leaves_no_trace(undrawn):
    parsed = Page(study.render(make_study()))
    assert "pip install 'engram-lm[plot]'" in parsed.text
    for absent in ("Where the gain lies", "What the memory does", "What it does to the layers"):
        assert absent not in parsed.text
        assert absent in Page(study.render(full_study())).text


@pytest.mark.parametrize("part", ["knockout", "gates", "usage", "gate_view", "lens", "cka"])
def test_each_probe_stands_alone(part, undrawn):
    headings = {
        "knockout": "What is lost without a part",
        "gates": "How wide the gates open",
        "usage": "How the table is used",
        "gate_view": "Where the memory was let in",
        "lens": "How early the prediction is ready",
        "cka": "Which layers are alike",
    }
    said = Page(study.render({**make_study(), "probes": {part: make_probes()[part]}})).text
    assert [name for name, heading in headings.items() if heading in said] == [part]


def test_an_arm_that_is_another_ones_twin_is_named_so(undrawn):
    results = make_study({name: CHANGES[name] for name in ("base", "engram", "ffn")})
    results["arms"]["iso_flop"] = {**results["arms"]["ffn"], "same_as": "ffn"}
    page = Page(study.render(results)).text
    assert "iso_flop (the same model as ffn)" in page
    assert study_verdict.less(results, "engram", "iso_flop") == results["arms"]["engram"]["less"]["ffn"]
    assert study_verdict.less(results, "iso_flop", "ffn") is None


# --- what pages say -------------------------------------------------------------------------------------------------


def said_of(results: dict) -> str:
    return " ".join(study_verdict.verdict(results))


def test_a_gain_that_both_intervals_carry_is_called_one():
    said = said_of(make_slices(make_study()))
    assert "lowers held-out loss by 0.400 nats a token" in said
    assert "Neither interval holds 0" in said
    assert "needs looking up, learned rows and the rows of its own text: that is memory" in said
    assert "nothing measurable is left" in said  # of capacity_1
    assert "is worse than base" not in said
    assert "The gain is concentrated behind 3-grams that were seen" in said


@pytest.mark.parametrize(
    ("engram", "how", "says"),
    [
        (-0.4, {"spread": 0.3}, "but not reliably"),
        (-0.4, {"seeds": 1}, "One seed was trained"),
        (-0.01, {}, "shows no effect of the memory"),
        (0.2, {}, "did not help: it raises held-out loss by 0.200"),
    ],
)
def test_what_is_not_shown_is_not_claimed(engram, how, says):
    results = make_study({**CHANGES, "engram": engram}, **how)
    said = said_of(results)
    assert says in said
    assert "Neither interval holds 0" not in said
    assert study_verdict.helps(results) == (how == {"seeds": 1})
    assert ("of the gain needs" in said) == study_verdict.helps(results)


@pytest.mark.parametrize(
    ("control", "change", "says"),
    [
        ("capacity_1", -0.3, "Most of the gain does without looking up"),
        ("frozen_random", -0.39, "does not show that learned rows made the difference"),
        ("shuffled", -0.5, "does not show that the rows of its own text made the difference"),
    ],
)
def test_controls_that_keep_the_gain_are_said_to(control, change, says):
    said = said_of(make_study({**CHANGES, control: change}))
    assert says in said
    assert "So most of the gain" not in said


def test_rivals_that_do_better_speak_against_the_memory():
    said = said_of(make_study({**CHANGES, "bigram": -0.6, "moe": -0.405}))
    assert "(bigram, at equal FLOPs), the memory is higher, which speaks against it: +0.200" in said
    assert "(moe, at equal FLOPs), the memory cannot be told apart from it" in said
    assert "(ffn, at equal FLOPs), the memory is lower: −0.350" in said


@pytest.mark.parametrize(
    ("seen", "unseen", "says"),
    [(1.6, 0.1, "is concentrated"), (1.0, 1.0, "is not measurably larger"), (0.5, 1.5, "something other than memory")],
)
def test_where_the_gain_lies_follows_the_slices(seen, unseen, says):
    paragraphs = study_verdict.concentration(make_slices(make_study(), seen, unseen))
    assert len(paragraphs) == 2  # of 2-grams and 3-grams; not of those with their next token
    assert all(says in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("slope", "bend", "says"),
    [
        (-0.05, 0.0, ["lower held-out loss by 0.05", "rows buy less", "cannot be told from 0"]),
        (-0.0284, 0.0, ["The interval holds the paper’s slope"]),
        (-0.01, 0.0, ["rows buy more"]),
        (-0.05, 0.02, ["each decade buys less"]),
        (0.03, 0.0, ["More rows did not help"]),
        (0.0, 0.0, ["No effect of more rows"]),
    ],
)
def test_memory_sweeps_say_what_rows_buy(slope, bend, says):
    said = " ".join(sweep_page.verdict(make_sweep("memory", slope, bend)))
    assert all(words in said for words in says), said


@pytest.mark.parametrize(
    ("slope", "bend", "seeds", "spread", "says"),
    [
        (
            0.0,
            0.5,
            2,
            0.0001,
            ["Giving a part to a memory helps", "lowest at 70", "Each of 2 seeds puts the best point below"],
        ),
        (0.0, 0.5, 2, 0.05, ["cannot be told from them"]),
        (0.0, 0.5, 1, 0.0, ["With one seed"]),
        (0.5, 0.0, 2, 0.001, ["The memory did not help: the pure mixture"]),
        (0.0, -0.5, 2, 0.001, ["there is no U here"]),
    ],
)
def test_allocation_sweeps_say_where_the_minimum_is(slope, bend, seeds, spread, says):
    said = " ".join(sweep_page.verdict(make_sweep("allocation", slope, bend, seeds, spread)))
    assert all(words.replace(" %", f"{verdict.THIN}%") in said for words in says), said


def test_facts_say_who_holds_how_many_and_where_the_memory_does_not_help():
    results = make_facts()
    few, many = facts_page.verdict(results)
    assert "engram holds about 40,000 facts" in few
    assert "that is 40 times as many as iso_flop holds" in few
    assert "at least 40 times" in many
    said = facts_page.hard_verdict(results)
    assert "The memory recalls more than iso_flop in 2 of 4 cases: single: direct" in said[0]
    assert said[1].startswith("The memory does not help")
    assert "paraphrase: held out" in said[1]
    assert said[2].startswith("The memory recalls less")
    assert "long: direct" in said[2]
    assert said[3].startswith("Without the convolution, recall is lower in single: direct")


def test_flips_are_shown_where_they_were_tried():
    page = all_pages()["facts"]
    assert f"<td>98{verdict.THIN}%</td><td>25{verdict.THIN}%</td><td>{verdict.MINUS}3.2</td><td>63</td>" in page
    assert "Causal flips" not in facts_page.render({n: v for n, v in make_facts().items() if n != "hard_flips"})


def test_a_memory_that_holds_nothing_is_said_to():
    results = make_facts(0.5)
    assert "did not help: that is 0.5 times" in facts_page.verdict(results)[0]
    results["holds_90"]["10"]["engram"] = {"facts": 0, "interpolated": None, "open": False}
    results["ratio"]["10"] = None
    assert "does not hold the smallest number" in facts_page.verdict(results)[0]


@pytest.mark.parametrize(
    ("interval", "side"),
    [([-2, -1], "lower"), ([1, 2], "higher"), ([-1, 1], "same"), ([-1, 0], "same"), (None, "same")],
)
def test_only_intervals_without_0_have_a_side(interval, side):
    assert outcome({"difference": 0.5, "interval": interval}) == side


def test_differences_are_written_with_true_minus_signs():
    assert signed({"difference": -0.1234, "interval": [-0.2, 0.1]}) == "−0.123 (−0.200 to +0.100)"
    assert signed({"difference": 0.5, "interval": None}, 1) == "+0.5"
    assert number(-0.02841, 4) == "−0.0284"


# --- figures --------------------------------------------------------------------------------------------------------


def figures() -> dict[str, str]:
    results, probes = make_slices(make_study()), make_probes()
    return {
        "forest": plots.forest(results),
        "slices": plots.slice_gains(results, "seen 2-gram"),
        "curves": plots.arm_curves(results),
        "gains": plots.gain_curves(results),
        "knockouts": plots.knockouts(probes["knockout"]),
        "lens": plots.lens_curves(probes["lens"]),
        "cka": plots.alignment(probes["cka"]),
        "sweep": plots.sweep_curve(make_sweep()),
        "facts": plots.recall_by_facts(make_facts(), "100"),
    }


def test_figures_are_deterministic_and_take_the_pages_colours():
    drawn = figures()
    assert drawn["cka"] == plots.alignment(make_probes()["cka"])
    assert drawn["sweep"] == plots.sweep_curve(make_sweep())
    for name, svg in drawn.items():
        assert "currentColor" in svg, name
        assert plots.INK not in svg, name
        assert "<image" not in svg, name  # the page's policy forbids pictures


def test_figures_can_be_saved_alone(tmp_path):
    plots.save(plots.forest(make_study()), tmp_path / "forest.svg")
    text = (tmp_path / "forest.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    assert "background:#fff" in text


def test_a_forest_of_one_seed_and_one_document_has_no_intervals():
    results = make_study(seeds=1)
    for arm in results["arms"].values():
        for difference in arm["less"].values():
            difference["interval"] = None
    assert "<svg" in plots.forest(results)
    assert "shows no effect" in said_of(results)


@pytest.mark.parametrize("degree", [1, 2])
def test_the_band_is_that_of_least_squares(degree):
    """Against the textbook's formula with the residual and Student's t written out."""
    x, t = np.linspace(0, 3, 9), 2.365 if degree == 1 else 2.447  # 7 and 6 degrees of freedom
    y = 5 - 0.3 * x + 0.1 * np.sin(7 * x)
    design = np.vander(x, degree + 1, increasing=True)
    coefficients, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    inverse = np.linalg.inv(design.T @ design)
    noise = math.sqrt(squares[0] / (len(x) - degree - 1))
    intervals = [
        (c - t * noise * math.sqrt(v), c + t * noise * math.sqrt(v))
        for c, v in zip(coefficients, np.diag(inverse), strict=True)
    ]
    expected = [t * noise * math.sqrt(row @ inverse @ row) for row in design]
    found = band(x, x, {"coefficients": coefficients.tolist(), "intervals": intervals})
    np.testing.assert_allclose(found, expected, rtol=1e-9)
