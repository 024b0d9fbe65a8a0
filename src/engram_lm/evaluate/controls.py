"""The arms that separate a memory from what comes along with it: the same run, the same batches, one thing changed.

base            no memory                                      what the memory is added to
bigram          a hashed bigram embedding, added at the input  the simplest memory; same table parameters
engram          the memory
capacity_1      every n-gram reads the same rows               the branch without addresses
frozen_random   random rows that never train                   addresses without learned content
shuffled        rows of another text's n-grams                 learned content without addresses
ffn             the branch's parameters in the FFN             what active parameters alone would bring
iso_flop        a wider FFN, equal FLOPs                       what arithmetic alone would bring
moe             experts with as many parameters in all         what sparse parameters in experts would bring
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

from ..errors import ConfigError
from ..hashing import HashConfig
from ..memory import EngramConfig
from ..model.count import Count, count
from ..model.ffn import MoEConfig
from ..model.lm import MemoryConfig, ModelConfig
from ..train.loop import TrainConfig

Arm = Literal[
    "base", "bigram", "engram", "capacity_1", "frozen_random", "shuffled", "ffn", "iso_flop", "moe"
]  # in the order of a report
ARMS: tuple[Arm, ...] = get_args(Arm)

DESCRIPTIONS: dict[str, str] = {
    "base": "the backbone alone",
    "bigram": "the backbone and a hashed bigram embedding of the same table size, added at the input without a gate",
    "engram": "the backbone with its memory",
    "capacity_1": "the same branch with the same parameters, but every n-gram reads the same rows, one a head",
    "frozen_random": "the memory with random rows that never train: addresses without learned content",
    "shuffled": "the memory, but each text reads the rows of another one's n-grams: learned content without addresses",
    "ffn": "the backbone with a wider feed-forward layer, which has the parameters of the memory's branch",
    "iso_flop": "the backbone with a wider feed-forward layer, which does as much arithmetic as the memory's branch",
    "moe": "experts in place of the feed-forward layers, with as many parameters in all as backbone, branch and table",
}
RANDOM_STD = 0.25  # of rows that never train: what they add starts at a quarter of the residual stream's size


def config_of_arm(config: TrainConfig, arm: Arm) -> TrainConfig:
    """The run of one arm, from a configuration with a memory. Raises ConfigError for one without, or one that cannot be matched."""
    config = replace(config, model=model_of_arm(config.model, arm))
    if arm == "frozen_random":
        table = replace(config.table, std=RANDOM_STD)
        return replace(config, table=table, optim=replace(config.optim, table_lr=0.0))
    return config


def model_of_arm(model: ModelConfig, arm: Arm) -> ModelConfig:
    """The model of one arm, from a configuration with a memory. Weights of the backbone start equal where it has the same shape."""
    if model.memory is None:
        raise ConfigError("a comparison of arms starts from a model with a memory; this one has none.")
    base = replace(model, memory=None)
    if arm == "base":
        return base
    if arm == "bigram":
        return replace(base, memory=additive_bigram(model))
    if arm == "capacity_1" or arm == "shuffled":
        return replace(model, memory=replace(model.memory, hash=replace(model.memory.hash, scheme=arm)))
    if arm == "ffn":
        return widened(base, model, lambda size: size.active)
    if arm == "iso_flop":
        return widened(base, model, lambda size: size.training_flops)
    if arm == "moe":
        return mixture(model)
    return model


def additive_bigram(model: ModelConfig) -> MemoryConfig:
    """One row of the residual stream's width a bigram, added in front of block 0 without gate or convolution.

    As in modded-nanogpt's record 62, at the input only; as many table parameters as the memory of `model`.
    """
    assert model.memory is not None
    rows = count(model).tables // model.dim
    hash = HashConfig(orders=(2,), heads=1, layers=(0,), pad_id=model.memory.hash.pad_id, seed=model.memory.hash.seed)
    return MemoryConfig(hash.sized(rows=rows), EngramConfig(row_dim=model.dim, gate="open", conv_kernel=0))


def widened(base: ModelConfig, target: ModelConfig, size: Callable[[Count], int]) -> ModelConfig:
    """`base` with the FFN (or the experts') width at which its `size` comes nearest to the target's."""

    def at(width: int) -> ModelConfig:
        if base.moe:
            return replace(base, moe=replace(base.moe, width=width))
        return replace(base, ffn_width=width)

    width = base.moe.width if base.moe else base.ffn_width
    missing = size(count(target)) - size(count(base))
    per_unit = size(count(at(width + 8))) - size(count(at(width)))
    return at(max(1, width + round(8 * missing / per_unit)))


def mixture(model: ModelConfig) -> ModelConfig:
    """Experts that hold, in all, as many parameters as `model` with its memory, at the FLOPs of `model`.

    A dense FFN, of the width that matches FLOPs, becomes one shared and two active experts of a third of it in every block but
    the first. A mixture of experts gets more experts.
    """
    base = replace(model, memory=None)
    if base.moe is None:
        base = widened(base, model, lambda size: size.training_flops)
    third = max(8, base.ffn_width // 24 * 8)  # multiples of 16 bytes: see grouped_linear
    moe = base.moe or MoEConfig(experts=2, active=2, shared=1, width=third, dense_layers=min(1, base.layers - 1))
    total = count(model).total

    def at(experts: int) -> ModelConfig:
        return replace(base, moe=replace(moe, experts=experts))

    each = count(at(moe.experts + 1)).total - count(at(moe.experts)).total
    experts = moe.experts + round((total - count(at(moe.experts)).total) / each)
    if experts < moe.active:
        raise ConfigError(
            f"moe: {total:,} parameters in all leave {experts} experts of which {moe.active} would be active: give the memory "
            "more rows, or leave this arm out."
        )
    return at(experts)
