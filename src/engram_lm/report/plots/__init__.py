"""Figures as inline SVG; only the files of this package import matplotlib, and only when a figure is drawn.

style.py     colours, and an SVG of what a function draws
curves.py    against tokens: loss of a run's, a retrofit's, a comparison's arms
arms.py      a comparison's differences: forest, slices, knock-outs
probes.py    gates, table usage, logit lens, alignment of layers
sweep.py     loss against rows or shares, with fits
facts.py     recall against exposures and against the number of facts
bench.py     bars of a benchmark

Every function but the last returns the SVG of one figure from plain values; `save` writes it into a file.
"""

from .arms import forest, knockouts, slice_gains
from .bench import bench_bars
from .curves import arm_curves, gain_curves, loss_curves, retrofit_curves
from .facts import recall_by_facts, recall_curves
from .probes import alignment, cache_curves, gate_histograms, lens_curves, row_reads
from .style import INK, MissingExtraError, save
from .sweep import paper_curve, sweep_curve

__all__ = [
    "INK",
    "MissingExtraError",
    "alignment",
    "arm_curves",
    "bench_bars",
    "cache_curves",
    "forest",
    "gain_curves",
    "gate_histograms",
    "knockouts",
    "lens_curves",
    "loss_curves",
    "paper_curve",
    "recall_by_facts",
    "recall_curves",
    "retrofit_curves",
    "row_reads",
    "save",
    "slice_gains",
    "sweep_curve",
]
