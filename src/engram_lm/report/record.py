"""What a run measured: the plain values behind its report, read from and written to report.json."""

from __future__ import annotations

from dataclasses import dataclass

from ..analysis.gates import GateView

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Arm:
    """One model of the language act, trained on the same batches as its siblings.

    `curve` is the training loss of every step and `val_curve` the validation loss, both as (tokens, nats a
    token). `val_interval` and `delta_interval` are half widths of 95 % intervals; `delta` is val_loss minus
    the base arm's, from pairs on the same held-out text (None for the base arm itself). `step_ratio` is
    step time over the base arm's.
    """

    name: str
    description: str
    parameters: int
    active_parameters: int
    table_parameters: int
    flops_per_token: float
    bytes_per_token: int
    curve: Curve
    val_curve: Curve
    val_loss: float
    val_interval: float
    bits_per_byte: float
    tokens_per_second: float
    step_ratio: float = 1.0
    delta: float | None = None
    delta_interval: float | None = None


@dataclass(frozen=True)
class Sample:
    """Text that the memory arm wrote after `prompt`; `settings` says how it was drawn."""

    prompt: str
    continuation: str
    settings: str


@dataclass(frozen=True)
class LanguageAct:
    """Act one, on the text `data`: a backbone without memory, with the one-row control, and with memory."""

    data: str
    base: Arm
    capacity_1: Arm
    engram: Arm
    sample: Sample | None = None
    gates: GateView | None = None

    @property
    def arms(self) -> tuple[Arm, Arm, Arm]:
        """The arms in the order of the page."""
        return self.base, self.capacity_1, self.engram


@dataclass(frozen=True)
class AttributeRecall:
    """Share of the questions about one attribute answered right at the end."""

    attribute: str
    recall: float


@dataclass(frozen=True)
class FactsArm:
    """One model of the facts act; `recall` is (exposures of each fact, share answered right), in order."""

    name: str
    parameters: int
    table_parameters: int
    recall: Curve
    by_attribute: tuple[AttributeRecall, ...]

    @property
    def final(self) -> float:
        """The share answered right after the last exposure."""
        return self.recall[-1][1]

    def exposures_to(self, share: float) -> float | None:
        """The first measured number of exposures with a recall of at least `share`, None if there is none."""
        return next((exposures for exposures, recall in self.recall if recall >= share), None)


@dataclass(frozen=True)
class FactExample:
    """A question, the right answer, and what the two models said."""

    question: str
    answer: str
    base_answer: str
    engram_answer: str


@dataclass(frozen=True)
class FactsAct:
    """Act two: made-up people learned with and without memory.

    `people` is how many there are, `questions` how many questions measured each recall, `chance` the share
    that a guess among the possible answers gets right.
    """

    people: int
    questions: int
    chance: float
    base: FactsArm
    engram: FactsArm
    examples: tuple[FactExample, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command to type and what it is for."""

    command: str
    purpose: str


@dataclass(frozen=True)
class RunInfo:
    """Where the figures come from. `uncertainty` says in a sentence how the intervals were computed."""

    command: str
    seed: int
    date: str
    wall_seconds: float
    machine: str
    versions: tuple[str, ...]
    uncertainty: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    language: LanguageAct
    run: RunInfo
    facts: FactsAct | None = None
    next_steps: tuple[Command, ...] = ()
