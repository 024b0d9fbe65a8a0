"""Parts of a page: escaped text, templates filled in, tables, figures or the note in their place."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Sequence
from importlib import resources
from string import Template

from . import plots

# Characters without a picture of their own get the Unicode one, so that nothing in a text is invisible.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def text(value: str) -> str:
    """Untrusted text as HTML: escaped, control characters shown by their pictures."""
    return html.escape(value.translate(CONTROLS))


def asset(name: str) -> str:
    """A file of the page, as text."""
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8").strip()


def fill(name: str, **values: str) -> str:
    """A part of the page with its `$names` filled in by HTML."""
    return Template(asset(name)).substitute(values)


def figure(draw: Callable[[], str]) -> str:
    """The figure, or a note in its place that says how to get it."""
    try:
        return draw()
    except plots.MissingExtraError as error:
        return f'<p class="missing">{text(str(error))}</p>'


def headline(items: Sequence[tuple[str, str]]) -> str:
    """The few figures to take home: (figure, what it is)."""
    return "".join(f"<div><dt>{text(label)}</dt><dd>{text(figure)}</dd></div>" for figure, label in items)


def paragraphs(sentences: Sequence[str]) -> str:
    """A paragraph each."""
    return "".join(f"<p>{text(sentence)}</p>" for sentence in sentences)


def definitions(items: Sequence[tuple[str, str]]) -> str:
    """Terms, which are ours, and what stands beside them, which is HTML."""
    return "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in items)


def panels(draw: Sequence[Callable[[], str]], caption: str) -> str:
    """Figures side by side where there is room, over one caption; one note in the place of all that cannot be drawn."""

    def drawn() -> str:
        return f'<div class="panels">{"".join(each() for each in draw)}</div>'

    return f"<figure>{figure(drawn)}<figcaption>{text(caption)}</figcaption></figure>"


Row = tuple[str, Sequence[str]]  # a label and a cell for each column


def table(names: Sequence[str], classes: Sequence[str], groups: Sequence[Sequence[Row]]) -> str:
    """A table with a column for each arm; groups of rows are set off by rules."""
    head = "".join(
        f'<th scope="col" class="{kind}">{text(name)}</th>' for kind, name in zip(classes, names, strict=True)
    )
    bodies = "".join(f"<tbody>{''.join(map(_row, group))}</tbody>" for group in groups)
    return f"<table><thead><tr><td></td>{head}</tr></thead>{bodies}</table>"


def _row(row: Row) -> str:
    label, cells = row
    return f'<tr><th scope="row">{text(label)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'


def script_hash(script: str) -> str:
    """What a page's policy allows: the script between its tags, each on a line of its own."""
    digest = hashlib.sha256(f"\n{script}\n".encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
