"""Compiles what would be launched on a GPU, without one: `python tests/aot.py [--only fuse] [--targets 80 90 gfx942]`.

The arguments of a launch decide what Triton makes of a kernel: their types, which are divisible by 16, which are 1 or
None. So the functions that launch are called as in earnest, but what they launch is compiled for the targets and measured
instead. Tensors on the meta device serve, so tables may have their real size. The process must not have
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Report:
    """One kernel as compiled for one target: bytes are those of a thread, but `shared` is that of a program.

    wide_loads and wide_stores: those of 16 bytes or more among what loads from and stores to global memory. For a target that
    is not NVIDIA's they are None, as all is where `error` is set.
    """

    kernel: str
    constants: str
    target: str
    warps: int
    seconds: float
    error: str | None = None
    registers: int | None = None
    stack: int | None = None
    local: int | None = None
    shared: int | None = None
    instructions: int | None = None
    loads: int | None = None
    wide_loads: int | None = None
    stores: int | None = None
    wide_stores: int | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton's launcher would specialise it for these arguments."""

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    @staticmethod
    def of(kernel: JITFunction, target: GPUTarget, arguments: Sequence[Any], keywords: dict[str, Any]) -> Launch:
        """What JITFunction.run does before it compiles."""
        backend = make_backend(target)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*arguments, **keywords, debug=False)
        packed = kernel._pack_args(backend, keywords, bound, specialization, options)
        options, signature, constants, attributes = packed
        return Launch(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)

    def key(self) -> str:
        """Equal for launches that share their compiled kernel."""
        return f"{self.source.hash()} {self.target} {self.options}"

    def compile(self) -> Report:
        """Compile and measure."""
        names = self.source.fn.arg_names
        constants = {names[at]: value for (at, *_), value in self.source.constants.items()}
        facts = {
            "kernel": self.source.name,
            "constants": " ".join(f"{name}={value}" for name, value in constants.items()),
            "target": str(self.target.arch),
            "warps": self.options["num_warps"],
        }
        start = time.perf_counter()
        try:
            compiled = triton.compile(self.source, target=self.target, options=self.options)
        except Exception as error:  # Triton's errors have no common ancestor
            return Report(**facts, seconds=time.perf_counter() - start, error=_why(error))
        facts |= {"seconds": time.perf_counter() - start, "shared": compiled.metadata.shared}
        return Report(
            **facts, **(measured(compiled.asm["cubin"], compiled.asm["ptx"]) if "cubin" in compiled.asm else {})
        )


def compile_launches(run: Callable[[], object], targets: Sequence[str] = ("90",)) -> list[Report]:
    """Call `run`, and compile for all `targets` ("90" or "gfx942") every different kernel that it would launch."""
    return [launch.compile() for launch in launches(run, targets).values()]


def launches(run: Callable[[], object], targets: Sequence[str]) -> dict[str, Launch]:
    """Every different kernel that `run` would launch on the targets, by its key."""
    found: dict[str, Launch] = {}

    def collect(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        for target in targets:
            launch = Launch.of(kernel, gpu(target), arguments, keywords)
            found.setdefault(launch.key(), launch)

    with mock.patch.object(JITFunction, "run", collect):
        run()
    return found


def _why(error: BaseException | None) -> str:
    """An error in a function that the kernel calls is the cause of one in the kernel."""
    return f"{type(error).__name__}: {error}\n{_why(error.__cause__)}" if error else ""


def gpu(name: str) -> GPUTarget:
    """NVIDIA's by compute capability, AMD's by architecture."""
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)


def measured(cubin: bytes, ptx: str) -> dict[str, int]:
    """What the compiled kernel takes, and how it goes to memory."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    loads, stores = widths("ld", ptx), widths("st", ptx)
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
        "instructions": code_bytes(cubin) // 16,
        "loads": len(loads),
        "wide_loads": sum(width >= 16 for width in loads),
        "stores": len(stores),
        "wide_stores": sum(width >= 16 for width in stores),
    }


def widths(operation: str, ptx: str) -> list[int]:
    """Bytes that each `ld.global.v4.b32`, say, moves."""
    found = re.findall(rf"\b{operation}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bsuf](\d+)\s", ptx)
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


def code_bytes(elf: bytes) -> int:
    """Length of the sections that hold instructions."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = (struct.unpack_from("<IIQQQQ", elf, start + index * size) for index in range(count))
    return sum(length for _, _, flags, _, _, length in sections if flags & 4)


def show(reports: Sequence[Report]) -> None:
    """Print a table."""
    columns = ("target", "warps", "registers", "stack", "local", "shared", "instructions")
    print(*(f"{name:>{max(6, len(name))}}" for name in columns), "16-byte loads  stores", "seconds", "kernel", sep="  ")
    for report in reports:
        cells = [f"{'' if (cell := getattr(report, name)) is None else cell:>{max(6, len(name))}}" for name in columns]
        wide = (
            f"{report.wide_loads or 0:>7}/{report.loads or 0:<5} {report.wide_stores or 0:>3}/{report.stores or 0:<3}"
        )
        print(*cells, wide, f"{report.seconds:7.1f}", f"{report.kernel}  {report.constants}", sep="  ")
        if report.error:
            print("  ", report.error)


def main() -> None:
    """Compile the cases of gpu_cases.py."""
    from gpu_cases import CASES

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name has one of these in it")
    parser.add_argument("--targets", nargs="+", default=["90"])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    reports: dict[str, list[Report]] = {}
    known: set[str] = set()  # each kernel is reported with the first case that needs it
    with TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for name, run in CASES.items():
            if any(text in name for text in given.only):
                new = {key: launch for key, launch in launches(run, given.targets).items() if key not in known}
                reports[name] = [launch.compile() for launch in new.values()]
                known.update(new)
    if given.json:
        print(json.dumps({name: [asdict(report) for report in found] for name, found in reports.items()}))
        return
    for name, found in reports.items():
        if found:
            print(f"\n{name}")
            show(found)


if __name__ == "__main__":
    main()
