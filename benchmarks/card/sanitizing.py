"""The checks once more, at tiny shapes, under compute-sanitizer: addresses out of bounds, races, memory that was never written."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from .bench import Bench
from .run import HERE, Skip

TOOLS = ("memcheck", "racecheck", "initcheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
PLACE = re.compile(r"^=+\s+(?:at|in) .*", re.MULTILINE)  # where something was found


def run(bench: Bench) -> None:
    """A tool after the other, each with its share of the time; torch's own kernels may be blamed too, and are counted apart."""
    program = find()
    if bench.dry or program is None:
        raise Skip("a dry run has no GPU" if bench.dry else "compute-sanitizer is not installed")
    for left, tool in zip(range(len(TOOLS), 0, -1), TOOLS, strict=True):
        limit = min(150.0, (bench.left - 20) / left)
        output = sanitized(program, tool, bench.seed, limit)
        if output is None:
            bench.note(f"{tool}: not finished after {limit:.0f} s")
            continue
        total, ours = findings(output, kernel_names())
        if total != 0:
            (bench.out / f"gpu-{tool}.log").write_text(output, encoding="utf-8")
        found = "no summary was printed" if total is None else f"{total} found in all, {ours} in these kernels"
        bench.check(f"{tool} finds nothing in these kernels", total is not None and ours == 0, found)
        bench.note(f"{tool}: {found}")


def find() -> str | None:
    """The program, which may not be on the path."""
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def sanitized(program: str, tool: str, seed: int, limit: float) -> str | None:
    """What a tool says about the checks; None if they take longer than `limit` seconds."""
    with TemporaryDirectory() as out:
        checks = [str(HERE / "gpu.py"), "--tiny", "--only", "correct", "--out", out, "--seed", str(seed)]
        process = subprocess.Popen(
            [program, "--tool", tool, "--print-limit", "20", sys.executable, *checks],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ
            | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor is an allocation, with an end that counts
        )
        try:
            return process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def kernel_names() -> set[str]:
    """Of everything that Triton compiles here."""
    from triton.runtime.jit import KernelInterface

    from engram_lm.kernels import gpu

    modules = [
        importlib.import_module(f"{gpu.__name__}.{module.name}") for module in pkgutil.iter_modules(gpu.__path__)
    ]
    return {name for module in modules for name, value in vars(module).items() if isinstance(value, KernelInterface)}


def findings(output: str, names: Collection[str]) -> tuple[int | None, int]:
    """How many there were in all, None if the tool did not come to an end, and how many places are in kernels of these names."""
    summary = SUMMARY.search(output)
    places = PLACE.findall(output)
    ours = sum(any(re.search(rf"\b{name}\b", place) for name in names) for place in places)
    return None if summary is None else int(summary[1]), ours
