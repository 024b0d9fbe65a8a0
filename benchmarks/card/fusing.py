"""Engram on 8192 tokens: gate, short convolution and their backward, with the matrix products around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engram_lm.kernels.gpu import fuse
from engram_lm.memory import Engram, EngramConfig

from .bench import Bench, without_kernels
from .ceilings import ceiling
from .samples import at_least
from .timing import compare, kernel_times

SETS = 2  # of inputs, in turn; each is larger than any cache


def run(bench: Bench) -> None:
    """The paper's layer, which the bars are for, and V4.1's, which has no convolution but wider rows; in two kinds of bf16."""
    v41, paper = EngramConfig.deepseek_v41(), EngramConfig(row_dim=80)
    layers = (("paper, 16 rows of 80", paper, 16, True), ("v41, 24 rows of 256", v41, 24, False))
    for (name, config, rows, barred), held in product(layers, bench.size((True, False), (True,))):
        measure(bench, f"{name}, {'bf16 module' if held else 'bf16 autocast'}", config, rows, held=held, barred=barred)


def measure(bench: Bench, name: str, config: EngramConfig, rows: int, *, held: bool, barred: bool) -> None:
    """held: parameters and streams are bf16; otherwise they are float32, and the products alone are bf16."""
    batch, length, streams, dim = bench.size((4, 2048, 4, 2560), (1, 2, 1, 16))
    row_dim = config.row_dim
    module = Engram(config, dim=dim, streams=streams, rows_per_token=rows).to(bench.device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * bench.normal(*parameter.shape)
    dtype = torch.bfloat16 if held else torch.float32
    module.to(dtype)

    def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
        return bench.normal(*shape, dtype=dtype).requires_grad_()

    hidden = [leaf(batch, length, streams, dim, dtype=dtype) for _ in range(SETS)]
    given = [leaf(batch, length, rows, row_dim, dtype=torch.bfloat16) for _ in range(SETS)]
    grads = [bench.normal(batch, length, streams, dim, dtype=dtype) for _ in range(SETS)]
    outer = [bench.normal(batch, length, module.project.out_features, dtype=torch.bfloat16) for _ in range(SETS)]

    def step(layer: Callable[..., Any]) -> Callable[[int], Sequence[Tensor]]:
        def call(turn: int) -> Sequence[Tensor]:
            at = turn % SETS
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=not held):
                delta, _ = layer(hidden[at], given[at])
            return torch.autograd.grad(delta, [hidden[at], given[at], *module.parameters()], grads[at])

        return call

    def products(turn: int) -> Sequence[Tensor]:
        at = turn % SETS
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=not held):
            projected = module.project(given[at].flatten(-2))
        return torch.autograd.grad(projected, [given[at], module.project.weight], outer[at])

    def plain(call: Callable[[int], Any]) -> Callable[[int], Any]:
        def without(turn: int) -> Any:
            with without_kernels():
                return call(turn)

        return without

    contenders = {"kernels": step(module), "eager": plain(step(module)), "products": products}
    if barred and not bench.dry:  # compiling takes long, and on a CPU a C++ compiler
        contenders["torch.compile"] = plain(step(torch.compile(module)))
    times = compare(bench, contenders)
    bench.figure(f"{name}: kernels", times["kernels"].map(lambda seconds: 1e3 * seconds), "ms")
    bench.figure(f"{name}: matrix products alone", times["products"].map(lambda seconds: 1e3 * seconds), "ms")
    for other, limit in {"eager": 2, "torch.compile": 1.3}.items():
        if other in times:
            faster = times[other].over(times["kernels"])
            bench.figure(f"{name}: against {other}", faster, "x as fast", bar=at_least(limit) if barred else None)
    longest = list(kernel_times(bench, contenders["kernels"]).items())[:10]
    bench.note(f"{name}: " + ", ".join(f"{kernel[:48]} {time:.0f} us" for kernel, time in longest))
    rest = times["kernels"].beside(times["products"], lambda all, products: max(all - products, 1e-9))
    moved = batch * length * dim * bytes_to_move(streams, hidden[0].itemsize)
    share = rest.map(lambda seconds: 100 * moved / seconds / ceiling(bench, "copy"))
    bench.figure(
        f"{name}: outside of the products, share of the copy bandwidth",
        share,
        "%",
        bar=at_least(70) if barred else None,
        note=f"{moved / 1e9:.2f} GB",
    )
    if barred and held:
        sweep(bench, contenders["kernels"], name)


def sweep(bench: Bench, call: Callable[[int], Any], name: str) -> None:
    """Whether another spread over the device would be quicker: fuse.WARPS, which share the positions."""
    warps = [fuse.WARPS * factor // 4 for factor in bench.size((1, 2, 4, 8, 16), (4,))]

    def spread(number: int) -> Callable[[int], Any]:
        def spreading(turn: int) -> Any:
            with mock.patch.object(fuse, "WARPS", number):
                return call(turn)

        return spreading

    times = compare(bench, {str(number): spread(number) for number in warps})
    found = ", ".join(f"{number}: {1e3 * time.median:.3f} ms" for number, time in times.items())
    bench.note(f"{name}: with other numbers of warps {found}; the kernels take {fuse.WARPS}")


def bytes_to_move(streams: int, itemsize: int) -> int:
    """For each token and column: each input read once and each output written once, forward and once more backward.

    The M streams, their deltas and the gradients of both are in the streams' type, the M keys and the value and their gradients in bf16,
    as the matrix products give and take them.
    """
    projected = 2 * (streams + 1)
    forward = streams * itemsize + projected + streams * itemsize
    backward = 2 * streams * itemsize + projected + streams * itemsize + projected
    return forward + backward
