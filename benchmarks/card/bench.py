"""One run: what it runs on, what is random in it, how much time is left, and what it has found so far."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from engram_lm import kernels

from .samples import Bar, Samples

T = TypeVar("T")


@dataclass
class Section:
    """What a section has found."""

    status: str = "running"  # then done, failed or skipped
    reason: str = ""
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """Handed to every section.

    dry: on a CPU, whose times mean nothing. tiny: shapes as in a dry run. ram: bytes of host memory to count on. ceilings: what the
    section of that name has measured, in bytes or operations a second.
    """

    device: torch.device
    tiny: bool
    seed: int
    out: Path
    data: str
    deadline: float  # of time.monotonic
    ram: int
    ceilings: dict[str, float] = field(default_factory=dict)
    section: Section = field(default_factory=Section)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def left(self) -> float:
        """Seconds until the run has to end."""
        return self.deadline - time.monotonic()

    def size(self, real: T, tiny: T) -> T:
        """The one that this run takes."""
        return tiny if self.tiny else real

    # --- inputs -----------------------------------------------------------------------------------------------------

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).to(dtype)

    def integers(self, limit: int, *shape: int) -> Tensor:
        """int64 below the limit."""
        return torch.randint(limit, shape, device=self.device, generator=self.generator)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=self.device, generator=self.generator)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A copy in host memory that the GPU can address."""
        return tensor.cpu() if self.dry else tensor.cpu().pin_memory()

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    # --- findings ---------------------------------------------------------------------------------------------------

    def figure(self, name: str, samples: Samples, unit: str, *, bar: Bar | None = None, note: str = "") -> None:
        """A median with its quartiles."""
        self.value(
            name, samples.median, samples.quartiles, "quartiles", unit, bar=bar, note=note, passes=samples.medians
        )

    def value(
        self,
        name: str,
        value: float,
        interval: tuple[float, float] | None,
        spread: str,
        unit: str,
        *,
        bar: Bar | None = None,
        note: str = "",
        passes: list[float] | None = None,
    ) -> None:
        """A figure with an interval, which is what `spread` says. A dry run meets no bar and misses none."""
        met = None if bar is None or self.tiny else bar.met(value)
        low, high = interval or (None, None)
        self.section.figures.append(
            {
                "name": name,
                "value": value,
                "low": low,
                "high": high,
                "spread": spread,
                "unit": unit,
                "passes": passes or [],
                "bar": None if bar is None else str(bar),
                "met": met,
                "note": note,
            }
        )
        between = "" if low is None else f"  ({low:.4g} to {high:.4g})"
        verdict = "" if bar is None else f"  bar {bar}: {verdicts[met]}"
        print(f"  {name:<66} {value:>10.4g} {unit}{between}{verdict}{f'  [{note}]' if note else ''}", flush=True)

    def check(self, name: str, passed: bool, found: str = "") -> None:
        """Whether something is right; what is wrong is printed."""
        self.section.checks.append({"name": name, "passed": bool(passed), "found": found})
        if not passed:
            print(f"  WRONG {name}{f': {found}' if found else ''}", flush=True)

    @contextlib.contextmanager
    def checking(self, what: str) -> Iterator[None]:
        """A group of checks: what is raised in it is a failed check, and the next group comes."""
        first = len(self.section.checks)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(what, False, f"raised {type(error).__name__}: {error}")
        passed = [check["passed"] for check in self.section.checks[first:]]
        print(f"  {sum(passed):>3} of {len(passed):<3} right  {what}", flush=True)

    def note(self, text: str) -> None:
        self.section.notes.append(text)
        print(f"  note: {text}", flush=True)


verdicts = {True: "met", False: "MISSED", None: "not measured"}


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """The plain operations of the library on a GPU, as with ENGRAM_KERNELS=off."""
    with mock.patch.object(kernels, "_triton", _none):
        yield


def _none() -> bool:  # torch.compile, which may look into it, takes no mock
    return False
