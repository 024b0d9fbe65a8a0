"""Every tier gives the same rows, bit for bit, before and after updates, fetched ahead or not; each keeps what it is told to."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late import LateSide

from engram_lm import kernels
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.model.lookup import Lookup, build_plan
from engram_lm.tables import DeviceTable, DiskTable, HostTable, RowFormat, Table, TableConfig, build_table, stored
from engram_lm.tables.cached import CachedStore
from engram_lm.tables.file import TableFile
from engram_lm.tables.host import MemoryStore
from engram_lm.tables.pinned import PinnedTable
from engram_lm.tables.rows import ENCODINGS
from engram_lm.tables.stored import StoredTable
from engram_lm.tokens import CanonicalVocabulary

ROWS, DIM = 300, 40
TIERS = (
    "device",
    "host",
    "host without kernels",
    "disk",
    "disk without cache",
    "disk mapped",
    "cached",
    "static cache",
    "pinned",
    "pinned with hot rows",
    "pinned with hot rows, interpreted",
)


def make(tier: str, directory: Path, form: RowFormat, rows: int = ROWS) -> Table:
    """An empty table of each tier; caches hold a fraction of the rows."""
    if tier == "device":
        return DeviceTable(rows, form)
    if tier.startswith("host"):
        return HostTable(rows, form)
    if tier.startswith("pinned"):
        return pinned(rows, form, hot=np.arange(0, 80, 2) if "hot" in tier else None, slots=25)
    if tier == "cached":
        return StoredTable(CachedStore(MemoryStore(rows, form), 20))
    if tier == "static cache":
        return StoredTable(CachedStore(MemoryStore(rows, form), 20, hot=np.arange(0, 40, 2)))
    path = directory / f"{tier}.safetensors"
    TableFile.create(path, rows, form).close()
    memory = 0 if tier != "disk" else 20 * CachedStore.bytes_per_row(form)
    return DiskTable(path, write=True, memory=memory, reads="map" if tier == "disk mapped" else "direct")


def pinned(rows: int, form: RowFormat, hot: np.ndarray | None = None, slots: int = 0) -> PinnedTable:
    """As behind a GPU whose side stream is never early."""
    table = PinnedTable(rows, form)
    table.side = LateSide()
    if hot is not None:
        table.keep(hot, slots * (form.stride + 8))
    return table


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch) -> str:
    if request.param == "host without kernels":
        monkeypatch.setattr(kernels, "compiled", lambda: False)
    if "interpreted" in request.param:
        if not stored.FEW:
            pytest.skip("is not asked by this tier")
        monkeypatch.setenv("ENGRAM_KERNELS", "triton")
    return request.param


@pytest.fixture(autouse=True, params=[0, 512], ids=["on a thread", "by advice"])
def few(request, monkeypatch) -> None:
    """The tables here are small: without this, every prefetch would be one of a few rows."""
    monkeypatch.setattr(stored, "FEW", request.param)


def batch(number: int, size: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids, half of which the next batch has too, and gradients."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randperm(60, generator=generator)[:size].sort().values + 17 * (number % 3)
    return ids, torch.randn(size, DIM, generator=generator) * 10.0 ** (number % 5 - 2)


def everything(table: Table) -> torch.Tensor:
    return table.fetch(torch.arange(table.num_rows))


# --- one test for all tiers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_tier_gives_the_same_rows(tier, encoding, std, tmp_path):
    form = RowFormat(DIM, encoding, std=std, seed=5)
    truth, table = DeviceTable(ROWS, form), make(tier, tmp_path, form)
    assert torch.equal(everything(table), everything(truth))
    assert bool(everything(truth).any()) == (std > 0)
    fetch = table.prefetch(batch(0)[0])
    for step in range(6):  # as training does: the next batch is fetched before this one's update
        (ids, grads), (coming, _) = batch(step), batch(step + 1)
        assert torch.equal(fetch.rows(), truth.fetch(ids))
        fetch = table.prefetch(coming)
        for each in (table, truth):
            each.update(ids, grads, lr=0.5)
    assert torch.equal(fetch.rows(), truth.fetch(coming))
    assert torch.equal(everything(table), everything(truth))
    assert table.clock == truth.clock == 6
    shaped = torch.tensor([[[3, 3], [299, 0]]])
    assert torch.equal(table.fetch(shaped), truth.fetch(shaped))
    assert torch.equal(table.prefetch(shaped).rounded(torch.bfloat16), truth.fetch(shaped).bfloat16())
    assert table.fetch(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, DIM)
    table.close()


def test_saved_states_come_back(tier, tmp_path):
    form = RowFormat(DIM, "bf16")
    table, states = make(tier, tmp_path, form), {}
    table.begin()
    for step in range(4):
        table.update(*batch(step), lr=0.5)
        (tmp_path / str(step)).mkdir()
        table.save(tmp_path / str(step))
        states[table.clock] = everything(table)
    table.update(*batch(9), lr=0.5)  # is not saved
    pending = table.prefetch(batch(9)[0])
    for clock in (4, 2):  # further and further back
        table.load(tmp_path / str(clock - 1), clock)
        assert table.clock == clock
        assert torch.equal(everything(table), states[clock])
    pending.rows()
    table.update(*batch(2), lr=0.5)  # goes on as it did the first time
    assert torch.equal(everything(table), states[3])
    table.close()


def test_written_rows_are_rounded_to_the_nearest(tier, tmp_path):
    table = make(tier, tmp_path, RowFormat(DIM, "bf16"))
    table.update(torch.tensor([7]), torch.ones(1, DIM), lr=1.0)
    ids, rows = torch.tensor([250, 7]), torch.randn(2, DIM)
    pending = table.prefetch(ids)
    table.write(ids, rows)
    assert torch.equal(table.fetch(ids), rows.bfloat16().float())
    assert torch.equal(pending.rows(), rows.bfloat16().float())
    table.close()


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_ids_outside_the_table(tier, wrong, tmp_path):
    table = make(tier, tmp_path, RowFormat(DIM))
    ids = torch.tensor([0, wrong])
    if "interpreted" in tier:  # a GPU does not tell anybody in time
        table.update(ids, torch.ones(2, DIM), 1.0)
        assert table.fetch(ids).isnan().all(1).tolist() == [False, True]
        assert everything(table).any(1).nonzero().tolist() == [[0]]
        return
    for attempt in (table.fetch, table.prefetch, lambda ids: table.update(ids, torch.ones(2, DIM), 1.0)):
        with pytest.raises(IndexError, match=rf"{min(0, wrong)} to {max(0, wrong)}.*rows 0 to 299"):
            attempt(ids)
    assert not everything(table).any()
    table.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("prtuw"), st.integers(0, 9)), max_size=25), st.integers(0, 50), st.booleans())
def test_prefetch_is_exact_whatever_happens_meanwhile(actions, slots, behind_gpu):
    form = RowFormat(3)
    truth, pending = DeviceTable(60, form), []
    if behind_gpu:
        table = pinned(60, form, hot=np.arange(slots), slots=slots)
    else:
        table = StoredTable(CachedStore(MemoryStore(60, form), max(slots, 1)))
    for action, number in actions:
        generator = torch.Generator().manual_seed(number)
        ids, values = torch.randperm(60, generator=generator)[:20], torch.randn(20, 3, generator=generator)
        if action == "p":
            pending.append((ids, table.prefetch(ids)))
        elif action in "rt" and pending:
            ids, fetch = pending.pop(0)
            assert torch.equal(fetch.rows(), truth.fetch(ids))
            if action == "t":  # as training does: an update of what was just taken
                for each in (truth, table):
                    each.update(ids, values, 0.1)
        else:
            for each in (truth, table):
                each.update(ids, values, 0.1) if action == "u" else each.write(ids, values)
    for ids, fetch in pending:
        assert torch.equal(fetch.rows(), truth.fetch(ids))
    table.close()


def test_the_asynchronous_mode_may_miss_an_update_and_nothing_else():
    form = RowFormat(3)
    table = StoredTable(CachedStore(MemoryStore(60, form), 40), asynchronous=True)
    ids = torch.arange(10)
    fetch = table.prefetch(ids)
    fetch.staged.result()
    table.update(ids[:5], torch.ones(5, 3), 1.0)
    assert not fetch.rows().any()
    assert torch.equal(table.fetch(ids), torch.tensor([-1.0] * 5 + [0.0] * 5)[:, None].expand(10, 3))
    table.close()


def test_what_a_fetch_has_brought_is_not_updated_once_it_is_old():
    truth, table, ids = DeviceTable(60, RowFormat(3)), pinned(60, RowFormat(3)), torch.arange(10)
    table.prefetch(ids).rows()
    for changed in (torch.arange(5, 15), ids):
        for each in (truth, table):
            each.update(changed, torch.ones(10, 3), 1.0)
    assert torch.equal(everything(table), everything(truth))


def test_of_hot_rows_with_one_place_the_hottest_has_it():
    table = pinned(100, RowFormat(2), hot=np.array([5, 17, 15, 3, 27, 90]), slots=10)
    assert table.hot is not None
    assert len(table.side.waiting) == 1  # who reads copies does so on that stream, too
    assert table.hot.owners.tolist() == [90, -1, -1, 3, -1, 5, -1, 17, -1, -1]
    table.update(torch.arange(100), torch.ones(100, 2), 1.0)
    table.records.zero_()
    table.side.synchronize()
    table.records.fill_(255)  # nobody looks there for the hot ones
    assert table.fetch(torch.arange(100)).isfinite().all(1).nonzero().flatten().tolist() == [3, 5, 17, 90]


def test_hot_rows_of_another_table_are_refused():
    with pytest.raises(ConfigError, match=r"from 4 to 9.*rows 0 to 8"):
        pinned(9, RowFormat(4), hot=np.array([9, 4]))


# --- the optimizer --------------------------------------------------------------------------------------------------


def test_update_is_row_wise_adagrad():
    table = DeviceTable(6, RowFormat(4))
    table.rows.normal_()
    before, moment = table.rows.clone(), torch.zeros(6)
    for step in range(3):
        ids = torch.tensor([4, 1]) if step else torch.tensor([2, 4])
        grads = torch.randn(2, 4)
        table.update(ids, grads, lr=0.5)
        for row, grad in zip(ids.tolist(), grads, strict=True):
            moment[row] += grad.square().mean()
            before[row] -= 0.5 * grad / moment[row].sqrt()
    torch.testing.assert_close(table.rows, before)


def test_the_first_step_of_a_row_has_the_size_of_the_learning_rate():
    table = DeviceTable(3, RowFormat(8))
    table.update(torch.tensor([0, 2]), torch.randn(2, 8) * torch.tensor([[1e-6], [1e6]]), lr=0.25)
    torch.testing.assert_close(table.rows.square().mean(1).sqrt(), torch.tensor([0.25, 0.0, 0.25]))


def test_leaf_gradients_equal_a_dense_embedding():
    plan = build_plan(HashConfig(heads=2, rows_per_head=50, layers=(0, 1), pad_id=0), CanonicalVocabulary.identity(20))
    lookup = Lookup(CanonicalVocabulary.identity(20), plan, DeviceTable(plan.num_rows, RowFormat(4, std=1.0)))
    tokens, weight = torch.randint(0, 20, (4, 30)), torch.randn(4, 30, 2, 4, 4)
    leaf = lookup.leaf(tokens)
    for part in (slice(0, 1), slice(1, 4)):  # in parts, as gradient accumulation does
        (leaf.expand(part.start, part.stop).sin() * weight[part]).sum().backward()
    dense = everything(lookup.table).requires_grad_()
    (F.embedding(lookup.ids(tokens)[0], dense).sin() * weight).sum().backward()
    torch.testing.assert_close(leaf.rows.grad, dense.grad[leaf.unique])
    assert dense.grad.abs().sum(1).count_nonzero() == len(leaf.unique)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_table_of_another_plan_or_size_is_refused():
    vocabulary = CanonicalVocabulary.identity(20)
    plan = build_plan(HashConfig(heads=2, rows_per_head=50, layers=(0,), pad_id=0), vocabulary)
    with pytest.raises(MismatchError, match="read past its end"):
        Lookup(vocabulary, plan, HostTable(plan.num_rows - 1, RowFormat(4)))
    table = HostTable(plan.num_rows, RowFormat(4))
    table.digest = "0123456789abcdef"
    with pytest.raises(MismatchError, match=r"0123456789abcdef.*read from the wrong place"):
        Lookup(vocabulary, plan, table)


def test_rows_that_are_only_read_are_not_trained(tmp_path):
    read_only = HostTable(5, RowFormat(4, trainable=False))
    with pytest.raises(ConfigError, match=r"without accumulators.*update would have been lost"):
        read_only.update(torch.tensor([0]), torch.ones(1, 4), 1.0)
    TableFile.create(tmp_path / "t.safetensors", 5, RowFormat(4)).close()
    table = DiskTable(tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match="opened for reading"):
        table.write(torch.tensor([0]), torch.ones(1, 4))
    table.close()


def test_another_format_in_the_file_is_refused(tmp_path):
    build = {"num_rows": 9, "dim": 4, "digest": "", "directory": tmp_path}
    build_table(TableConfig("disk", "bf16"), **build).close()
    with pytest.raises(MismatchError, match=r"bf16.*int8"):
        build_table(TableConfig("disk", "int8"), **build)
    with pytest.raises(MismatchError, match="rows"):
        build_table(TableConfig("disk", "bf16"), **{**build, "num_rows": 10})
    with pytest.raises(ConfigError, match="only tier disk"):
        TableConfig("host", file="x")
    with pytest.raises(ConfigError, match="device_memory is at least 0 GB"):
        TableConfig(device_memory=-1.0)
    with pytest.raises(ConfigError, match=r"device_memory 2.*only tier host on a GPU"):
        build_table(TableConfig("host", device_memory=2.0), **build)
    with pytest.raises(ConfigError, match="at least one row"):
        HostTable(0, RowFormat(4))


def test_a_journal_of_another_run_is_refused(tmp_path):
    table = make("disk", tmp_path, RowFormat(DIM))
    table.begin()
    table.update(*batch(0), lr=1.0)
    table.save(tmp_path)
    path = tmp_path / "disk.safetensors"
    table.close()
    again = DiskTable(path, write=True)
    with pytest.raises(MismatchError, match=r"earlier run.*would have started"):
        again.begin()
    again.begin(again=True)  # the run that was killed before its first checkpoint
    assert not everything(again).any()
    again.close()
