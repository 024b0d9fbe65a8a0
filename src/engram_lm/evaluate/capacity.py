"""How much a model holds: recall, loss on answers and names, and bits stored.

Capo's measure (PhysicsLM4, "Knowledge Capacity Scaling Laws", arXiv 2404.05405): N subjects whose names are drawn among N0 and
whose values among S0, with p1 and p2 nats lost on the tokens of a name and of a subject's values, have

    N log2(N0 / e^p1) + N log2(S0 / e^p2)

bits stored in the model. A model that knows the words but no fact loses ln S0 and stores nothing. In a set of N different names,
log2(N0 / N) bits of each are all there is to know.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..train.loader import Batch
from ..train.loop import on


class Answers(NamedTuple):
    """What a model said to n questions."""

    right: Tensor  # [n] bool: every token of the answer was the likeliest, given those before it
    nats: Tensor  # [n] float32: lost on the answer's tokens together

    @property
    def recall(self) -> float:
        """Share of right answers."""
        return float(self.right.float().mean())

    @property
    def loss(self) -> float:
        """Nats an answer."""
        return float(self.nats.double().mean())


@torch.no_grad()
def answer(model: LanguageModel, lookup: Lookup | None, questions: Batch, batch_size: int = 1024) -> Answers:
    """Have a model answer questions (`exposures.asked`); the result is on the CPU."""
    device = model.embedding.weight.device
    parts = []
    for first in range(0, len(questions.tokens), batch_size):
        batch = on(questions, device, slice(first, first + batch_size))
        rows = lookup.rows(batch.tokens)[0] if lookup else None
        hidden, _ = model(batch.tokens, rows)
        counted = batch.targets >= 0
        logits, targets = model.logits(hidden[counted]).float(), batch.targets[counted]
        question = counted.nonzero()[:, 0]
        wrong = torch.zeros(len(counted), device=device).index_add_(0, question, (logits.argmax(-1) != targets).float())
        nats = torch.zeros_like(wrong).index_add_(0, question, F.cross_entropy(logits, targets, reduction="none"))
        parts.append((wrong.cpu() == 0, nats.cpu()))
    right, nats = (torch.cat(part) for part in zip(*parts, strict=True))
    return Answers(right, nats)


def bits_stored(count: int, prior_bits: float, nats: float) -> float:
    """Bits that `count` things of `prior_bits` each are known by, to a model that loses `nats` on each; never below 0."""
    return max(0.0, count * (prior_bits - nats / math.log(2)))


def capacity(subjects: int, name_bits: float, name_nats: float, value_bits: float, value_nats: float) -> float:
    """The module's formula: name_bits = log2 N0, value_bits = log2 S0, and the nats of a subject's name and values.

    Each of its two terms is at least 0: a model that does worse than guessing has stored nothing.
    """
    return bits_stored(subjects, name_bits, name_nats) + bits_stored(subjects, value_bits, value_nats)
