"""V4.1's rows, 264 bytes each, as a batch of 8192 tokens reads them in one layer: from device memory and over the bus."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

from engram_lm.kernels.gpu import rows as kernels
from engram_lm.tables.host import huge_pages
from engram_lm.tables.pinned import pin
from engram_lm.tables.rows import RowFormat, encode

from .bench import Bench
from .ceilings import ceiling
from .samples import at_least
from .timing import compare

SETS = 6  # of ids, in turn: together they are more than the cache holds


def run(bench: Bench) -> None:
    """As bytes, and as the numbers that a matrix product takes."""
    form = RowFormat(256, "fp8_e8m0", trainable=False)
    count, num_rows = bench.size((8192 * 24, 16_000_000), (16, 64))
    nbytes = count * form.stride
    near = some_rows(bench, form, num_rows)
    far = pin(huge_pages(near.nbytes), bench.device).view_as(near)
    far.copy_(near)
    ids = [bench.integers(num_rows, count) for _ in range(SETS)]
    there = [some.cpu() for some in ids]
    out = torch.empty(count, form.stride, dtype=torch.uint8, device=bench.device)
    half, staged = torch.empty(count, form.dim, dtype=torch.bfloat16, device=bench.device), bench.pinned(out)

    def by_host(turn):
        torch.index_select(far, 0, there[turn % SETS], out=staged)
        out.copy_(staged, non_blocking=True)

    def to_numbers(records):
        return lambda turn: kernels.read_rows(form, records, ids[turn % SETS], ids[turn % SETS], half)

    times = compare(
        bench,
        {
            "device": lambda turn: kernels.gather(near, ids[turn % SETS], out),
            "index_select": lambda turn: torch.index_select(near, 0, ids[turn % SETS], out=out),
            "pinned": lambda turn: kernels.gather(far, ids[turn % SETS], out),
            "host": by_host,
            "device, decoded": to_numbers(near),
            "pinned, decoded": to_numbers(far),
        },
        by_wall=["host"],
    )
    for name, records in {"device": near, "pinned": far}.items():
        out.fill_(0xAA)
        kernels.gather(records, ids[0], out)
        bench.check(f"rows from {name} memory are those that were asked for", torch.equal(out, near[ids[0]]))

    bus, memory = ceiling(bench, "to_device"), ceiling(bench, "copy")
    speed = {name: time.rate(nbytes) for name, time in times.items()}
    bench.figure("from pinned host memory", speed["pinned"].map(lambda rate: rate / 1e9), "GB/s of rows")
    bench.figure(
        "from pinned host memory, share of the bus",
        speed["pinned"].map(lambda rate: 100 * rate / bus),
        "%",
        bar=at_least(80),
    )
    bench.figure(
        "the same, decoded to bf16, share of the bus", speed["pinned, decoded"].map(lambda rate: 100 * rate / bus), "%"
    )
    bench.figure("against gathering on the host and copying", times["host"].over(times["pinned"]), "x as fast")
    bench.figure(
        "from device memory, share of the copy bandwidth", speed["device"].map(lambda rate: 200 * rate / memory), "%"
    )
    moved = 1 + 2 * form.dim / form.stride  # 264 bytes in, 512 out
    bench.figure(
        "the same, decoded to bf16, share of the copy bandwidth",
        speed["device, decoded"].map(lambda rate: 100 * moved * rate / memory),
        "%",
    )
    bench.figure("against torch.index_select on the device", times["index_select"].over(times["device"]), "x as fast")
    sweep(bench, lambda turn: kernels.gather(far, ids[turn % SETS], out), nbytes / bus)


def sweep(bench: Bench, call: Callable[[int], object], least: float) -> None:
    """Whether another number of programs would be quicker: rows.ON_BUS. least: seconds that the bus needs."""

    def with_programs(number: int) -> Callable[[int], object]:
        def gathering(turn: int) -> object:
            with mock.patch.object(kernels, "ON_BUS", number):
                return call(turn)

        return gathering

    times = compare(
        bench, {str(number): with_programs(number) for number in bench.size((16, 32, 64, 128, 256, 1024), (4,))}
    )
    found = ", ".join(f"{number}: {100 * least / time.median:.1f} %" for number, time in times.items())
    bench.note(f"share of the bus with other numbers of programs {found}; the kernel takes {kernels.ON_BUS}")


def some_rows(bench: Bench, form: RowFormat, num_rows: int) -> torch.Tensor:
    """Records of normal numbers, the same ones again and again."""
    period = min(num_rows, 1 << 16)
    block = encode(form, bench.normal(period, form.dim))
    return block.repeat(-(-num_rows // period), 1)[:num_rows].contiguous()
