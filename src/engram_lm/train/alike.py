"""Ranks are started alike: one configuration, one code, one text; or none of them starts."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import MismatchError
from .loop import differences
from .ranks import Ranks


def require_equal(ranks: Ranks, facts: dict[str, Any]) -> None:
    """Compare what each rank knows of itself, JSON values by name, with rank 0's.

    Raises MismatchError on every rank, the same, if any differ: it names ranks, facts and both values.
    """
    first, *others = ranks.everyones(facts)
    found: dict[str, list[int]] = {}
    for rank, given in enumerate(others, start=1):
        for name, ours, theirs in differences(first, given):
            found.setdefault(f"{name} is {ours!r} on rank 0, {theirs!r} on", []).append(rank)
    if found:
        said = [f"{text} rank{'s' * (len(them) > 1)} {', '.join(map(str, them))}" for text, them in found.items()]
        raise MismatchError(
            f"The ranks were not started alike: {'; '.join(said)}. They would sum the gradients of different runs: give "
            "all of them the same command, code and files."
        )


@cache
def source_digest() -> str:
    """SHA-256 over this package's Python files, their names and bytes: which code a rank runs."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
