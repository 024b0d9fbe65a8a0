"""Rows: the truth's bits in every encoding, out of device memory and out of pinned host memory; and the sums of gradients."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from engram_lm.kernels.gpu import rows as kernels
from engram_lm.kernels.gpu.sums import sum_rows
from engram_lm.tables import rows as truth
from engram_lm.tables.rows import ENCODINGS, RowFormat

from .bench import Bench
from .equal import distance, same

POISON = 0xAA


def forms(bench: Bench) -> list[tuple[RowFormat, int]]:
    """Formats, and how many rows of each."""
    small = [(RowFormat(dim, encoding, std=0.1, seed=7), 50) for dim, encoding in product((1, 33, 80), ENCODINGS)]
    real = [(RowFormat(256, encoding, seed=2**40 + 1), 20_000) for encoding in ENCODINGS]
    return bench.size(small + real, [(form, 9) for form, _ in small if form.dim == 33])


def wide(bench: Bench, *shape: int) -> Tensor:
    """Numbers of all magnitudes, and the special ones."""
    numbers = bench.normal(*shape) * torch.exp2((bench.integers(120, *shape) - 60).float())
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 448.0, 3e38, 1e-45, -1e-40], device=bench.device
    )
    return torch.where(bench.integers(40, *shape) == 0, special[bench.integers(len(special), *shape)], numbers)


def label(form: RowFormat) -> str:
    return f"{form.encoding} {form.dim}"


def encoding(bench: Bench) -> None:
    """Numbers to bytes: those of the truth."""
    for form, count in forms(bench):
        numbers = wide(bench, count, form.dim)
        out = torch.full((count, form.row_bytes), POISON, dtype=torch.uint8, device=bench.device)
        kernels.encode(form, numbers, out)
        want = truth.encode(form, numbers.cpu())
        bench.check(f"encode {label(form)}", same_rows(form, out, want))


def reading(bench: Bench) -> None:
    """Bytes to numbers: those of the truth, from either memory, in float32 and bfloat16; rows that are not there are NaN."""
    for form, count in forms(bench):
        records = bench.bytes(count, form.stride)
        records[::3] = 0  # never written
        slots = bench.integers(count, 2 * count)
        slots[::7], slots[1::7] = -1, count
        ids, there = bench.integers(2**50, 2 * count), (slots >= 0) & (slots < count)
        want = truth.read_rows(form, records.cpu(), slots.clamp(0, count - 1).cpu(), ids.cpu())
        want[~there.cpu()] = torch.nan
        for place, dtype in product(("device", "pinned"), (torch.float32, torch.bfloat16)):
            out = torch.full((len(slots), form.dim), 12345.0, dtype=dtype, device=bench.device)
            kernels.read_rows(form, records if place == "device" else bench.pinned(records), slots, ids, out)
            bench.check(f"read {label(form)} from {place} memory as {str(dtype)[6:]}", same(out, want.to(dtype)))


def moving(bench: Bench) -> None:
    """Bytes to and fro: gather and scatter, with rows that are not there."""
    for width, count in bench.size([(4, 30), (132, 500), (264, 50_000), (1028, 500)], [(132, 9)]):
        records, slots = (
            bench.bytes(2 * count, width),
            torch.randperm(2 * count, device=bench.device, generator=bench.generator),
        )
        slots = slots[:count]
        slots[::5] = -1
        there = slots >= 0
        for place in ("device", "pinned"):
            held = records.clone() if place == "device" else bench.pinned(records)
            out = torch.full((count, width), POISON, dtype=torch.uint8, device=bench.device)
            kernels.gather(held, slots, out)
            want = torch.where(there[:, None], records[slots.clamp(min=0)], 255)
            bench.check(f"gather {width} bytes from {place} memory", same(out, want))
            given, after = bench.bytes(count, width), records.clone()
            kernels.scatter(held, slots, given)
            bench.synchronize()
            after[slots[there]] = given[there]
            bench.check(f"scatter {width} bytes into {place} memory", same(held, after))


def updating(bench: Bench) -> None:
    """Row-wise Adagrad: the truth's bytes after three updates, with rows that get nothing and a NaN that stays in its row."""
    for form, count in forms(bench):
        records = torch.zeros(2 * count, form.stride, dtype=torch.uint8, device=bench.device)
        want, ids = records.cpu(), torch.arange(2 * count)
        for clock in range(3):
            slots = torch.randperm(2 * count, device=bench.device, generator=bench.generator)[:count]
            grads = bench.normal(count, form.dim) * torch.exp2(-bench.integers(30, count, 1).float())
            grads[::4] = 0
            kernels.update_rows(form, records, slots, slots, grads, 0.1, clock)
            truth.update_rows(form, want, slots.cpu(), slots.cpu(), grads.cpu(), 0.1, clock)
        bench.check(f"update {label(form)}", same(records, want))
        slots, grads = torch.arange(2, device=bench.device), bench.normal(2, form.dim)
        grads[0, 0] = torch.nan
        kernels.update_rows(form, records, slots, slots, grads, 0.1, 3)
        rows = truth.read_rows(form, records.cpu(), ids, ids)
        fine = bool(rows[0].isnan().any()) and not bool(rows[1:].isnan().any())
        bench.check(f"update {label(form)} with a NaN", fine)


def summing(bench: Bench) -> None:
    """Sums of gradients by row: near the float64 truth, the same bits twice, a NaN in its own row alone."""
    for count, reads, dim in bench.size([(7, 40, 33), (60_000, 262_144, 64)], [(5, 300, 8)]):
        inverse = (
            count ** torch.rand(reads, device=bench.device, generator=bench.generator)
        ).long() - 1  # few have most
        for dtype in (torch.float32, torch.bfloat16):
            grads = bench.normal(reads, dim, dtype=dtype)
            want = torch.zeros(count, dim, dtype=torch.float64).index_add_(0, inverse.cpu(), grads.cpu().double())
            once, twice = (torch.full((count, dim), torch.nan, device=bench.device) for _ in range(2))
            for out in (once, twice):
                sum_rows(grads, inverse, out)
            error = distance(once.cpu(), want)
            bench.check(f"sums of {reads} {str(dtype)[6:]} gradients", error < 1e-5, f"off by {error:.1e}")
            bench.check(f"sums of {reads} {str(dtype)[6:]} gradients, the same bits twice", same(once, twice))
            grads[0] = torch.nan
            sum_rows(grads, inverse, twice)
            once[inverse[0]] = torch.nan
            bench.check(f"sums of {reads} {str(dtype)[6:]} gradients, a NaN among them", same(twice, once))


def same_rows(form: RowFormat, records: Tensor, want: Tensor) -> bool:
    """Whether encoded rows agree to the byte, but for NaNs: they need only be NaN in the same places."""
    got, expected = truth.decode(form, records.cpu()), truth.decode(form, want)
    finite = ~expected.isnan().any(1)
    return same(got, expected) and torch.equal(records.cpu()[finite], want[finite])


CHECKS = (encoding, reading, moving, updating, summing)
