"""The report of a run: one self-contained HTML page, with the values behind it as JSON beside it.

The page needs no network (its policy forbids any), opens from disk, and reads in light and dark, on paper
and on a phone. Every text that comes from a run is escaped: a sample or a snippet may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .. import config
from ..statistics import wilson
from . import plots, verdict
from .gates import gate_section
from .markup import Row, asset, definitions, figure, fill, headline, script_hash, table, text
from .record import (
    Arm,
    AttributeRecall,
    Command,
    Curve,
    FactExample,
    FactsAct,
    FactsArm,
    LanguageAct,
    Report,
    RunInfo,
    Sample,
)
from .verdict import percent, plus_minus, quantity, signed

__all__ = [
    "Arm",
    "AttributeRecall",
    "Command",
    "Curve",
    "FactExample",
    "FactsAct",
    "FactsArm",
    "LanguageAct",
    "Report",
    "RunInfo",
    "Sample",
    "render",
    "write_report",
]

ARM_CLASSES = ("base", "control", "engram")  # in page/style.css


def write_report(path: Path, report: Report) -> None:
    """Write the page to `path` and its values beside it with the suffix `.json`.

    `config.load(Report, path.with_suffix(".json"))` reads the values back.
    """
    path.with_suffix(".json").write_bytes(config.to_json(report).encode("utf-8", "backslashreplace"))
    path.write_bytes(render(report).encode("utf-8", "replace"))


def render(report: Report) -> str:
    """The page as text; equal reports give equal pages."""
    act, script = report.language, asset("script.js")
    return fill(
        "report.html",
        title=text(report.title),
        script_hash=script_hash(script),
        style=asset("style.css"),
        script=script,
        headline=_headline(report),
        data=text(act.data),
        arms=_arms(act.arms),
        language="".join(f"<p>{text(paragraph)}</p>" for paragraph in verdict.language(act)),
        loss_figure=figure(lambda: plots.loss_curves(act)),
        language_table=_language_table(act),
        gates=gate_section(act.gates) if act.gates else "",
        sample=_sample(act.sample) if act.sample else "",
        facts=_facts(report.facts) if report.facts else "",
        run=_run(report.run),
        next_steps=_next_steps(report.next_steps) if report.next_steps else "",
    )


def _headline(report: Report) -> str:
    """The few figures to take home."""
    act, facts = report.language, report.facts
    items = [
        (signed(arm.delta or 0.0, None), f"nats a token, held-out loss of {arm.name} against {act.base.name}")
        for arm in (act.engram, act.capacity_1)
    ]
    if facts:
        change = f"{percent(facts.base.final)} → {percent(facts.engram.final)}"
        items.append((change, f"of the facts recalled, {facts.base.name} → {facts.engram.name}"))
    return headline(items)


def _arms(arms: Sequence[Arm]) -> str:
    return "".join(
        f'<dt class="{kind}">{text(arm.name)}</dt><dd>{text(arm.description)}</dd>'
        for kind, arm in zip(ARM_CLASSES, arms, strict=True)
    )


def _language_table(act: LanguageAct) -> str:
    def row(label: str, cell: Callable[[Arm], str]) -> Row:
        return label, [cell(arm) for arm in act.arms]

    def difference(arm: Arm) -> str:
        return "" if arm.delta is None else signed(arm.delta, arm.delta_interval)

    quality = [
        row("held-out loss, nats a token", lambda arm: plus_minus(arm.val_loss, arm.val_interval)),
        row(f"difference from {act.base.name}", difference),
        row("bits a byte", lambda arm: f"{arm.bits_per_byte:.3f}"),
    ]
    size = [
        row("parameters", lambda arm: quantity(arm.parameters)),
        row("of them active for a token", lambda arm: quantity(arm.active_parameters)),
        row("of them in the table", lambda arm: quantity(arm.table_parameters)),
    ]
    cost = [
        row("FLOPs a token", lambda arm: quantity(arm.flops_per_token)),
        row("read from the table a token", lambda arm: quantity(arm.bytes_per_token, "B")),
        row("training tokens a second", lambda arm: f"{arm.tokens_per_second:,.0f}"),
        row(f"step time, {act.base.name} = 1", lambda arm: f"{arm.step_ratio:.2f}"),
    ]
    return table([arm.name for arm in act.arms], ARM_CLASSES, [quality, size, cost])


def _sample(sample: Sample) -> str:
    return fill(
        "sample.html",
        settings=text(sample.settings),
        prompt=text(sample.prompt),
        continuation=text(sample.continuation),
    )


def _facts(act: FactsAct) -> str:
    attributes = [row.attribute for row in act.base.by_attribute]
    return fill(
        "facts.html",
        people=f"{act.people:,}",
        attributes=text(", ".join(f"a {attribute}" for attribute in attributes)),
        verdict=text(verdict.facts(act)),
        figure=figure(lambda: plots.recall_curves(act)),
        table=_facts_table(act),
        examples=_examples(act) if act.examples else "",
    )


def _facts_table(act: FactsAct) -> str:
    arms = (act.base, act.engram)

    def final(arm: FactsArm) -> str:
        low, high = wilson(arm.final, act.questions)
        return f"{percent(arm.final)} ({percent(low)} to {percent(high)})"

    def reached(arm: FactsArm) -> str:
        exposures = arm.exposures_to(0.95)
        return "not reached" if exposures is None else f"{exposures:g}"

    recall: list[Row] = [
        ("recall at the end (95 % interval)", [final(arm) for arm in arms]),
        ("exposures until 95 %", [reached(arm) for arm in arms]),
    ]
    by_attribute: list[Row] = [
        (f"recall of the {base.attribute}", [percent(base.recall), percent(engram.recall)])
        for base, engram in zip(act.base.by_attribute, act.engram.by_attribute, strict=True)
    ]
    size: list[Row] = [
        ("parameters", [quantity(arm.parameters) for arm in arms]),
        ("of them in the table", [quantity(arm.table_parameters) for arm in arms]),
    ]
    return table([arm.name for arm in arms], ("base", "engram"), [recall, by_attribute, size])


def _examples(act: FactsAct) -> str:
    """Some questions with both models' answers, marked right or wrong by sign and colour."""

    def cell(given: str, right: str) -> str:
        kind, mark = ("right", "✓") if given.strip() == right.strip() else ("wrong", "✗")
        return f'<td class="{kind}">{mark} {text(given)}</td>'

    rows = "".join(
        f"<tr><td>{text(e.question)}</td><td>{text(e.answer)}</td>"
        f"{cell(e.base_answer, e.answer)}{cell(e.engram_answer, e.answer)}</tr>"
        for e in act.examples
    )
    return fill("examples.html", base=text(act.base.name), engram=text(act.engram.name), rows=rows)


def _run(run: RunInfo) -> str:
    minutes, seconds = divmod(round(run.wall_seconds), 60)
    items = [
        ("command", f"<code>{text(run.command)}</code>"),
        ("when", text(run.date)),
        ("took", f"{minutes} min {seconds} s"),
        ("machine", text(run.machine)),
        ("versions", text(", ".join(run.versions))),
        ("seed", str(run.seed)),
        ("uncertainty", text(run.uncertainty)),
    ]
    return definitions(items)


def _next_steps(commands: Sequence[Command]) -> str:
    items = "".join(f"<li>{text(c.purpose)}<pre>{text(c.command)}</pre></li>" for c in commands)
    return f'<section><h2>What to try next</h2><ul class="next">{items}</ul></section>'
