import builtins
import dataclasses
import itertools
import re
from html.parser import HTMLParser

import pytest
import torch

from engram_lm import config
from engram_lm.analysis.gates import gate_view
from engram_lm.report import plots, verdict
from engram_lm.report.quickstart import (
    Arm,
    AttributeRecall,
    Command,
    FactExample,
    FactsAct,
    FactsArm,
    LanguageAct,
    Report,
    RunInfo,
    Sample,
    render,
    write_report,
)
from engram_lm.statistics import wilson

EVIL = "<script>alert('x')</script> & \"q\" $style ${x} \x00\x1b[31m\u202e \udc80 你好 🐼"


def make_arm(name, loss, delta=None, interval=None, **changes):
    curve = tuple((tokens * 1000.0, loss + 100 / tokens) for tokens in range(1, 201))
    arm = Arm(
        name=name,
        description=f"the arm {name}",
        parameters=1_900_000,
        active_parameters=1_900_000,
        table_parameters=0,
        flops_per_token=8e6,
        bytes_per_token=1024,
        curve=curve,
        val_curve=curve[19::20],
        val_loss=loss,
        val_interval=0.02,
        bits_per_byte=loss / 2,
        tokens_per_second=19_000.0,
        delta=delta,
        delta_interval=interval,
    )
    return dataclasses.replace(arm, **changes)


def make_language(engram=-0.38, control=-0.02, interval=0.01, **changes):
    act = LanguageAct(
        data="Python source",
        base=make_arm("base", 4.67),
        capacity_1=make_arm("capacity-1", 4.67 + control, control, interval),
        engram=make_arm("engram", 4.67 + engram, engram, interval, table_parameters=12_800_000),
    )
    return dataclasses.replace(act, **changes)


def make_facts(base=0.01, engram=0.999):
    def arm(name, final):
        recall = tuple((float(n), final * n / 10) for n in range(11))
        return FactsArm(name, 1_900_000, 0, recall, (AttributeRecall("city", final), AttributeRecall("company", final)))

    examples = (FactExample("Ada Byron Lace lives in", "Turin", "Oslo", " Turin"),)
    return FactsAct(1000, 4000, 0.01, arm("base", base), arm("engram", engram), examples)


def make_report(language=None, facts=None, title="A run"):
    run = RunInfo("engram-lm quickstart", 0, "2026-01-01", 263.0, "2 cores", ("torch 2.13.0",), "By bootstrap.")
    return Report(title, language or make_language(), run, facts, (Command("engram-lm count tiny", "Count"),))


def make_gates(text="def f():\n\treturn 1", layers=(1, 2), streams=1):
    pieces = [letter.encode("utf-8", "replace") for letter in text]
    gates = torch.linspace(0.1, 0.9, len(pieces) * len(layers) * streams).reshape(len(pieces), len(layers), streams)
    return gate_view(pieces, gates, layers=layers, orders=(2, 3), source="a.py", seen=[[3, 1]] * len(pieces))


class Page(HTMLParser):
    """Elements, ids and text of a page; fails where tags do not nest."""

    VOID = frozenset({"meta", "input", "br", "path", "use"})

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def full_report():
    sample = Sample("def f(", "x):\n    return x", "temperature 0.8")
    return make_report(make_language(gates=make_gates(), sample=sample), make_facts())


def test_page_is_complete_well_formed_and_small():
    page = render(full_report())
    assert len(page.encode()) < 2_000_000
    parsed = Page(page)
    for heading in ("Language", "Facts", "Where the memory was let in", "What it writes", "What this run is"):
        assert heading in parsed.text
    for figure in ("4.290 ±", "12.8", "4 min 23 s", "2 cores", "engram-lm count tiny"):
        assert figure in parsed.text
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"\$[a-z]", parsed.text)


def test_page_asks_for_nothing_from_the_network():
    parsed = Page(render(full_report()))
    for tag, attributes in parsed.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed"}
        assert all(value.startswith("#") for name, value in attributes.items() if name in {"src", "href", "xlink:href"})
    policy = next(meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_hostile_text_stays_text():
    gates = dataclasses.replace(make_gates(EVIL), source=EVIL)
    language = make_language(data=EVIL, sample=Sample(EVIL, EVIL, EVIL), gates=gates)
    language = dataclasses.replace(
        language, engram=dataclasses.replace(language.engram, name="<b>&$x$", description=EVIL)
    )
    facts = dataclasses.replace(make_facts(), examples=(FactExample(EVIL, EVIL, EVIL, EVIL),))
    report = make_report(language, facts, title=EVIL)
    calm, hostile = Page(render(full_report())), Page(render(report))
    assert len(hostile.all("script")) == len(calm.all("script")) == 1
    assert hostile.text.count("<script>alert('x')</script>") > 8
    assert not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", hostile.text)
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)


def test_values_beside_the_page_give_the_same_page(tmp_path):
    report = make_report(make_language(gates=make_gates(), sample=Sample(EVIL, EVIL, "greedy")), make_facts())
    path = tmp_path / "report.html"
    write_report(path, report)
    assert config.load(Report, tmp_path / "report.json") == report
    assert path.read_bytes().decode() == render(report).encode("utf-8", "replace").decode()
    assert render(config.load(Report, tmp_path / "report.json")) == render(report)


def test_without_facts_sample_and_gates_their_sections_are_absent():
    parsed = Page(render(make_report()))
    for absent in ("Act two", "What it writes", "Where the memory was let in"):
        assert absent not in parsed.text


def test_without_matplotlib_a_note_stands_where_the_figure_was(monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(plots.MissingExtraError, match=r"pip install 'engram-lm\[plot\]'"):
        plots.loss_curves(make_language())
    parsed = Page(render(make_report(facts=make_facts())))
    assert parsed.text.count("pip install 'engram-lm[plot]'") == 2
    assert not parsed.all("svg")
    assert "4.290 ±" in parsed.text


@pytest.mark.parametrize(("layers", "streams", "choices"), [((1,), 1, 0), ((1, 2), 1, 2), ((1, 2), 4, 8)])
def test_every_gate_can_be_chosen_and_read(layers, streams, choices):
    parsed = Page(render(make_report(make_language(gates=make_gates("ab\n", layers, streams)))))
    assert len(parsed.all("input")) == choices
    tokens = [span for span in parsed.all("span") if "data-tip" in span]
    assert len(tokens) == 3
    levels = [float(level) for span in tokens for level in span["data-levels"].split()]
    assert len(levels) == 3 * len(layers) * streams
    assert (min(levels), max(levels)) == (0, 1)
    assert "2-gram “ab”, seen 3 times" in tokens[1]["data-tip"]
    assert "3-gram “ab↵”, seen 1 time" in tokens[2]["data-tip"]
    assert all(f"block {layer}: gate" in tokens[0]["data-tip"] for layer in layers)


def test_answers_are_marked_by_sign_and_class():
    page = render(make_report(facts=make_facts()))
    assert '<td class="wrong">✗ Oslo</td><td class="right">✓  Turin</td>' in page


@pytest.mark.parametrize(
    ("engram", "control", "says"),
    [
        (-0.38, -0.02, ["lowers it by 0.380", "recovers 5.3", "most of the gain comes from looking"]),
        (-0.38, -0.005, ["lowers it by", "does not differ measurably", "not from the extra branch"]),
        (-0.38, 0.05, ["lowers it by", "worse than base", "not from the extra branch"]),
        (-0.38, -0.3, ["recovers 79", "less than half of the gain"]),
        (-0.38, -0.4, ["what helped is the branch"]),
        (-0.005, -0.02, ["shows no effect", "It differs from base by −0.020"]),
        (0.1, 0.02, ["did not help", "higher by 0.100"]),
    ],
)
def test_language_verdict_follows_the_figures(engram, control, says):
    paragraph = verdict.language(make_language(engram, control))[0]
    for words in says:
        assert words in paragraph
    assert ("lowers" in paragraph) == (engram < -0.01)


@pytest.mark.parametrize(
    ("base", "engram", "says"),
    [
        (0.01, 1.0, "passes 95\u202f% after 10 exposures"),
        (0.5, 0.501, "shows no effect"),
        (0.9, 0.2, "did not help"),
    ],
)
def test_facts_verdict_follows_the_figures(base, engram, says):
    paragraph = verdict.facts(make_facts(base, engram))
    assert says in paragraph
    assert ("hangs on a name" in paragraph) == (engram > base + 0.1)


def test_wilson_interval_of_a_known_case():
    low, high = wilson(0.5, 100)  # Newcombe 1998: 0.4038 to 0.5962
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson(1.0, 40)[1] == pytest.approx(1.0)
    assert wilson(0.0, 40)[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(0, "", "0"), (999, "", "999"), (1024, "B", "1.02 kB"), (3_212_000, "", "3.21 M"), (999_600, "", "1 M"),
     (18.53e9, "", "18.5 B"), (26.7e9, "B", "26.7 GB"), (640e6, "", "640 M")],
)  # fmt: skip
def test_quantities_have_three_figures(value, unit, shown):
    assert verdict.quantity(value, unit).replace(verdict.THIN, " ") == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.02, "2.0 %"), (0.9991, "99.91 %"), (0.995, "99.5 %")],
)
def test_percentages_keep_digits_near_the_ends(share, shown):
    assert verdict.percent(share).replace(verdict.THIN, " ") == shown


def test_figures_are_deterministic_and_take_the_pages_colours():
    svg = plots.loss_curves(make_language())
    assert svg == plots.loss_curves(make_language())
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert plots.INK not in svg
    for name in ("--base", "--control", "--engram"):
        assert f"var({name}" in svg
    for label in (">base<", ">capacity-1<", ">engram<", "training tokens"):
        assert label in svg


def test_labels_of_equal_arms_do_not_overlap():
    svg = plots.loss_curves(make_language(0.0, 0.0))
    labels = re.findall(r'font-size: ([\d.]+)px[^>]* y="([\d.]+)"[^>]*>(?:base|capacity-1|engram)<', svg)
    heights = sorted(float(y) for _, y in labels)
    assert len(heights) == 3
    assert all(below - above > float(labels[0][0]) for above, below in itertools.pairwise(heights))


def test_a_run_of_one_step_can_be_drawn():
    arms = {
        name: dataclasses.replace(arm, curve=((512.0, 8.0),), val_curve=((512.0, 8.0),))
        for name, arm in zip(("base", "capacity_1", "engram"), make_language().arms, strict=True)
    }
    assert "engram" in plots.loss_curves(dataclasses.replace(make_language(), **arms))
