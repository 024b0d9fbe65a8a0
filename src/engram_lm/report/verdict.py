"""The report's sentences, chosen by what was measured: where the memory did not help, they say so."""

from __future__ import annotations

from typing import Literal

from ..statistics import wilson
from .record import Arm, FactsAct, LanguageAct

Outcome = Literal["better", "worse", "same"]
MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"  # between a number and its unit or sign


def outcome(arm: Arm) -> Outcome:
    """Whether an arm's held-out loss differs from the base arm's by more than the difference's interval."""
    delta, interval = arm.delta or 0.0, arm.delta_interval or 0.0
    if abs(delta) <= interval:
        return "same"
    return "better" if delta < 0 else "worse"


def language(act: LanguageAct) -> list[str]:
    """Two paragraphs: what the memory did to the held-out loss and what the control says; what it cost."""
    return [f"{_loss(act)} {_control(act)}", _cost(act)]


def _loss(act: LanguageAct) -> str:
    engram = act.engram
    difference = plus_minus(abs(engram.delta or 0.0), engram.delta_interval)
    losses = f"held-out loss is {engram.val_loss:.3f} nats a token with the memory and {act.base.val_loss:.3f} without"
    match outcome(engram):
        case "better":
            return f"On the same batches, {losses}: the memory lowers it by {difference}."
        case "worse":
            return f"In this run the memory did not help: {losses}, higher by {difference}."
        case "same":
            return (
                f"This run shows no effect of the memory: {losses}, and the difference of {difference} "
                f"is within its uncertainty."
            )


def _control(act: LanguageAct) -> str:
    control, engram = act.capacity_1, act.engram
    difference = signed(control.delta or 0.0, control.delta_interval)
    intro = (
        f"The control, {control.name}, has the same parameters in the branch, "
        f"but every n-gram reads the same rows, one for each head."
    )
    if outcome(engram) != "better":
        return f"{intro} It differs from {act.base.name} by {difference}."
    match outcome(control):
        case "same":
            finding = f"It does not differ measurably from {act.base.name} ({difference})"
        case "worse":
            finding = f"It is worse than {act.base.name} ({difference})"
        case "better":
            share = (control.delta or 0.0) / (engram.delta or 1.0)
            if share >= 1:
                return f"{intro} It gains as much ({difference}): what helped is the branch, not the looking up."
            source = "most" if share < 0.5 else "less than half"
            return (
                f"{intro} It recovers {percent(share)} of the gain ({difference}), "
                f"so {source} of the gain comes from looking things up."
            )
    return f"{intro} {finding}, so the gain comes from looking things up, not from the extra branch."


def _cost(act: LanguageAct) -> str:
    base, engram = act.base, act.engram
    return (
        f"The price: a training step takes {engram.step_ratio:.2f} times as long, and a token costs "
        f"{engram.flops_per_token / base.flops_per_token:.2f} times the arithmetic. The table holds "
        f"{quantity(engram.table_parameters)} parameters, but a token reads only "
        f"{quantity(engram.bytes_per_token, 'B')} of it, and where to read depends on the tokens alone."
    )


def facts(act: FactsAct) -> str:
    """One paragraph: who recalls how much, what luck would get, and whether the difference is real."""
    base, engram = act.base, act.engram
    summary = (
        f"After {times(engram.recall[-1][0])} each, {engram.name} answers {percent(engram.final)} of the "
        f"questions and {base.name} {percent(base.final)}; "
        f"guessing among the possible answers gets {percent(act.chance)}."
    )
    base_low, base_high = wilson(base.final, act.questions)
    engram_low, engram_high = wilson(engram.final, act.questions)
    if engram_low > base_high:
        reached = engram.exposures_to(0.95)
        when = "" if reached is None else f" It passes 95{THIN}% after {times(reached)}."
        return (
            f"{summary}{when} A fact about a person hangs on a name. The memory has rows for the name "
            f"itself, so what the name brings can lie in one place; the model without it must work the fact "
            f"into weights that all names share."
        )
    if base_low > engram_high:
        return f"{summary} In this run the memory did not help: the model without it recalls more."
    return f"{summary} The difference is within its uncertainty: this run shows no effect of the memory."


def percent(share: float) -> str:
    """A share as a percentage, with more digits near 0 and 100 %."""
    distance = min(share, 1 - share)
    digits = 0 if distance < 1e-6 or 0.1 <= share <= 0.99 else 1 if distance >= 0.001 else 2
    return f"{100 * share:.{digits}f}{THIN}%"


def quantity(value: float, unit: str = "") -> str:
    """Three figures with an SI prefix: `quantity(3_212_000)` is 3.21 M."""
    prefixes = ("", "k", "M", "G", "T", "P") if unit else ("", "k", "M", "B", "T", "P")
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    figure = f"{value:.0f}" if power == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{figure}{THIN}{prefixes[power]}{unit}".rstrip(THIN)


def plus_minus(value: float, interval: float | None) -> str:
    """A value and the half width of its interval."""
    return f"{value:.3f}" if interval is None else f"{value:.3f} ±{THIN}{interval:.3f}"


def signed(value: float, interval: float | None) -> str:
    """`plus_minus` with a sign before it."""
    sign = MINUS if value < 0 else "+"
    return sign + plus_minus(abs(value), interval)


def times(exposures: float) -> str:
    """`1 exposure`, `10 exposures`."""
    return f"{exposures:g} exposure{'' if exposures == 1 else 's'}"
