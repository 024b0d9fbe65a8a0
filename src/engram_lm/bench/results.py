"""What a benchmark found: medians, quartiles, ratios, and how steady the machine was. As JSON and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Entry:
    """A contender's times, one a round."""

    name: str
    seconds: tuple[float, ...]
    note: str = ""  # what the name does not say

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds between which the middle half of the rounds lies."""
        return quartiles(self.seconds)


@dataclass(frozen=True)
class Case:
    """Contenders at one size; the first is the reference. A call does `work` of `unit`; speeds are shown, or times without unit."""

    title: str
    entries: tuple[Entry, ...]
    unit: str = ""
    work: int = 1

    def ratios(self, entry: Entry) -> np.ndarray:
        """[rounds] time of `entry` over the reference's in the same round."""
        return np.array(entry.seconds) / np.array(self.entries[0].seconds)

    def json(self) -> dict[str, Any]:
        """As in `Results.json`."""
        return {
            "title": self.title,
            "unit": self.unit,
            "work": self.work,
            "entries": list(map(self._line, self.entries)),
        }

    def _line(self, entry: Entry) -> dict[str, Any]:
        ratios = self.ratios(entry)
        return {
            "name": entry.name,
            "note": entry.note,
            "median_seconds": entry.median,
            "quartiles_seconds": list(entry.quartiles),
            "per_second": self.work / entry.median if self.unit else None,
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": list(quartiles(ratios)),
            "seconds": list(entry.seconds),
        }


@dataclass(frozen=True)
class Results:
    """One run of a benchmark."""

    bench: str
    cases: tuple[Case, ...]
    calibration: Entry  # times of work that is always the same, all through the run
    left_out: dict[str, str]  # what was not measured, and why
    machine: dict[str, Any]

    @property
    def noise(self) -> dict[str, float]:
        """How steady the machine was: quartiles and slowest time of work that is always the same, over its median."""
        (low, high), median = self.calibration.quartiles, self.calibration.median
        slowest = max(self.calibration.seconds) / median
        return {
            "median_seconds": median,
            "lower_quartile": low / median,
            "upper_quartile": high / median,
            "slowest": slowest,
        }

    def json(self) -> dict[str, Any]:
        """Everything as JSON values: bench, machine, noise, cases, left_out."""
        return {
            "bench": self.bench,
            "machine": self.machine,
            "noise": self.noise,
            "cases": [case.json() for case in self.cases],
            "left_out": self.left_out,
        }

    def __rich__(self) -> RenderableType:
        """A table for each case, notes, and under what conditions they were measured."""
        return Group(*map(_table, self.cases), *map(Text, self._remarks()))

    def _remarks(self) -> Iterable[str]:
        notes = {entry.name: entry.note for case in self.cases for entry in case.entries if entry.note}
        for name, note in notes.items():
            yield f"{name}: {note}."
        for name, reason in self.left_out.items():
            yield f"{name}: {reason}."
        machine, noise = self.machine, self.noise
        yield (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['ram_gb']:.0f} GB RAM, "
            f"huge pages: {machine['huge_pages']}; torch {machine['torch']}, numba {machine['numba']}, numpy {machine['numpy']}."
        )
        yield (
            f"Noise: {self.calibration.name} took {1e3 * noise['median_seconds']:.1f} ms, the middle half of its runs "
            f"{100 * (noise['lower_quartile'] - 1):+.0f} % to {100 * (noise['upper_quartile'] - 1):+.0f} %, the slowest "
            f"x {noise['slowest']:.1f}; load average {machine['load']:.1f} at the start."
        )


def _table(case: Case) -> Table:
    def figures(seconds: Iterable[float]) -> str:
        """As speeds where the case has a unit, otherwise as milliseconds; ascending."""
        values = sorted(case.work / each if case.unit else 1e3 * each / case.work for each in seconds)
        return " - ".join(map(_short if case.unit else _three_digits, values))

    head = f"{case.unit}/s" if case.unit else "ms"
    table = Table("", head, "quartiles", "x time", "quartiles", box=None, title_justify="left")
    table.title = f"{case.title}; {len(case.entries[0].seconds)} rounds"
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in case.entries:
        ratios = case.ratios(entry)
        spread = " - ".join(map(_three_digits, quartiles(ratios)))
        figure = figures([entry.median]), figures(entry.quartiles), _three_digits(np.median(ratios)), spread
        table.add_row(Text(entry.name), *figure)
    return table


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _short(value: float) -> str:
    """Three digits and a prefix: 28.4 M."""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return _three_digits(value / factor) + prefix
    return _three_digits(value)


def quartiles(values: Iterable[float] | np.ndarray) -> tuple[float, float]:
    """Between which the middle half of the values lies."""
    low, high = np.quantile(np.array(values), [0.25, 0.75])
    return float(low), float(high)
