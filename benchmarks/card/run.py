"""Section after section, as long as there is time; results are written after each, so that none is lost with a later one."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import random
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import machine
from .bench import Bench, Section, verdicts

SCHEMA = 1
HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parent


class Plan(NamedTuple):
    module: str
    seconds: float  # with less than this left it is not begun
    title: str


PLANS = {
    "ceilings": Plan("ceilings", 5, "What the card can do"),
    "correct": Plan("correct", 20, "Every kernel against its truth"),
    "fuse": Plan("fusing", 30, "Engram forward and backward, width 2560, 4 streams"),
    "gather": Plan("gathering", 15, "Rows of 264 bytes from device and from pinned host memory"),
    "hash": Plan("hashing", 5, "Addresses"),
    "decode": Plan("decoding", 90, "Decoding, with the table in host memory"),
    "train": Plan("training", 45, "Training, with the table in host memory"),
    "sanitizer": Plan("sanitizing", 60, "compute-sanitizer"),
    "trace": Plan("tracing", 30, "The fetch under the compute"),
    "loss": Plan("losses", 60, "Loss on real text"),
}


def run(options: Namespace, names: Sequence[str]) -> int:
    """Returns the exit status: 0 if no section failed and every check passed."""
    began = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here; --device cpu makes a dry run.", file=sys.stderr)
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        faulthandler.dump_traceback_later(60 * options.minutes + 10, exit=True)  # a section that hangs shall say where
    dry = device.type == "cpu"
    bench = Bench(
        device=device,
        tiny=dry or options.tiny,
        seed=random.SystemRandom().randrange(2**31) if options.seed is None else options.seed,
        out=options.out or (ROOT / "runs" / "gpu-dry-run" if dry or options.tiny else HERE / "results"),
        data=options.data,
        deadline=began + 60 * options.minutes,
        ram=int(options.ram * 1e9) if options.ram else machine.memory("MemAvailable"),
    )
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "dry_run": bench.tiny,
        "seed": bench.seed,
        "machine": machine.describe(device),
        "minutes": 0.0,
        "sections": {},
    }
    bench.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(results["machine"], indent=1))
    print(f"seed {bench.seed}{'; DRY RUN: no figure below is a measurement' if bench.tiny else ''}", flush=True)
    for name in names:
        results["sections"][name] = asdict(one(bench, name))
        results["minutes"] = (time.monotonic() - began) / 60
        write(bench.out, results, options.only)
    if not dry:
        faulthandler.cancel_dump_traceback_later()
    print(f"\n{as_markdown(results)}", flush=True)
    return status(results)


def one(bench: Bench, name: str) -> Section:
    """Run a section, whatever happens in it."""
    plan, bench.section = PLANS[name], Section()
    print(f"\n{name}: {plan.title}  ({bench.left:.0f} s left)", flush=True)
    if bench.left < plan.seconds and not bench.tiny:
        return skipped(bench, f"{bench.left:.0f} s were left, it needs {plan.seconds:g}")
    began = time.monotonic()
    try:
        importlib.import_module(f".{plan.module}", __package__).run(bench)
        bench.section.status = "done"
    except Skip as reason:
        skipped(bench, str(reason))
    except Exception as error:
        traceback.print_exc()
        bench.section.status, bench.section.reason = "failed", f"{type(error).__name__}: {error}"
    gc.collect()  # what one section took is there for the next
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    bench.section.seconds = time.monotonic() - began
    return bench.section


class Skip(Exception):
    """Raised by a section that cannot run here."""


def skipped(bench: Bench, reason: str) -> Section:
    bench.section.status, bench.section.reason = "skipped", reason
    print(f"  skipped: {reason}", flush=True)
    return bench.section


def status(results: dict[str, Any]) -> int:
    """1 if a section failed, a check failed, or checks that were asked for did not run."""
    sections = results["sections"]
    failed = any(section["status"] == "failed" for section in sections.values())
    wrong = any(not check["passed"] for section in sections.values() for check in section["checks"])
    unchecked = sections.get("correct", {}).get("status", "done") != "done"
    return int(failed or wrong or unchecked)


def write(out: Path, results: dict[str, Any], only: Sequence[str] | None) -> None:
    """Named after the sections if they are not all of them: so they replace only themselves."""
    name = "-".join(["gpu", *(["dry-run"] if results["dry_run"] else []), *(only or [])])
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(as_markdown(results) + "\n", encoding="utf-8")


def as_markdown(results: dict[str, Any]) -> str:
    """The figures as a table, and what was checked."""
    about, gpu = results["machine"], results["machine"]["gpu"]
    versions = ", ".join(f"{name} {number}" for name, number in about["libraries"].items() if number)
    card = (
        "no GPU"
        if gpu is None
        else f"{gpu['name']}, {gpu['multiprocessors']} SMs, driver {gpu['driver']}, CUDA {gpu['cuda']}"
    )
    lines = [
        f"{card} · {about['cpu']}, {about['cores']} cores, {about['ram_gb']:.0f} GB, load {about['load']:.1f} · {versions} · "
        f"Python {about['python']} · commit {about['commit']} · {about['date']} · seed {results['seed']} · {results['minutes']:.1f} minutes",
        "",
    ]
    if results["dry_run"]:
        lines = ["**DRY RUN: tiny shapes. No figure here is a measurement.**", "", *lines]
    lines += ["| section | what | median | between | bar | met |", "|---|---|---|---|---|---|"]
    for name, section in results["sections"].items():
        if section["status"] != "done":
            lines.append(f"| {name} | {section['status']}: {section['reason']} | | | | |")
        if section["checks"]:
            passed = sum(check["passed"] for check in section["checks"])
            lines.append(
                f"| {name} | checks passed | {passed} of {len(section['checks'])} | | all | {yes(passed == len(section['checks']))} |"
            )
        lines += [row(name, figure) for figure in section["figures"]]
    wrong = [
        f"{name}: {check['name']}: {check['found']}"
        for name, section in results["sections"].items()
        for check in section["checks"]
        if not check["passed"]
    ]
    notes = [f"{name}: {note}" for name, section in results["sections"].items() for note in section["notes"]]
    return "\n".join([*lines, "", *(f"- WRONG {line}" for line in wrong), *(f"- {line}" for line in notes)]).rstrip()


def row(name: str, figure: dict[str, Any]) -> str:
    between = "" if figure["low"] is None else f"{figure['low']:.4g} to {figure['high']:.4g}"
    between += "" if figure["spread"] == "quartiles" else f" ({figure['spread']})"
    verdict = "" if figure["bar"] is None else verdicts[figure["met"]]
    return f"| {name} | {figure['name']} | {figure['value']:.4g} {figure['unit']} | {between} | {figure['bar'] or ''} | {verdict} |"


def yes(passed: bool) -> str:
    return "met" if passed else "MISSED"
