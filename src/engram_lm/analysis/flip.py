"""Causal flip of a fact: give the memory the rows of another key, and see whether the answer follows.

Two prompts differ in a key and so in their answers. The model reads prompt A, but at one position it is handed the rows that
prompt B reads there; tokens, attention and table stay as they are. Where the memory holds the fact, the logits move from A's
answer towards B's. (After nano-scalemb's flip inside the memory stream: +0.36 logits, 28 of 36 in the right direction, never
another top-1.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..statistics import wilson
from .capture import evaluating, memories


@dataclass(frozen=True)
class Pair:
    """Two prompts [T] and [S] whose rows differ at `position` (negative: counted from the end of each).

    answers: token ids that follow prompt A and prompt B; None for those that the model itself puts first.
    """

    prompt_a: Tensor
    prompt_b: Tensor
    position: int = -1
    answers: tuple[int, int] | None = None


@torch.no_grad()
def flip(
    model: LanguageModel,
    lookup: Lookup,
    prompt_a: Tensor,
    prompt_b: Tensor,
    position: int = -1,
    answers: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Read prompt A with the rows that prompt B reads at `position`; see `Pair` for the arguments.

    {"answers": [a, b], "logit_a": [before, after], "logit_b": [before, after], "top_1": [before, after], "shift", "way",
    "right": bool, "flipped": bool}: logits behind the last token of prompt A; "shift": by how much the logit of b less that
    of a rose; "way": which part that is of what prompt B itself makes of the difference (1: all of it; None where B makes
    none); "right": the shift is positive; "flipped": a was in front, and now b is. Nothing is written to the table.
    Raises MismatchError for a model without a memory, DataError for a position outside of a prompt.
    """
    memories(model)
    for name, prompt in ("prompt_a", prompt_a), ("prompt_b", prompt_b):
        if not -len(prompt) <= position < len(prompt):
            raise DataError(f"position {position} lies outside of the {len(prompt)} tokens of {name}.")
    rows_a, rows_b = (lookup.rows(prompt[None])[0] for prompt in (prompt_a, prompt_b))
    swapped = rows_a.clone()
    swapped[:, position] = rows_b[:, position]

    def logits(prompt: Tensor, rows: Tensor) -> Tensor:
        hidden, _ = model(prompt[None], rows)
        return model.logits(hidden[0, -1]).float()

    with evaluating(model):
        before, after, other = logits(prompt_a, rows_a), logits(prompt_a, swapped), logits(prompt_b, rows_b)
    a, b = answers or (int(before.argmax()), int(other.argmax()))

    def lead(scores: Tensor) -> float:
        return float(scores[b] - scores[a])

    shift, whole = lead(after) - lead(before), lead(other) - lead(before)
    top = [int(before.argmax()), int(after.argmax())]
    return {
        "answers": [a, b],
        "logit_a": [float(before[a]), float(after[a])],
        "logit_b": [float(before[b]), float(after[b])],
        "top_1": top,
        "shift": shift,
        "way": shift / whole if whole else None,
        "right": shift > 0,
        "flipped": a != b and top == [a, b],
    }


def flips(model: LanguageModel, lookup: Lookup, pairs: Sequence[Pair]) -> dict[str, Any]:
    """All pairs together; those in which both prompts have the same answer hold no fact to flip and only count in "same".

    {"pairs", "same", "right", "right_interval", "flipped", "flipped_interval", "shift", "shift_error"}: shares with Wilson's
    95 % intervals, the mean shift in logits and its standard error (None for fewer than two pairs).
    Raises DataError when no pair is left.
    """
    each = [flip(model, lookup, p.prompt_a, p.prompt_b, p.position, p.answers) for p in pairs]
    facts = [one for one in each if one["answers"][0] != one["answers"][1]]
    if not facts:
        raise DataError(f"of {len(each)} pairs of prompts none has two different answers: there is no fact to flip.")
    count = len(facts)
    shifts = torch.tensor([one["shift"] for one in facts], dtype=torch.float64)
    right, flipped = (sum(one[key] for one in facts) / count for key in ("right", "flipped"))
    return {
        "pairs": count,
        "same": len(each) - count,
        "right": right,
        "right_interval": list(wilson(right, count)),
        "flipped": flipped,
        "flipped_interval": list(wilson(flipped, count)),
        "shift": float(shifts.mean()),
        "shift_error": float(shifts.std() / math.sqrt(count)) if count > 1 else None,
    }
