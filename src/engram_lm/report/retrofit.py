"""The report of a retrofit: one self-contained page from results.json and the arms' metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plots
from .differences import outcome, signed, value
from .markup import Row, asset, definitions, figure, fill, headline, paragraphs, table, text
from .record import Curve
from .verdict import quantity

Results = dict[str, Any]
CONTROLS = ("bias", "capacity_1", "frozen_random")
CLASSES = {"base": "base", "lora": "base", "engram": "engram", "engram+lora": "engram"} | dict.fromkeys(
    CONTROLS, "control"
)  # in page/style.css


def write_report(directory: Path) -> Path:
    """Write report.html from what a retrofit left in its directory; returns its path."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    path = directory / "report.html"
    path.write_bytes(render(results, curves(directory, results)).encode("utf-8", "replace"))
    return path


def curves(directory: Path, results: Results) -> dict[str, Curve]:
    """Held-out loss of each arm by training tokens, the first seed's."""
    seed = results["config"]["seeds"][0]
    found = {}
    for name in results["config"]["arms"]:
        lines = (directory / "arms" / name / f"seed-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        points = [json.loads(line) for line in lines]
        found[name] = tuple((point["tokens"], point["val_loss"]) for point in points if "val_loss" in point)
    return found


def render(results: Results, held_out: dict[str, Curve]) -> str:
    """The page as text."""
    return fill(
        "retrofit.html",
        title=text(f"A memory for {_short(results['model']['name'])}"),
        style=asset("style.css"),
        headline=_headline(results),
        verdict=paragraphs(verdict(results)),
        figure=figure(lambda: plots.retrofit_curves(held_out)),
        table=_losses(results),
        seeds=f" With {len(results['config']['seeds'])} seeds, losses are means." if _seeds(results) > 1 else "",
        arms=_arms(results),
        budget=text(_budget(results)),
        sizes=_sizes(results),
        forgetting=_forgetting(results),
        examples=_examples(results),
        run=_run(results),
    )


def verdict(results: Results) -> list[str]:
    """Sentences about the memory, chosen by what was measured; none where no memory was trained."""
    arms = results["arms"]
    if "engram" not in arms:
        return []
    less = arms["engram"]["held_out"]["less"]
    model = f"The memory {_moves(less['base'])} the model's held-out loss"
    sentences = [f"{model}: {signed(less['base'])} nats a token."]
    control = [name for name in CONTROLS if name in arms]
    if "capacity_1" in control:
        behind = [name for name in control if outcome(less[name]) == "lower"]
        differences = ", ".join(f"{name} {signed(less[name])}" for name in control)
        finding = (
            "so its learned rows, and not just the branch around them, made the difference"
            if len(behind) == len(control)
            else "so this run does not show that learned rows made the difference"
        )
        sentences.append(f"Against the controls without learned content ({differences}), {finding}.")
    if "lora" in arms:
        said = {
            "lower": "The memory ends below adapters",
            "higher": "Adapters end below the memory",
            "same": "Memory and adapters cannot be told apart",
        }
        ranks = "of nearly as many trained parameters" if _fair(results) else f"of rank {results['lora']['rank']}"
        sentences.append(f"{said[outcome(less['lora'])]} {ranks}: {signed(less['lora'])}.")
    return sentences


def _moves(difference: Results) -> str:
    return {"lower": "lowers", "higher": "raises", "same": "does not measurably change"}[outcome(difference)]


def _fair(results: Results) -> bool:
    """Whether adapters hold within a tenth of the memory's trained parameters."""
    lora = results["lora"]
    return abs(lora["parameters"] / lora["memory_parameters"] - 1) < 0.1


def _seeds(results: Results) -> int:
    return len(results["config"]["seeds"])


def _short(name: str) -> str:
    return Path(name).name or name


def _first(results: Results, arm: str) -> Results:
    """An arm's run with the first seed."""
    return next(run for run in results["runs"] if run["arm"] == arm)


def _headline(results: Results) -> str:
    arms, items = results["arms"], []
    name = "engram" if "engram" in arms else next(name for name in arms if name != "base")
    for other in ("base", "lora", "capacity_1"):
        if other in arms and other != name:
            difference = arms[name]["held_out"]["less"][other]
            items.append((difference, f"nats a token on held-out documents, {name} less {other}"))
    if "outside" in arms[name]:
        items.append((arms[name]["outside"]["less"]["base"], f"outside the domain, {name} less base"))
    return headline([(value(difference), label) for difference, label in items])


def _losses(results: Results) -> str:
    """A row an arm: its loss, and what it is less the base and the memory less it."""
    arms, memory = results["arms"], results["arms"].get("engram")
    columns = ["held-out loss", "less base", *(["engram less it"] if memory else [])]
    if _seeds(results) > 1:
        columns.append("loss of each seed")

    def row(name: str) -> Row:
        own = arms[name]["held_out"]
        cells = [f"{own['loss']:.4f}", "" if name == "base" else signed(own["less"]["base"])]
        if memory:
            cells.append("" if name == "engram" else signed(memory["held_out"]["less"][name]))
        if _seeds(results) > 1:
            cells.append(", ".join(f"{one:.4f}" for one in own["seeds"]))
        return name, cells

    return table(columns, [""] * len(columns), [[row("base")], [row(name) for name in arms if name != "base"]])


def _arms(results: Results) -> str:
    return "".join(
        f'<dt class="{CLASSES.get(name, "")}">{text(name)}</dt><dd>{text(said + _trained(results, name))}</dd>'
        for name, said in results["descriptions"].items()
        if name in results["arms"]
    )


def _trained(results: Results, arm: str) -> str:
    """What trained of an arm, and how fast; nothing of the base."""
    if arm == "base":
        return ""
    run = _first(results, arm)
    parts = (f"{part} {quantity(count)} at {run['rates'][part]:g}" for part, count in run["parameters"].items())
    return f" ({', '.join(parts)})"


def _budget(results: Results) -> str:
    tokens = _first(results, results["config"]["arms"][0])["tokens"]
    said = f"Every arm read the same {tokens:,} tokens in the same order."
    lora = results["lora"]
    if not lora:
        return said
    why = "was asked for" if lora["given"] else "comes nearest to the memory's trained parameters"
    if not lora["given"] and lora["rank"] == lora["largest_rank"]:
        why = "is the largest at which adapters are no bigger than the smallest matrix that they adapt"
    return (
        f"{said} The adapters' rank {lora['rank']} {why}: {lora['parameters']:,} parameters against {lora['memory_parameters']:,} "
        "(projections and gains, and the rows that training read)."
    )


def _sizes(results: Results) -> str:
    columns = ["trained parameters", "rows read in training", "tokens a second"]

    def row(name: str) -> Row:
        run = _first(results, name)
        rows = f"{run['rows_read']:,} of {run['table_rows']:,}" if run["rows_read"] else ""
        return name, [f"{sum(run['parameters'].values()):,}", rows, f"{run['tokens_per_second']:,.0f}"]

    return table(columns, [""] * len(columns), [[row(name) for name in results["config"]["arms"]]])


def _forgetting(results: Results) -> str:
    if results["base"]["outside"] is None:
        said = "Forgetting was not measured: no text outside the domain was named (--outside). "
    else:
        own = results["arms"]["base"]["outside"]
        said = (
            f"Loss on {own['tokens']:,} tokens in {own['documents']:,} documents of other text, which no arm has read, with what "
            "each arm learned switched on. "
        )
    said += "Switched off, the last column says whether all compared logits equal the model's, bit for bit."
    return f'<p>{text(said)}</p><div class="scroll">{_off_table(results)}</div>'


def _off_table(results: Results) -> str:
    arms, outside = results["arms"], results["base"]["outside"] is not None
    columns = [*(["outside loss, on", "less base"] if outside else []), "switched off"]

    def row(name: str) -> Row:
        cells = []
        if outside:
            own = arms[name]["outside"]
            cells = [f"{own['loss']:.4f}", "" if name == "base" else signed(own["less"]["base"])]
        return name, [*cells, "" if name == "base" else _off(_first(results, name)["off"])]

    return table(columns, [""] * len(columns), [[row("base")], [row(name) for name in arms if name != "base"]])


def _off(off: Results | None) -> str:
    if off is None:
        return "weights changed"
    if off["equal"]:
        return f"equal ({off['logits']:,} logits)"
    return f"NOT equal: off by up to {off['largest_difference']:.2g}"


def _examples(results: Results) -> str:
    parts = []
    for number, base in enumerate(results["base"]["examples"]):
        written = {"the document": base["text"], "base": base["written"]} | {
            name: _first(results, name)["examples"][number]["written"] for name in _shown(results)
        }
        lines = "".join(
            f'<tr><th scope="row" class="{CLASSES.get(name, "")}">{text(name)}</th><td>{text(said)}</td></tr>'
            for name, said in written.items()
        )
        parts.append(
            f'<pre><span class="prompt">{text(base["prompt"])}</span></pre><table class="examples"><tbody>{lines}</tbody></table>'
        )
    if not parts:
        return ""
    return (
        "<section><h2>How held-out documents go on</h2><p>The beginning of a document that no arm has read, how it goes on, and "
        f"the likeliest tokens.</p>{''.join(parts)}</section>"
    )


def _shown(results: Results) -> Sequence[str]:
    return [name for name in results["config"]["arms"] if name not in CONTROLS]


def _run(results: Results) -> str:
    config, data, environment = results["config"], results["data"], results["environment"]
    model = results["model"]
    seconds = sum(run["wall_seconds"] for run in [results["base"], *results["runs"]])
    items = [
        ("command", f"<code>{text(results['command'])}</code>"),
        (
            "model",
            text(
                f"{model['name']}: {model['class']}, {quantity(model['parameters'])} parameters in {model['dtype']}, "
                f"weights {model['fingerprint']}"
            ),
        ),
        (
            "text",
            text(
                f"{config['data']}: {data['train']['tokens']:,} tokens in {data['train']['documents']:,} documents to train on, "
                f"{data['held_out']['tokens']:,} in {data['held_out']['documents']:,} held out, of which "
                f"{results['arms']['base']['held_out']['tokens']:,} were measured"
            ),
        ),
        ("steps", f"{data['steps']:,} of {config['batch_size']} × {config['length']} tokens"),
        ("took", f"{seconds / 60:.0f} min"),
        ("machine", text(f"{environment['machine']}, {environment['device']}, {environment['threads']} threads")),
        ("versions", text(", ".join(f"{name} {version}" for name, version in environment["versions"].items()))),
        ("seeds", text(", ".join(map(str, config["seeds"])))),
    ]
    return definitions(items)
