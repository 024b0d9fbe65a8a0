"""Every kernel on this device against its slow truth, at small shapes, where the edges are, and at real ones."""

from __future__ import annotations

from . import check_fuse, check_graph, check_hash, check_rows, check_tables
from .bench import Bench


def run(bench: Bench) -> None:
    """Group by group; one that raises is a failed check, and the next one comes."""
    for group in (check_hash, check_rows, check_fuse, check_tables, check_graph):
        for check in group.CHECKS:
            with bench.checking(check.__doc__.rstrip(".")):
                check(bench)
