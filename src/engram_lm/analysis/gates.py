"""Gates over a text: how far each token let the memory in, and which n-gram it looked up (paper, figure 7).

The gate says how much of the retrieved row is added to the hidden state, so a picture of it shows where the
model found its memory useful. Capturing gates is the model's business; this file turns them into something
to look at.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (exclusive) that spell `text`: one, unless characters are split."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class Ngram:
    """An n-gram that was looked up.

    seen: how often training showed it. rows: those that it reads in the first memory layer, one a head. collides: how many
    other n-grams of the training text share a row with it, in the head where they are most. None or empty: not counted.
    """

    order: int
    text: str
    seen: int | None = None
    rows: tuple[int, ...] = ()
    collides: int | None = None


@dataclass(frozen=True)
class GateToken:
    """A displayed token, `joined` of several where need be: the last one's gates [L][M] and n-grams."""

    text: str
    joined: int
    gates: tuple[tuple[float, ...], ...]
    ngrams: tuple[Ngram, ...]


@dataclass(frozen=True)
class GateView:
    """A text, said to be from `source`, with its gates; `layers` are the 0-based blocks with a memory."""

    source: str
    layers: tuple[int, ...]
    tokens: tuple[GateToken, ...]


def gate_view(
    pieces: Sequence[bytes],
    gates: Tensor,
    *,
    layers: Sequence[int],
    orders: Sequence[int],
    source: str,
    seen: Sequence[Sequence[int]] | None = None,
    rows: Sequence[Sequence[Sequence[int]]] | None = None,
    collides: Sequence[Sequence[int]] | None = None,
) -> GateView:
    """The view of a text of T tokens.

    `pieces` are the tokens' bytes (see `piece_bytes`), `gates` [T, L, M] is in 0..1, `seen` [T,
    len(orders)] counts each token's n-grams in training (see train/ngrams.py), `rows` [T, len(orders), heads]
    and `collides` [T, len(orders)] say where they lead and who else is there (see `ngrams.crowding`).
    N-grams that begin before the text are left out. Tokens that are only fragments of characters are joined
    until they decode; the joined token then shows the gates and n-grams of its last fragment, where the
    character is complete. Raises ValueError when lengths or layers do not agree.
    """
    if gates.ndim != 3 or gates.shape[:2] != (len(pieces), len(layers)):
        raise ValueError(
            f"gates have shape {tuple(gates.shape)}, but {len(pieces)} tokens and {len(layers)} layers need "
            f"({len(pieces)}, {len(layers)}, streams): the colours would belong to other tokens."
        )
    for name, given in ("seen", seen), ("rows", rows), ("collides", collides):
        if given is not None and (len(given) != len(pieces) or any(len(row) != len(orders) for row in given)):
            raise ValueError(f"{name} must be given for each of {len(pieces)} tokens and {len(orders)} orders.")
    spans = displayable(pieces)
    home = [number for number, span in enumerate(spans) for _ in range(span.start, span.stop)]
    values = gates.tolist()
    tokens = []
    for number, span in enumerate(spans):
        last = span.stop - 1
        ngrams = []
        for column, order in enumerate(orders):
            first = last - order + 1
            if first >= 0:  # whole characters: from the span that holds the n-gram's first token
                text = "".join(s.text for s in spans[home[first] : number + 1])
                ngrams.append(
                    Ngram(
                        order,
                        text,
                        seen=None if seen is None else int(seen[last][column]),
                        rows=() if rows is None else tuple(map(int, rows[last][column])),
                        collides=None if collides is None else int(collides[last][column]),
                    )
                )
        gate = tuple(tuple(layer) for layer in values[last])
        tokens.append(GateToken(span.text, span.stop - span.start, gate, tuple(ngrams)))
    return GateView(source, tuple(layers), tuple(tokens))


def displayable(pieces: Sequence[bytes]) -> list[Span]:
    """Token bytes as text, adjacent tokens joined until they decode as UTF-8.

    The spans follow one another without gaps. Bytes that are no UTF-8 become U+FFFD, exactly as when
    decoding the whole text at once.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    spans: list[Span] = []
    text, start = "", 0
    for stop, piece in enumerate(pieces, start=1):
        text += decoder.decode(piece, final=stop == len(pieces))
        pending, _ = decoder.getstate()
        if not pending:
            spans.append(Span(text, start, stop))
            text, start = "", stop
    return spans
