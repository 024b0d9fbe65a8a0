"""What the runs of a retrofit say together: each arm's loss, and differences between arms on the same documents."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch
import transformers

from .. import __version__
from ..statistics import ratio_interval
from .base import DocumentLosses


def summarise(base: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By arm and text (`held_out`, `outside`): loss, spread over seeds, and paired differences with 95 % intervals.

    base, runs: as in results.json. A difference is the arm's loss less another's; with several seeds, of the means over them.
    """
    arms: dict[str, list[dict[str, Any]]] = {"base": [base]}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    return {
        name: {text: _of_arm(name, arms, text) for text in ("held_out", "outside") if base[text] is not None}
        for name in arms
    }


def _of_arm(name: str, arms: dict[str, list[dict[str, Any]]], text: str) -> dict[str, Any]:
    own, tokens = _nats(arms[name], text)
    others = {other: _difference(own, _nats(arms[other], text)[0], tokens) for other in arms if other != name}
    return {
        "loss": float(own.mean(0).sum() / tokens.sum()),
        "interval": ratio_interval(own.mean(0), tokens),
        "seeds": _spread(own, tokens),
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
        "less": others,
    }


def _nats(runs: list[dict[str, Any]], text: str) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each seed and document [S, D], and their tokens [D]."""
    losses = [DocumentLosses.of(run[text]) for run in runs]
    return np.stack([one.nats for one in losses]), losses[0].tokens


def _difference(own: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    nats = own.mean(0) - other.mean(0)
    paired = own - (other if len(other) == len(own) else other.mean(0))  # the base has one seed
    return {
        "difference": float(nats.sum() / tokens.sum()),
        "interval": ratio_interval(nats, tokens),
        "seeds": _spread(paired, tokens),
    }


def _spread(nats: np.ndarray, tokens: np.ndarray) -> list[float]:
    """The figure of each seed."""
    return [float(one) for one in nats.sum(1) / tokens.sum()]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine that figures come from."""
    versions = {"engram_lm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import peft
    except ImportError:
        pass
    else:
        versions["peft"] = peft.__version__
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }
