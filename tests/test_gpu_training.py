"""A run in which every GPU kernel works, interpreted, is the run of the CPU's kernels."""

import pytest
from tiny import config, finish, training

from engram_lm.tables import DeviceTable, TableConfig
from engram_lm.tables.pinned import PinnedTable

pytest.importorskip("triton")


def losses(run):
    return [line["loss"] for line in finish(run).metrics.lines if "loss" in line]


def test_kernels_of_either_kind_learn_the_same(tmp_path, monkeypatch):
    settings = {"steps": 3, "batch_size": 2, "length": 8, "checkpoint_every": 0}
    settings["prefetch"] = False  # kernels are interpreted in one thread
    device, host = (config(**settings, table=TableConfig(tier, "bf16", std=0.1)) for tier in ("device", "host"))
    expected = losses(training(tmp_path / "cpu", device))
    monkeypatch.setenv("ENGRAM_KERNELS", "triton")
    near, far = training(tmp_path / "device", device), training(tmp_path / "host", host)
    assert isinstance(near.lookup.table, DeviceTable)
    assert isinstance(far.lookup.table, PinnedTable)
    found = losses(near)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == losses(far)
