"""The report of a facts study: one self-contained page from results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import plots
from .compare import CLASSES, run_items
from .markup import Row, asset, definitions, fill, headline, panels, paragraphs, table, text
from .verdict import MINUS, percent, quantity, times

Results = dict[str, Any]
FLIPS = (
    "Causal flips in the engram arm: two people are asked about the same attribute, and where the first one's name ends the memory is "
    "handed the rows that the second one's name reads there. Does the answer move towards the second one's?"
)
BASES = ("iso_flop", "base")  # what the memory is compared with: the first that is there
FORMS = {  # of sentences, for who has not read evaluate/biographies.py
    "single": "a name of three tokens and one fact, a sentence each",
    "story": "the name once, then all facts about the person, in an order drawn anew",
    "pronoun": "the name in the first sentence only, then “They”",
    "split": "each word of the name spelled by two tokens",
    "long": "five words, the last three of a family that many share: longer than the n-grams",
    "paraphrase": "several phrasings; those “held out” are only asked, never told",
    "question": "half of the people also told as questions with answers, the others asked so without",
}


def write_report(directory: Path) -> Path:
    """Write report.html from the results.json of a facts study's directory; returns its path."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    path = directory / "report.html"
    path.write_bytes(render(results).encode("utf-8", "replace"))
    return path


def render(results: Results) -> str:
    """The page as text; what was not asked for has no section."""
    real = results.get("real")
    return fill(
        "capacity.html",
        style=asset("style.css"),
        headline=headline(_headline(results) if "curve" in results else _headline(real) if real else []),
        arms=_arms(results),
        curve=_growing("Made-up facts", _made_up(results), results, "made-up") if "curve" in results else "",
        hard=_hard(results) if "hard" in results else "",
        real=_growing("Real facts", _real(real), real, "real") if real else "",
        run=definitions(run_items(results)),
    )


def _headline(results: Results) -> list[tuple[str, str]]:
    base = _base(next(iter(results["curve"].values())))
    return [
        (
            f"{'≥ ' if results['ratio_at_least'][exposures] else ''}{ratio:.3g} ×",
            f"the facts of {base} at 90 % recall, {_times(exposures)}",
        )
        for exposures, ratio in results["ratio"].items()
        if ratio is not None
    ]


def _base(arms: Sequence[str] | Results) -> str | None:
    return next((name for name in BASES if name in arms), None)


def _times(exposures: str) -> str:
    return times(float(exposures))


def _arms(results: Results) -> str:
    """The arms that some part has, with what each is."""
    curves = [*results.get("curve", {}).values(), *(results.get("real") or {}).get("curve", {}).values()]
    used = {name for arms in (*curves, *results.get("hard", {}).values()) for name in arms}
    return "".join(
        f'<dt class="{CLASSES.get(name, "")}">{text(name)}</dt><dd>{text(said)}</dd>'
        for name, said in results["arms"].items()
        if name in used
    )


# --- growing numbers of facts ---------------------------------------------------------------------------------------


def _growing(title: str, intro: str, results: Results, name: str) -> str:
    """A section: sentences, a panel for each number of exposures, and the figures as tables."""
    curves = results["curve"]
    draw = [partial(plots.recall_by_facts, results, exposures, name) for exposures in curves]
    caption = "Share of the facts recalled against how many there are. The dashed line is 90 %; shades are Wilson’s 95 % intervals over questions."
    tables = "".join(
        f'<h3>{text(_times(exposures))}</h3><div class="scroll">{_curve_table(results, exposures)}</div>'
        for exposures in curves
    )
    return (
        f"<section><h2>{title}</h2><p>{text(intro)}</p>{paragraphs(verdict(results))}{panels(draw, caption)}"
        f'<div class="scroll">{_sizes(results)}</div>{tables}'
        '<p class="note">Bits are those of module capacity (arXiv 2404.05405), a '
        "parameter in all and an active one. Larger numbers are not run once recall is low.</p></section>"
    )


def _made_up(results: Results) -> str:
    return (
        "Names and values are drawn at random, so that nothing about one fact helps with another: they can only be remembered. Every "
        "fact is told equally often; a larger set is more facts in the same model."
    )


def _real(real: Results) -> str:
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in real["skipped"].items() if count)
    return f"{real['facts']:,} facts of {real['source']}, growing subsets of them{f'; left out: {left_out}' if left_out else ''}."


def verdict(results: Results) -> list[str]:
    """A sentence for each number of exposures: who holds how many facts."""
    return [_held(exposures, arms, results) for exposures, arms in results["holds_90"].items()]


def _held(exposures: str, arms: Results, results: Results) -> str:
    base = _base(arms)
    who = f"After {_times(exposures)} of each fact, " + ", ".join(
        f"{name} holds {_many(held)}" for name, held in arms.items()
    )
    who += " at 90 % recall."
    if base is None or "engram" not in arms:
        return who
    ratio = results["ratio"].get(exposures)
    if ratio is None:
        if arms["engram"]["facts"]:
            return f"{who} Both reach the largest number that was tried, or the base does: no ratio can be given."
        return f"{who} The memory did not help: it does not hold the smallest number that was tried."
    least = "at least " if results["ratio_at_least"][exposures] else ""
    if ratio <= 1 and not least:
        return f"{who} The memory did not help: that is {ratio:.2g} times what {base} holds."
    return f"{who} With the memory that is {least}{ratio:.3g} times as many as {base} holds."


def _many(held: Results) -> str:
    """`about 41,200 facts`."""
    if not held["facts"]:
        return "not even the smallest set"
    if held["open"]:
        return f"at least {held['facts']:,} facts (the largest set)"
    return f"about {held['interpolated'] or held['facts']:,.0f} facts"


def _sizes(results: Results) -> str:
    columns = ["parameters", "active for a token", "in the table", "FLOPs a token"]
    rows: list[Row] = [
        (name, [quantity(size[key]) for key in ("total", "active", "tables", "flops_per_token")])
        for name, size in results["parameters"].items()
    ]
    return table(columns, [""] * len(columns), [rows])


def _curve_table(results: Results, exposures: str) -> str:
    """A row a number of facts; of each arm recall, and bits a parameter."""
    arms = results["curve"][exposures]
    columns = [
        f"{name}: {what}" if what == "recall" else what
        for name in arms
        for what in ("recall", "bits a parameter", "an active one")
    ]
    classes = [CLASSES.get(name, "") for name in arms for _ in range(3)]
    found = {name: {point["facts"]: point for point in points} for name, points in arms.items()}

    def cells(point: Results | None) -> list[str]:
        if point is None:
            return ["not run", "", ""]
        return [percent(point["recall"]), f"{point['bits_per_parameter']:.3f}", f"{point['bits_per_active']:.3f}"]

    rows: list[Row] = [
        (f"{facts:,} facts", [cell for name in arms for cell in cells(found[name].get(facts))])
        for facts in sorted({facts for points in found.values() for facts in points})
    ]
    return table(columns, classes, [rows])


# --- hard cases -----------------------------------------------------------------------------------------------------


def _hard(results: Results) -> str:
    hard = results["hard"]
    names = list(next(iter(hard.values())))
    columns = [*names, "the memory"]

    def row(form: str, kind: str) -> Row:
        return f"{form}: {kind}", [*(percent(hard[form][name][kind]) for name in names), _said(results, form, kind)]

    groups = [[row(form, kind) for kind in next(iter(arms.values()))] for form, arms in hard.items()]
    forms = "".join(f"<dt>{text(form)}</dt><dd>{text(FORMS.get(form, ''))}</dd>" for form in hard)
    return fill(
        "hard.html",
        verdict=paragraphs(hard_verdict(results)),
        flips=_flips(results),
        table=table(columns, [*(CLASSES.get(name, "") for name in names), ""], groups),
        forms=forms,
    )


def _flips(results: Results) -> str:
    """Each form's flips in the engram arm; nothing where none were tried."""
    tried = {form: arms.get("engram") for form, arms in results.get("hard_flips", {}).items()}
    rows: list[Row] = [
        (
            form,
            [
                percent(one["right"]),
                percent(one["flipped"]),
                f"{one['shift']:+.1f}".replace("-", MINUS),
                str(one["pairs"]),
            ],
        )
        for form, one in tried.items()
        if one
    ]
    if not rows:
        return ""
    columns = ["towards the other's answer", "the other's answer in front", "shift, logits", "pairs"]
    return f'<div class="scroll">{table(columns, [""] * len(columns), [rows])}</div><p class="note">{text(FLIPS)}</p>'


def hard_verdict(results: Results) -> list[str]:
    """Where the memory helps, where it does not, and what its convolution and a second layer add."""
    hard = results["hard"]
    cases = [(form, kind) for form, arms in hard.items() for kind in next(iter(arms.values()))]
    base = _base(next(iter(hard.values())))
    said = []
    if base and "engram" in next(iter(hard.values())):
        sides = {case: _compared(results, *case, "engram", base) for case in cases}
        for side, words in (
            ("higher", f"The memory recalls more than {base} in"),
            ("same", f"The memory does not help (it cannot be told apart from {base}) in"),
            ("lower", f"The memory recalls less than {base} in"),
        ):
            chosen = [case for case, found in sides.items() if found == side]
            if chosen:
                said.append(f"{words} {len(chosen)} of {len(cases)} cases: {_cases(hard, chosen)}.")
    for name, what in (("no_convolution", "Without the convolution"), ("second_layer", "With a second memory layer")):
        if name in next(iter(hard.values())):
            said.append(_beside_engram(results, cases, name, what))
    return said


def _beside_engram(results: Results, cases: list[tuple[str, str]], name: str, what: str) -> str:
    hard = results["hard"]
    more, fewer = (
        [case for case in cases if _compared(results, *case, name, "engram") == side] for side in ("higher", "lower")
    )
    if not more and not fewer:
        return f"{what}, recall is not measurably different in any case."
    parts = [
        f"{word} in {_cases(hard, chosen, name)}" for word, chosen in (("higher", more), ("lower", fewer)) if chosen
    ]
    return f"{what}, recall is {' and '.join(parts)}."


def _cases(hard: Results, cases: Sequence[tuple[str, str]], name: str = "engram") -> str:
    return ", ".join(f"{form}: {kind} ({percent(hard[form][name][kind])})" for form, kind in cases)


def _compared(results: Results, form: str, kind: str, arm: str, other: str) -> str:
    """Whether an arm's recall is higher, lower, or not told apart: the intervals over questions overlap."""
    intervals = results["hard_intervals"][form]
    (low, high), (other_low, other_high) = intervals[arm][kind], intervals[other][kind]
    return "higher" if low > other_high else "lower" if high < other_low else "same"


def _said(results: Results, form: str, kind: str) -> str:
    base = _base(results["hard"][form])
    if not base or "engram" not in results["hard"][form]:
        return ""
    return {"higher": "helps", "same": "does not help", "lower": "hurts"}[
        _compared(results, form, kind, "engram", base)
    ]
