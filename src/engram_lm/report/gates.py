"""The gate view as HTML: coloured tokens with a tooltip each (page/script.js), one gate of several to choose."""

from __future__ import annotations

from collections.abc import Sequence

from ..analysis.gates import GateToken, GateView
from .markup import fill, text


def gate_section(view: GateView) -> str:
    """The coloured tokens: one scale over all layers and streams, one of them chosen to be shown."""
    gates = [gate for token in view.tokens for layer in token.gates for gate in layer]
    low, high = min(gates, default=0.0), max(gates, default=1.0)
    return fill(
        "gates.html",
        source=text(view.source),
        low=f"{low:.2f}",
        high=f"{high:.2f}",
        chooser=_chooser(_gate_names(view)),
        tokens="".join(_token(token, view.layers, low, high) for token in view.tokens),
    )


def _gate_names(view: GateView) -> list[str]:
    """A name for each gate, layer by layer and stream by stream."""
    streams = len(view.tokens[0].gates[0]) if view.tokens else 1
    if streams == 1:
        return [f"block {layer}" for layer in view.layers]
    return [f"block {layer}, stream {stream}" for layer in view.layers for stream in range(streams)]


def _chooser(names: Sequence[str]) -> str:
    """Radio buttons, where there is more than one gate to choose from."""
    if len(names) < 2:
        return ""
    labels = "".join(
        f'<label><input type="radio" name="gate" value="{number}" autocomplete="off"'
        f"{'' if number else ' checked'}> {name}</label>"
        for number, name in enumerate(names)
    )
    return f'<fieldset class="choice" aria-label="gate">{labels}</fieldset>'


def _token(token: GateToken, layers: Sequence[int], low: float, high: float) -> str:
    """A token on the background of its gate, with what its tooltip says and the levels of all its gates."""
    spread = (high - low) or 1.0
    levels = [f"{(gate - low) / spread:.2f}" for layer in token.gates for gate in layer]
    shown = text(token.text).replace("\n", "<u>↵</u>\n").replace("\t", "<u>→</u>\t")
    return (
        f'<span style="--level:{levels[0]}" data-levels="{" ".join(levels)}" '
        f'data-tip="{text(_tip(token, layers))}">{shown}</span>'
    )


def _tip(token: GateToken, layers: Sequence[int]) -> str:
    """What the tooltip says: the token, its gate in each layer, the n-grams that it looked up."""
    lines = [f"“{_one_line(token.text)}”"]
    if token.joined > 1:
        lines.append(f"{token.joined} tokens, whole characters only together; the last one's gate")
    for layer, gates in zip(layers, token.gates, strict=True):
        lines.append(f"block {layer}: gate {'  '.join(f'{gate:.2f}' for gate in gates)}")
    for ngram in token.ngrams:
        seen = "" if ngram.seen is None else f", seen {ngram.seen:,} time{'' if ngram.seen == 1 else 's'}"
        lines.append(f"{ngram.order}-gram “{_one_line(ngram.text)}”{seen}")
        if ngram.rows:
            lines.append(f"    rows {', '.join(f'{row:,}' for row in ngram.rows)}")
        if ngram.collides is not None:
            others = f"with up to {ngram.collides:,} other n-grams" if ngram.collides else "with no other n-gram"
            lines.append(f"    shares a row {others} of the training text")
    return "\n".join(lines)


def _one_line(value: str) -> str:
    """Text with its white space drawn."""
    return value.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
