"""What probes of one model found, as parts of a page; parts that were not measured are left out."""

from __future__ import annotations

from typing import Any

from .. import config
from ..analysis.gates import GateView
from . import plots
from .differences import signed
from .gates import gate_section
from .markup import Row, figure, panels, table, text
from .verdict import percent

Results = dict[str, Any]


def probe_sections(probes: Results) -> str:
    """Sections on the memory itself and on the layers around it."""
    memory = [
        (knocked_out, probes.get("knockout")),
        (gates, probes.get("gates")),
        (_view, probes.get("gate_view")),
        (usage, probes.get("usage")),
    ]
    layers = [(lens, probes.get("lens")), (alignment, probes.get("cka"))]
    return "".join(
        f"<section><h2>{title}</h2>{''.join(part(found) for part, found in parts if found)}</section>"
        for title, parts in (("What the memory does", memory), ("What it does to the layers", layers))
        if any(found for _, found in parts)
    )


def knocked_out(found: Results) -> str:
    """Loss without each part."""
    rows: list[Row] = [
        (name, [f"{one['loss']:.4f}", "" if one["interval"] is None else signed(one, 4)])
        for name, one in found["variants"].items()
    ]
    said = (
        f"Parts of the trained memory are silenced, one at a time, on {found['tokens']:,} held-out tokens. A loss that rises says "
        "that the model has come to rely on the part, not that it could not have been trained to do without."
    )
    return (
        f"<h3>What is lost without a part</h3><p>{said}</p><figure>{figure(lambda: plots.knockouts(found))}</figure>"
        f'<div class="scroll">{table(["loss", "above all on (95 %, documents)"], ["", ""], [rows])}</div>'
    )


def gates(found: Results) -> str:
    """How wide gates open, by layer and stream, and where training had shown the n-gram."""
    layers = found["layers"]
    columns = ["mean", "quartile", "median", "quartile", "< 0.05", "> 0.95", "added / hidden"]
    rows: list[Row] = [
        (
            _stream(layer, number),
            [
                f"{stream['mean']:.3f}",
                *(f"{quartile:.3f}" for quartile in stream["quartiles"]),
                percent(stream["closed"]),
                percent(stream["open"]),
                "" if number else f"{layer['relative']:.3f}",
            ],
        )
        for layer in layers
        for number, stream in enumerate(layer["streams"])
    ]
    parts = [
        f"<h3>How wide the gates open</h3><p>{text(_openness(layers))}</p>",
        panels([lambda: plots.gate_histograms(found)], f"Gates over {found['tokens']:,} held-out tokens."),
        f'<div class="scroll">{table(columns, [""] * len(columns), [rows])}</div>',
        '<p class="note">Added / hidden: size (root mean square) of what the memory adds, over that of what it is added to.</p>',
    ]
    if all(layer.get("by_seen") for layer in layers):
        parts.append(_by_seen(layers))
    if all(layer.get("highest") for layer in layers):
        parts += [_extremes(layer) for layer in layers]
    return "".join(parts)


def _stream(layer: Results, number: int) -> str:
    return f"block {layer['layer']}" + (f", stream {number}" if len(layer["streams"]) > 1 else "")


def _openness(layers: list[Results]) -> str:
    """A gate that hardly moves selects nothing."""
    said = []
    for layer in layers:
        for number, stream in enumerate(layer["streams"]):
            low, _, high = stream["quartiles"]
            name = _stream(layer, number)
            if stream["closed"] > 0.9:
                said.append(f"In {name} the gate is closed nearly everywhere: it lets the memory add next to nothing.")
            elif high - low < 0.02:
                said.append(f"In {name} the gate hardly moves from token to token: it does not select.")
    return " ".join(said) or "Gates lie between 0, where nothing of what was read is added, and 1, where all of it is."


def _by_seen(layers: list[Results]) -> str:
    """Mean gate by how often training had shown the n-gram."""
    names = next(iter(layers[0]["by_seen"].values()))["seen"]
    rows: list[Row] = [
        (f"block {layer['layer']}, {order}-gram", ["" if mean is None else f"{mean:.3f}" for mean in found["mean"]])
        for layer in layers
        for order, found in layer["by_seen"].items()
    ]
    head = [f"seen {name} times" for name in names]
    return f'<p>Mean gate by how often training had shown the n-gram:</p><div class="scroll">{table(head, [""] * len(head), [rows])}</div>'


def _extremes(layer: Results) -> str:
    """N-grams that open the gate widest, beside those that open it least."""
    pairs = list(zip(layer["highest"], layer["lowest"], strict=False))
    rows = "".join(
        f"<tr>{_ngram(high)}<td>{high['mean']:.3f}</td>{_ngram(low)}<td>{low['mean']:.3f}</td></tr>"
        for high, low in pairs
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("widest at", "gate", "narrowest at", "gate"))
    return (
        f"<p>N-grams of block {layer['layer']} that open the gate widest and least, of those that come at least 4 times:</p>"
        f'<div class="scroll"><table class="examples"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _ngram(found: Results) -> str:
    shown = found["text"].replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
    return f"<td><code>{text(shown)}</code></td>"


def _view(found: Results) -> str:
    return gate_section(config.from_dict(GateView, found))


def usage(found: Results) -> str:
    """Which rows the training text reads, who shares them, what a cache would hold."""
    columns = ["rows", "read", "n-grams", "a row", "share a row", "shared reads", "same rows"]
    blocks: list[Row] = [
        (
            f"block {one['layer']}, {one['order']}-grams",
            [
                f"{one['rows']:,}",
                percent(one["coverage"]),
                f"{one['ngrams']:,}",
                f"{one['ngrams_per_row']:.2f}",
                percent(one["shared"]),
                percent(one["shared_reads"]),
                percent(one["indistinguishable"]),
            ],
        )
        for one in found["blocks"]
    ]
    norms = found["norms"]
    lengths: list[Row] = [
        (f"{one['reads']} reads", [f"{one['rows']:,}", f"{one['norm']:.3f}", f"{one['moved']:.3f}"])
        for one in norms["by_reads"]
    ]
    said = (
        f"{found['tokens']:,} training tokens read {percent(found['coverage'])} of the table’s {found['rows']:,} rows. Of the rows "
        f"read, {percent(norms['unmoved'])} are as they were when training began."
    )
    caption = (
        "Left: rows by how often they are read, and the reads that they serve. Right: reads served by the most read rows, and by "
        "caches of so many rows."
    )
    return "".join(
        [
            f"<h3>How the table is used</h3><p>{text(said)}</p>",
            panels([lambda: plots.row_reads(found), lambda: plots.cache_curves(found)], caption),
            f'<div class="scroll">{table(columns, [""] * len(columns), [blocks])}</div>',
            '<p class="note">A row: n-grams that read it, on average. Share a row: of n-grams, in a head. Shared reads: of such rows. '
            "Same rows: n-grams with the rows of another one in all heads, which the memory cannot tell apart.</p>",
            "<p>How far rows have moved, by how often they are read (medians of lengths):</p>",
            f'<div class="scroll">{table(["rows", "length", "moved"], ["", "", ""], [lengths])}</div>',
        ]
    )


def lens(found: Results) -> str:
    """How near each layer's prediction is to the final one."""
    said = (
        "Each layer’s hidden state is read by the model’s own output layer; the nearer its prediction is to the final one, the less "
        "is left to do. The paper reports systematically smaller divergences with a memory, above all in early layers; its figure "
        "shows larger ones in layers 18 to 20 of 30 (arXiv 2601.07372, section 6.1, figure 4)."
    )
    names = list(found)
    rows: list[Row] = [
        (
            f"layer {layer}",
            [f"{one['kl'][number]:.3f} (top-1 {percent(one['agreement'][number])})" for one in found.values()],
        )
        for number, layer in enumerate(next(iter(found.values()))["layers"])
    ]
    return (
        f"<h3>How early the prediction is ready</h3><p>{said}</p><p>{text(_sooner(found))}</p>"
        f"<figure>{figure(lambda: plots.lens_curves(found))}"
        "<figcaption>Divergence of each layer’s prediction from the final one; bands are 95 % intervals over documents.</figcaption>"
        f'</figure><div class="scroll">{table(names, [""] * len(names), [rows])}</div>'
    )


def _sooner(found: Results) -> str:
    """In how many layers engram's interval lies below base's, or above it; the last layer, 0 in all, aside."""
    if not {"base", "engram"} <= found.keys():
        return ""
    base, engram = (found[name]["kl_interval"][:-1] for name in ("base", "engram"))
    pairs = [(mine, theirs) for mine, theirs in zip(engram, base, strict=False) if mine and theirs]
    below = sum(mine[1] < theirs[0] for mine, theirs in pairs)
    above = sum(mine[0] > theirs[1] for mine, theirs in pairs)
    return (
        f"Here, with the memory, the divergence is smaller in {below} of {len(pairs)} layers and larger in {above}; in the others the "
        "intervals overlap."
    )


def alignment(found: Results) -> str:
    """Which layers of base each layer of engram is like."""
    said = (
        "Similarity (unbiased CKA) of engram’s layers with base’s on the same tokens; diamonds mark the centre of the most similar "
        f"layers (k = {found['k']}). Above the dashed diagonal a layer is like an earlier one of base, below it like a later one. In "
        "the paper, early layers with a memory are like much later layers without (layer 5 like layer 12 of 30), and the effect "
        "fades towards the top."
    )
    caption = f"{found['minibatches']} minibatches of {found['samples']} tokens. Layer 0 is the embedding."
    return (
        f"<h3>Which layers are alike</h3><p>{said}</p><p>{text(_ahead(found))}</p>"
        f"<figure>{figure(lambda: plots.alignment(found))}<figcaption>{caption}</figcaption></figure>"
    )


def _ahead(found: Results) -> str:
    """How many of engram's blocks are like a later layer of base, beyond twice the standard error."""
    placed = [
        (place - layer, error)
        for layer, (place, error) in enumerate(zip(found["alignment"], found["alignment_error"], strict=True))
        if layer and place is not None and error is not None
    ]
    ahead, behind = (sum(sign * shift > 2 * error for shift, error in placed) for sign in (1, -1))
    return (
        f"Here {ahead} of {len(placed)} layers are like a later layer of base and {behind} like an earlier one, by more than twice "
        "the standard error."
    )
