"""Every Triton kernel becomes code for real GPUs, none of which is needed: no error, no spilled register, wide accesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FEW = ("hash a batch", "read fp8_e8m0 256", "update fp8_e8m0 256", "fuse 4 streams 4 taps torch.bfloat16")
WIDE = {  # where most bytes pass, 16 at a time
    ("hash a batch", "hash_positions"): ["wide_stores"],
    ("read bf16 256", "_read_rows"): ["wide_loads", "wide_stores"],
    ("sum 256 torch.bfloat16", "_sum_rows"): ["wide_loads", "wide_stores"],
    ("fuse 4 streams 4 taps torch.bfloat16", "find_facts"): ["wide_loads"],
    ("fuse 4 streams 4 taps torch.bfloat16", "convolve"): ["wide_loads", "wide_stores"],
}


def compiled(*arguments):
    """What aot.py reports, a list for each case. It needs a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("aot.py"), "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert any(reports.values())
    errors = [f"{case}: {report}" for case, found in reports.items() for report in found if report["error"]]
    assert not errors, "\n".join(errors)
    return reports


@pytest.mark.slow
def test_for_hopper():
    reports = compiled("--targets", "90")
    assert reports.keys() > set(FEW)
    spilled = [f"{case}: {r}" for case, found in reports.items() for r in found if r["stack"] or r["local"]]
    assert not spilled, "\n".join(spilled)
    for (case, kernel), columns in WIDE.items():
        (report,) = (report for report in reports[case] if report["kernel"] == kernel)
        assert all(report[column] > 0 for column in columns), report


@pytest.mark.slow
def test_for_its_neighbours():
    """One of each kind for Ampere, Blackwell and AMD's CDNA 3."""
    reports = compiled("--targets", "80", "100", "gfx942", "--only", *FEW)
    assert {report["target"] for found in reports.values() for report in found} == {"80", "100", "gfx942"}
