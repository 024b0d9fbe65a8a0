"""The report of a comparison: one self-contained page from results.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .compare_verdict import equal_in, less, verdict
from .differences import signed, span, value
from .markup import Row, asset, definitions, figure, fill, headline, panels, paragraphs, script_hash, table, text
from .probes import probe_sections
from .verdict import percent, quantity

Results = dict[str, Any]
CLASSES = {
    "engram": "engram",
    "capacity_1": "control",
    "frozen_random": "control",
    "shuffled": "control",
} | dict.fromkeys(("base", "ffn", "iso_flop"), "base")  # in page/style.css
HEADLINES = (("engram", "base"), ("engram", "bigram"), ("capacity_1", "base"), ("frozen_random", "base"))


def write_report(directory: Path) -> Path:
    """Write report.html from the results.json of a comparison's directory; returns its path."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    path = directory / "report.html"
    path.write_bytes(render(results).encode("utf-8", "replace"))
    return path


def render(results: Results) -> str:
    """The page as text; what was not measured has no section."""
    data, script = results["data"], asset("script.js")
    return fill(
        "study.html",
        script_hash=script_hash(script),
        style=asset("style.css"),
        script=script,
        source=text(data["source"]),
        tokens=f"{data['read_tokens']:,}",
        count=str(len(results["arms"])),
        seeds=_seeds(results),
        headline=_headline(results),
        verdict=paragraphs(verdict(results)),
        forest=figure(lambda: plots.forest(results)),
        losses=_losses(results),
        against=_against(results),
        arms=_arms(results),
        sizes=_sizes(results),
        curves=_curves(results),
        slices=_slices(results) if results.get("slices") else "",
        probes=probe_sections(results["probes"]) if results.get("probes") else "",
        run=definitions(run_items(results, data_item(results))),
    )


def _seeds(results: Results) -> str:
    count = len(results["seeds"])
    return "one seed" if count == 1 else f"{count} seeds"


def _headline(results: Results) -> str:
    present = [(a, b) for a, b in HEADLINES if {a, b} <= results["arms"].keys() and less(results, a, b)]
    return headline([(value(less(results, a, b) or {}), f"nats a token, {a} less {b}") for a, b in present])


def _label(results: Results, name: str) -> str:
    twin = results["arms"][name].get("same_as")
    return f"{name} (the same model as {twin})" if twin else name


def _losses(results: Results) -> str:
    """A row an arm: its loss, and what it is less base by both uncertainties."""
    columns = ["held-out loss", "bits a byte", "less base", "over seeds"]

    def row(name: str) -> Row:
        arm = results["arms"][name]
        less_base = _both(less(results, name, "base")) if name != "base" else ["", ""]
        return _label(results, name), [f"{arm['loss']:.4f}", f"{arm['bits_per_byte']:.3f}", *less_base]

    return _by_arm(results, columns, row)


def _against(results: Results) -> str:
    """A row an arm: what engram is less it, and the loss of each seed."""
    columns = ["engram less it", "over seeds", "loss of each seed"]

    def row(name: str) -> Row:
        seeds = ", ".join(f"{one:.4f}" for one in results["arms"][name]["seeds"])
        difference = _both(less(results, "engram", name)) if name != "engram" else ["", ""]
        return _label(results, name), [*difference, seeds]

    return _by_arm(results, columns, row)


def _both(difference: Results | None) -> list[str]:
    """A difference with its interval over documents, and that over seeds."""
    if difference is None:
        return ["", ""]
    return [signed(difference), span(difference["seed_interval"]) if difference["seed_interval"] else ""]


def _by_arm(results: Results, columns: Sequence[str], row: Callable[[str], Row]) -> str:
    """A table with a row an arm, base set off."""
    others = [row(name) for name in results["arms"] if name != "base"]
    return table(columns, [""] * len(columns), [[row("base")], others])


def _arms(results: Results) -> str:
    """What each arm is, and in what it equals engram."""

    def said(name: str, arm: Results) -> str:
        equal = ", ".join(["tokens", *equal_in(results, name)])
        return arm["description"] + ("" if name == "engram" else f" (equal to engram in {equal})")

    return "".join(
        f'<dt class="{CLASSES.get(name, "")}">{text(name)}</dt><dd>{text(said(name, arm))}</dd>'
        for name, arm in results["arms"].items()
    )


def _sizes(results: Results) -> str:
    """A row an arm: what it costs, as a multiple of engram's in brackets."""
    columns = ["FLOPs a token", "active parameters", "total parameters", "step time"]

    def row(name: str) -> Row:
        arm = results["arms"][name]
        ratios, sizes = arm["against_engram"], arm["parameters"]
        return _label(results, name), [
            f"{quantity(arm['flops_per_token'])} ({ratios['flops']:.3f} ×)",
            f"{quantity(sizes['active'])} ({ratios['active']:.3f} ×)",
            f"{quantity(sizes['total'])} ({ratios['total']:.3g} ×)",
            f"{1000 * arm['step_seconds']:.0f} ms ({ratios['seconds']:.2f} ×)",
        ]

    return _by_arm(results, columns, row)


def _curves(results: Results) -> str:
    gain = f"<figure>{figure(lambda: plots.gain_curves(results))}<figcaption>{GAIN}</figcaption></figure>"
    return f"<figure>{figure(lambda: plots.arm_curves(results))}<figcaption>{LOSS}</figcaption></figure>{gain}"


LOSS = (
    "Loss of each arm’s first seed while it trains, on a sample of the held-out text. The frame is fitted to what follows the "
    "first tenth of training."
)
GAIN = "Training loss of each arm less base’s on the same batches, averaged over stretches, of the first seed."


def _slices(results: Results) -> str:
    """Every kind of slice: the figure of the main arms, and engram's figures as a table."""
    figures = [lambda kind=kind: plots.slice_gains(results, kind) for kind in results["slices"]]
    caption = f"Loss less base, by {', '.join(results['slices'])}. Bars are 95 % intervals over documents; points left of 0 gain."
    tables = "".join(
        f'<h3>{text(kind.capitalize())}</h3><div class="scroll">{_slice_table(sliced)}</div>'
        for kind, sliced in results["slices"].items()
    )
    return fill("slices.html", panels=panels(figures, caption), tables=tables)


def _slice_table(sliced: Results) -> str:
    base, engram = sliced["arms"]["base"], sliced["arms"]["engram"]
    columns = ["share of tokens", "loss of base", "engram less base (95 %)", "part of its gain"]

    def row(number: int, label: str) -> Row:
        gain, part = engram["less_base"][number], engram["part"][number]
        if gain is None:
            return label, ["none", "", "", ""]
        return label, [
            percent(sliced["share"][number]),
            f"{base['loss'][number]:.3f}",
            signed(gain),
            "" if part is None else f"{round(100 * part)} %".replace("-", "\N{MINUS SIGN}"),
        ]

    return table(columns, [""] * len(columns), [[row(number, label) for number, label in enumerate(sliced["labels"])]])


def data_item(results: Results) -> list[tuple[str, str]]:
    """What text was read, for `run_items`; nothing where results do not say."""
    data = results.get("data")
    if not data:
        return []
    said = (
        f"{data['source']}: {data['train_tokens']:,} tokens in {data['train_documents']:,} documents to train on, of which "
        f"{data['read_tokens']:,} were read; {data['held_out_tokens']:,} in {data['held_out_documents']:,} held out"
    )
    return [("text", text(said))]


def run_items(results: Results, data: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """How to get the figures again: command, what is peculiar to the study, machine, versions, seeds."""
    environment, minutes = results["environment"], float(results.get("minutes") or results["wall_minutes"])
    machine = f"{environment['machine']}, {environment['device']}, {environment['threads']} threads"
    return [
        ("command", f"<code>{text(results['command'])}</code>"),
        *data,
        ("took", f"{minutes:.0f} min of training and measuring" if minutes >= 1 else "less than a minute"),
        ("machine", text(machine)),
        ("versions", text(", ".join(f"{name} {version}" for name, version in environment["versions"].items()))),
        ("seeds", text(", ".join(map(str, results["seeds"])))),
    ]
