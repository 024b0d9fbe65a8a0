"""What was measured several times, and the bar that it is held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """One value a call, pass by pass: the same was measured twice, and what differs between passes is noise."""

    passes: tuple[tuple[float, ...], ...]

    @property
    def all(self) -> list[float]:
        return [value for values in self.passes for value in values]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.all, n=4, method="inclusive")
        return low, high

    @property
    def medians(self) -> list[float]:
        """Of each pass."""
        return [statistics.median(values) for values in self.passes]

    def map(self, change: Callable[[float], float]) -> Samples:
        return Samples(tuple(tuple(map(change, values)) for values in self.passes))

    def rate(self, work: float) -> Samples:
        """Work a second, of seconds."""
        return self.map(lambda seconds: work / seconds)

    def beside(self, other: Samples, combine: Callable[[float, float], float]) -> Samples:
        """Of values that were measured in the same round."""
        pairs = zip(self.passes, other.passes, strict=True)
        return Samples(tuple(tuple(map(combine, mine, theirs)) for mine, theirs in pairs))

    def over(self, other: Samples) -> Samples:
        return self.beside(other, lambda mine, theirs: mine / theirs)


@dataclass(frozen=True)
class Bar:
    """How good a figure must be."""

    limit: float
    least: bool  # or at most

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.limit:g}"


def at_least(limit: float) -> Bar:
    return Bar(limit, least=True)


def at_most(limit: float) -> Bar:
    return Bar(limit, least=False)
