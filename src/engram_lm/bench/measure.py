"""Timing several ways to do one thing: a call of each in turn, round after round, so that whatever else the machine does
hits all of them alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track

from ..errors import EngramError
from ..machine import describe_machine
from .results import Case, Entry, Results

SQUARE = torch.ones(768, 768)
PAUSE = 0.003  # seconds in which the threads of the contender before, which may spin for a while, fall asleep


class WrongResultError(EngramError, RuntimeError):
    """A contender does not compute what it should, so its time would mean nothing."""


@dataclass(frozen=True)
class Contender:
    """One way to do it: `run(*prepare())`, of which only `run` is timed.

    right(result, *arguments): whether the result is what it should be; asked once, before anything is timed.
    """

    name: str
    run: Callable[..., Any]
    right: Callable[..., bool]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    note: str = ""


class Meter:
    """Collects the cases of one run."""

    def __init__(self, bench: str, rounds: int) -> None:
        self.bench, self.rounds = bench, rounds
        self.machine = describe_machine()
        self.cases: list[Case] = []
        self.calibration: list[float] = []
        self.left_out: dict[str, str] = {}

    def measure(
        self, title: str, contenders: Sequence[Contender], *, unit: str = "", work: int = 1, awake: bool = False
    ) -> Case:
        """Check what each contender computes, then time them, a call of each a round; the first round only warms up.

        awake: call each once more just before it is timed, so that its threads run already: short calls one after
        another. The first contender is the reference of the ratios. Raises WrongResultError for one that computes something else.
        """
        for contender in contenders:
            arguments = contender.prepare()
            if not contender.right(contender.run(*arguments), *arguments):
                raise WrongResultError(
                    f"bench {self.bench}, {title}: {contender.name} does not compute what it should; its time would mean "
                    "nothing."
                )
        seconds: list[list[float]] = [[] for _ in contenders]
        for number in track(range(self.rounds + 1), title, transient=True, disable=not sys.stdout.isatty()):
            self.calibration.append(timed(fixed_work))
            for position in range(len(contenders)):
                which = (number + position) % len(contenders)
                arguments, before = contenders[which].prepare(), contenders[which].prepare() if awake else ()
                time.sleep(PAUSE)
                if awake:
                    contenders[which].run(*before)
                seconds[which].append(timed(contenders[which].run, *arguments))
        entries = (
            Entry(contender.name, tuple(times[1:]), contender.note)
            for contender, times in zip(contenders, seconds, strict=True)
        )
        self.cases.append(Case(title, tuple(entries), unit, work))
        return self.cases[-1]

    def results(self) -> Results:
        """What was measured."""
        calibration = Entry("a matrix product", tuple(self.calibration))
        return Results(self.bench, tuple(self.cases), calibration, self.left_out, self.machine)


def timed(run: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that one call takes; what it returns is freed after the clock has stopped."""
    began = time.perf_counter()
    result = run(*arguments)
    seconds = time.perf_counter() - began
    del result
    return seconds


def fixed_work() -> torch.Tensor:
    """Some milliseconds of always the same work, on all threads."""
    return torch.mm(SQUARE, SQUARE)
