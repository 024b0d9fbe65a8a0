"""What others offer for the same work, called as they are meant to be. A peer that is not installed is said, and None."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..hashing import HashConfig, HashPlan

LeftOut = dict[str, str]  # name -> why it was not measured


def numpy_hash(plan: HashPlan, canonical: np.ndarray) -> np.ndarray:
    """The published demo's algorithm, from its description: whole arrays, layer by layer, order by order, head by head.

    canonical [B, T] int64 -> ids [B, T, L, K], the offsets of its embedding's heads included.
    """
    length = canonical.shape[1]
    layers = []
    for layer in range(len(plan.layers)):
        lags = [
            np.pad(canonical, ((0, 0), (lag, 0)), constant_values=plan.pad)[:, :length]
            for lag in range(plan.orders[-1])
        ]
        heads = []
        for order, n in enumerate(plan.orders):
            mix = lags[0] * plan.multipliers[layer, 0]
            for lag in range(1, n):
                mix = np.bitwise_xor(mix, lags[lag] * plan.multipliers[layer, lag])
            first = order * plan.heads
            heads += [mix % int(size) for size in plan.sizes[layer, first : first + plan.heads]]
        layers.append(np.stack(heads, axis=2) + plan.offsets[layer])
    return np.stack(layers, axis=2)


def engram_peft_hash(
    config: HashConfig, vocab_size: int, left_out: LeftOut
) -> Callable[[Tensor], dict[int, np.ndarray]] | None:
    """engram-peft's hasher with a configuration's layers, orders, heads and primes: canonical [B, T] -> {layer: [B, T, K]}.

    Its n-grams are others by design: windows lie further back, and multipliers run the other way. Its file is loaded by
    itself, as the package wants Python 3.12 and a dozen others of which the hasher uses none.
    """
    try:
        path = distribution("engram-peft").locate_file("engram_peft/hashing.py")
    except PackageNotFoundError:
        left_out["engram-peft"] = "not installed (pip install --no-deps engram-peft==1.2.7)"
        return None
    spec = importlib.util.spec_from_file_location("engram_peft_hashing", str(path))
    assert spec is not None
    assert spec.loader is not None
    hashing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hashing)
    return hashing.NgramHashMapping(
        compressed_vocab_size=vocab_size,
        engram_vocab_size_per_ngram=[rows * config.heads for rows in config.rows_by_order],  # divided by heads again
        ngram_sizes=list(config.orders),
        n_head_per_ngram=config.heads,
        layer_ids=list(config.layers),
        pad_id=config.pad_id,
        seed=config.seed,
    ).hash


class FBGEMM:
    """FBGEMM's table-batched embedding on a CPU, without pooling: one row out for each id in."""

    def __init__(self) -> None:
        ops = "fbgemm_gpu.split_table_batched_embeddings_ops"
        logging.getLogger("fbgemm_gpu").setLevel(logging.WARNING)
        self.inference, self.training = import_module(f"{ops}_inference"), import_module(f"{ops}_training")
        self.common, self.configs = import_module(f"{ops}_common"), import_module("fbgemm_gpu.split_embedding_configs")

    @staticmethod
    def load(left_out: LeftOut) -> FBGEMM | None:
        """None, with the reason in `left_out`, without fbgemm-gpu-cpu or where it does not load beside this torch."""
        try:
            return FBGEMM()
        except ModuleNotFoundError:
            left_out["FBGEMM"] = "not installed (pip install 'engram-lm[bench]')"
        except (ImportError, OSError) as error:
            left_out["FBGEMM"] = f"installed, but does not load: {error}"
        return None

    def gather(self, rows: Tensor, kind: Literal["fp32", "int8"]) -> Callable[[Tensor], Tensor]:
        """Rows as they are of `rows` uint8 [N, bytes], used in place: as bytes / 4 floats, or a scale and bytes - 4 integers."""
        count, width = rows.shape
        dim, dtype = (
            (width // 4, self.configs.SparseType.FP32) if kind == "fp32" else (width - 4, self.configs.SparseType.INT8)
        )
        table = self.inference.IntNBitTableBatchedEmbeddingBagsCodegen(
            [("rows", count, dim, dtype, self.common.EmbeddingLocation.HOST)],
            pooling_mode=self.common.PoolingMode.NONE,
            bounds_check_mode=self.common.BoundsCheckMode.NONE,
            output_dtype=dtype,
            row_alignment=1,
            indices_dtype=torch.int64,
            device="cpu",
        )
        table.weights_host, table.host_size, table.weight_initialized = rows.view(-1), rows.numel(), True
        table.initialize_logical_weights_placements_and_offsets()
        return lambda ids: table(ids, torch.tensor([0, len(ids)]))

    def rowwise_adagrad(self, num_rows: int, dim: int, lr: float) -> Any:
        """A module (ids, offsets) -> rows [U, dim] that updates its rows in backward; they start at zero."""
        return self.training.SplitTableBatchedEmbeddingBagsCodegen(
            [(num_rows, dim, self.common.EmbeddingLocation.HOST, self.training.ComputeDevice.CPU)],
            pooling_mode=self.common.PoolingMode.NONE,
            bounds_check_mode=self.common.BoundsCheckMode.NONE,
            optimizer=self.configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=lr,
            eps=1e-12,
        )
