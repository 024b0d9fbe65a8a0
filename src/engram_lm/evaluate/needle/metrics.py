"""RULER's two metrics, and how far a score would move had other samples been drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import DataError
from ...statistics import ratio_interval, wilson


def found(output: str, references: Sequence[str]) -> list[bool]:
    """Which references the output contains, upper and lower case being the same."""
    return [reference.lower() in output.lower() for reference in references]


def all_of(output: str, references: Sequence[str]) -> float:
    """Share of the references that the output contains."""
    return float(np.mean(found(output, references)))


def any_of(output: str, references: Sequence[str]) -> float:
    """1 where the output contains any of the references, else 0."""
    return float(any(found(output, references)))


def string_match_all(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over samples of the share of references that the output contains, 0 to 1 (RULER prints it times 100).

    Raises DataError when there are no samples, or not as many outputs as lists of references, or a list is empty.
    """
    return _mean(all_of, outputs, references)


def string_match_part(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of samples whose output contains at least one reference, as NVIDIA/RULER scores question answering.

    lm-eval 0.4.13 has a function of the same name that takes the maximum over outputs of the mean over references: "alpha" for
    the references "alpha" and "beta" is 1.0 here and 0.5 there, so its QA scores are lower for the same outputs.
    Raises DataError as string_match_all does.
    """
    return _mean(any_of, outputs, references)


METRICS = {"string_match_all": all_of, "string_match_part": any_of}


def _mean(
    score: Callable[[str, Sequence[str]], float], outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    if not outputs or len(outputs) != len(references) or not all(references):
        raise DataError(
            f"{len(outputs)} outputs cannot be scored by {len(references)} lists of references: "
            "each output needs a list of its own with something in it."
        )
    return float(np.mean([score(output, wanted) for output, wanted in zip(outputs, references, strict=True)]))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean score over samples: Wilson's where each is 0 or 1, else a bootstrap over samples.

    Wilson's does not shrink to a point when every sample failed. It says nothing about other seeds of the model.
    """
    if set(scores) <= {0.0, 1.0}:
        return wilson(sum(scores) / len(scores), len(scores))
    return ratio_interval(np.array(scores), np.ones(len(scores))) or (0.0, 1.0)
