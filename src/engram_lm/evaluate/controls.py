"""The arms that separate a memory from an extra branch: the same run, the same batches, one thing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..errors import ConfigError
from ..model.lm import ModelConfig

Arm = Literal["base", "capacity_1", "engram"]

DESCRIPTIONS: dict[str, str] = {
    "base": "the backbone alone",
    "capacity_1": "the same branch with the same parameters, but every n-gram reads the same rows, one a head",
    "engram": "the backbone with its memory",
}


def model_of_arm(model: ModelConfig, arm: Arm) -> ModelConfig:
    """The model of one arm, from a configuration with a memory. Backbone weights start equal in all of them."""
    if model.memory is None:
        raise ConfigError("a comparison of arms starts from a model with a memory; this one has none.")
    if arm == "base":
        return replace(model, memory=None)
    if arm == "capacity_1":
        collapsed = replace(model.memory.hash, scheme="capacity_1")
        return replace(model, memory=replace(model.memory, hash=collapsed))
    return model
