"""Paired differences as results.json holds them: {"difference", "interval": [low, high] or None, ...}, in words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .verdict import MINUS

Difference = dict[str, Any]
Outcome = Literal["lower", "higher", "same"]


def outcome(difference: Difference) -> Outcome:
    """Which side of 0 the whole interval lies on; "same" where it holds 0 or is unknown."""
    return side(difference["interval"])


def side(interval: Sequence[float] | None) -> Outcome:
    """Which side of 0 an interval lies on."""
    low, high = interval or (float("-inf"), float("inf"))
    return "lower" if high < 0 else "higher" if low > 0 else "same"


def value(difference: Difference, digits: int = 3) -> str:
    """`−0.123`."""
    return number(difference["difference"], digits)


def signed(difference: Difference, digits: int = 3) -> str:
    """`−0.123 (−0.130 to −0.110)`; one document has no interval."""
    interval = difference["interval"]
    return value(difference, digits) + (f" ({span(interval, digits)})" if interval else "")


def span(interval: Sequence[float], digits: int = 3) -> str:
    """`−0.130 to −0.110`."""
    return " to ".join(number(bound, digits) for bound in interval)


def number(figure: float, digits: int = 3) -> str:
    """A figure with its sign."""
    return f"{figure:+.{digits}f}".replace("-", MINUS)
