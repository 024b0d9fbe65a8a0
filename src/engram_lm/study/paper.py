"""The curves that arXiv 2601.07372 draws, as points: figure 3, left and right.

The paper prints few of these numbers; they were read off the vector graphics of its figures (the marks' coordinates, not the
drawn trend lines). It gives no seeds and no error bars.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Validation loss `y` (nats a token) at `x`."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    @property
    def losses(self) -> np.ndarray:
        """[points, 1]: of the one seed that there is, as the fits take them."""
        return np.array(self.y)[:, None]


SLOTS_PER_VOCABULARY = 129_280  # of the study's tables: slots come in multiples of the vocabulary's size

MEMORY = Curve(
    "Engram in the paper (arXiv 2601.07372, figure 3 right: 3 B backbone, 100 B tokens)",
    tuple(SLOTS_PER_VOCABULARY * multiple for multiple in (2, 5, 10, 15, 20, 30, 50, 80)),
    (1.7883, 1.7760, 1.7678, 1.7654, 1.7603, 1.7527, 1.7481, 1.7432),
)
OVERENCODING = Curve(
    "OverEncoding in the paper (arXiv 2601.07372, figure 3 right)",
    tuple(SLOTS_PER_VOCABULARY * multiple for multiple in (10, 20, 40, 100)),
    (1.7820, 1.7711, 1.7670, 1.7505),
)
MEMORY_BASE = 1.8082  # the mixture of experts without a memory, same figure

ALLOCATION = Curve(
    "the paper at 6e20 FLOPs (arXiv 2601.07372, figure 3 left: 9.9 B parameters)",
    (0.397, 0.505, 0.602, 0.698, 0.752, 0.795, 0.849, 0.903, 0.946, 1.0),
    (1.7247, 1.7196, 1.7136, 1.7122, 1.7126, 1.7109, 1.7095, 1.7125, 1.7130, 1.7248),
)
ALLOCATION_SMALLER = Curve(
    "the paper at 2e20 FLOPs (arXiv 2601.07372, figure 3 left: 5.7 B parameters)",
    (0.40, 0.51, 0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.0),
    (1.8275, 1.8227, 1.8190, 1.8172, 1.8177, 1.8170, 1.8155, 1.8172, 1.8201, 1.8292),
)
