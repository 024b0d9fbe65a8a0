"""The GPU's kernels for rows, interpreted, against the truth, bit for bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.tables import DeviceTable, HostTable, RowFormat, codec, deduplicate
from engram_lm.tables import rows as truth
from engram_lm.tables.rows import ENCODINGS

pytest.importorskip("triton")
fast = pytest.importorskip("engram_lm.kernels.gpu.rows")

every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
every_dim = pytest.mark.parametrize("dim", [1, 3, 32, 33, 80, 160, 256])
RECORDS = 20


@pytest.fixture
def triton(monkeypatch):
    """Tensors of the CPU are taken for a GPU's from here on."""
    monkeypatch.setenv("ENGRAM_KERNELS", "triton")


@pytest.fixture(params=[False, True], ids=["near", "over the bus"])
def bus(request, monkeypatch):
    """Few programs, each of which takes several blocks."""
    monkeypatch.setattr(fast, "_over_bus", lambda records, rows: request.param)
    monkeypatch.setattr(fast, "ON_BUS", 2)


def same(found, expected):
    """Equal bit for bit, except that one NaN is as good as another."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = found.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def rows_of_all_sizes(count, dim, generator):
    return torch.exp(8 * torch.randn(count, 1, generator=generator)) * torch.randn(count, dim, generator=generator)


def trained(form, generator, count=RECORDS):
    """Records, a third of which were never written."""
    records = torch.zeros(count, form.stride, dtype=torch.uint8)
    some = torch.randperm(count, generator=generator)[: count * 2 // 3]
    records[some, : form.row_bytes] = truth.encode(form, rows_of_all_sizes(len(some), form.dim, generator))
    if form.trainable:
        records[some, form.row_bytes :] = torch.rand(len(some), 1, generator=generator).view(torch.uint8)
    return records


def poisoned(*shape, dtype=torch.uint8):
    return torch.full(shape, 0xAA if dtype == torch.uint8 else math.nan, dtype=dtype)


@pytest.mark.parametrize("size", [4, 36, 128, 264, 268, 1028])
@pytest.mark.parametrize("count", [0, 1, 70])
def test_gather_and_scatter(size, count, bus):
    generator = torch.Generator().manual_seed(size + count)
    memory = torch.randint(256, (101, size + 12), dtype=torch.uint8, generator=generator)
    records = memory[1:, 4 : 4 + size]  # neither begins where memory does nor ends where rows do
    slots = torch.randperm(100, generator=generator)[:count]
    found = poisoned(count, size)
    fast.gather(records, slots, found)
    assert torch.equal(found, records[slots])
    expected, source = memory.clone(), torch.randint(256, (count, size), dtype=torch.uint8, generator=generator)
    expected[1:, 4 : 4 + size][slots] = source
    fast.scatter(records, slots, source)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("kernels", ["", "triton"])
def test_slots_outside_of_the_records(kernels, bus, monkeypatch):
    monkeypatch.setenv("ENGRAM_KERNELS", kernels)
    records, slots = torch.arange(24, dtype=torch.uint8).view(3, 8), torch.tensor([-1, 2, 3, 2**40, -(2**63), 0])
    inside, found = (slots >= 0) & (slots < 3), codec.take(records, slots)
    assert torch.equal(found[inside], records[slots[inside]])
    assert (found[~inside] == 255).all()
    memory = torch.zeros(9, 8, dtype=torch.uint8)
    codec.put(memory[3:6], slots, torch.ones(6, 8, dtype=torch.uint8))
    assert torch.equal(memory.any(1).nonzero()[:, 0], torch.tensor([3, 5]))


@pytest.mark.parametrize("kernels", ["", "triton"])
@pytest.mark.parametrize("size", [4, 132, 264])
def test_copies_are_read_in_the_stead_of_their_records(kernels, size, bus, monkeypatch):
    monkeypatch.setenv("ENGRAM_KERNELS", kernels)
    far, near = (torch.randint(255, (n, size), dtype=torch.uint8) for n in (50, 7))
    copies = codec.Copies(torch.tensor([-1, 8, 44, -1, 4, 33, -1]), near)
    slots = torch.cat([torch.randperm(50), torch.tensor([-1, 57, 8, -7])])
    found = codec.take(far, slots, copies)
    for slot, record in zip(slots.tolist(), found, strict=True):
        expected = torch.full_like(record, 255) if not 0 <= slot < 50 else far[slot]
        expected = near[slot % 7] if slot in (8, 44, 4, 33) else expected
        assert torch.equal(record, expected), slot


@every_encoding
@every_dim
@pytest.mark.parametrize(("trainable", "std"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_read(encoding, dim, trainable, std):
    form = RowFormat(dim, encoding, trainable=trainable, std=std, seed=-9, first=2**33)
    generator = torch.Generator().manual_seed(dim)
    records = trained(form, generator)
    slots = torch.randint(RECORDS, (30,), generator=generator)
    ids = torch.randint(2**40, (30,), generator=generator)
    found = poisoned(30, dim, dtype=torch.float32)
    fast.read_rows(form, records, slots, ids, found)
    same(found, truth.read_rows(form, records, slots, ids))
    sent = records[:, : form.wire]  # what another process would have of them, still in their place
    found = poisoned(30, dim, dtype=torch.float32)
    fast.read_rows(form, sent, slots, ids, found)
    same(found, truth.read_rows(form, sent, slots, ids))


@every_encoding
@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_outside_are_nan_and_others_are_rounded_to_the_nearest(encoding, std, dtype, bus):
    form, generator = RowFormat(33, encoding, std=std), torch.Generator().manual_seed(1)
    records, slots = trained(form, generator), torch.tensor([RECORDS, 5, -1, 0, 2**62])
    inside, found = torch.tensor([1, 3]), torch.zeros(5, 33, dtype=dtype)
    fast.read_rows(form, records, slots, slots, found)
    same(found[inside], truth.read_rows(form, records, slots[inside], slots[inside]).to(dtype))
    assert found[[0, 2, 4]].isnan().all()


def test_no_rows_at_all():
    form, none = RowFormat(8, "fp8_e8m0", std=0.1), torch.empty(0, dtype=torch.int64)
    records = torch.zeros(3, form.stride, dtype=torch.uint8)
    fast.read_rows(form, records, none, none, torch.empty(0, 8))
    fast.update_rows(form, records, none, none, torch.empty(0, 8), 0.1, 0)
    fast.encode(form, torch.empty(0, 8), torch.empty(0, form.row_bytes, dtype=torch.uint8))
    assert not records.any()


def test_every_fp8_number_under_every_scale():
    form, places = RowFormat(256, "fp8_e8m0", trainable=False), torch.arange(256)
    codes = torch.arange(256, dtype=torch.uint8)
    records = torch.cat([codes.expand(256, 256), codes[:, None].expand(256, 8)], dim=1)
    found = torch.zeros(256, 256)
    with np.errstate(all="ignore"):
        fast.read_rows(form, records, places, places, found)
    same(found, truth.decode(form, records))


def test_every_bf16_number():
    form, places = RowFormat(256, "bf16", trainable=False), torch.arange(256)
    records = torch.arange(2**16).to(torch.int16).view(256, 256).view(torch.uint8)
    found = torch.zeros(256, 256)
    fast.read_rows(form, records, places, places, found)
    same(found, truth.decode(form, records))


@every_encoding
@every_dim
def test_encode(encoding, dim):
    form, generator = RowFormat(dim, encoding), torch.Generator().manual_seed(dim)
    rows = rows_of_all_sizes(20, dim, generator)
    rows[3] = 0
    found = poisoned(20, form.row_bytes)
    fast.encode(form, rows, found)
    same(found, truth.encode(form, rows))


@every_encoding
@settings(max_examples=40)
@given(words=st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0x7F800000, 0x7F7FFFFF, 1, 0x80000000]), min_size=1))
def test_any_float32_is_encoded_alike(encoding, words):
    rows, form = torch.from_numpy(np.array([words], np.uint32).view(np.float32)), RowFormat(len(words), encoding)
    found, expected = poisoned(1, form.row_bytes), truth.encode(form, rows)
    with np.errstate(all="ignore"):
        fast.encode(form, rows, found)
    scale = 4 * (encoding == "int8")  # bytes of a float32, which may be NaN
    same(found[:, :scale].clone().view(torch.float32), expected[:, :scale].clone().view(torch.float32))
    same(found[:, scale:], expected[:, scale:])


@every_encoding
@every_dim
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_update(encoding, dim, std):
    form = RowFormat(dim, encoding, std=std, seed=5, first=7)
    generator = torch.Generator().manual_seed(dim)
    memory = torch.zeros(RECORDS + 2, form.stride, dtype=torch.uint8)
    found, expected = memory[1:-1], torch.zeros(RECORDS, form.stride, dtype=torch.uint8)
    for clock in range(3):
        slots = torch.randperm(RECORDS, generator=generator)[:6]
        ids, grads = slots * 10**9, rows_of_all_sizes(6, dim, generator)
        grads[clock] = 0
        truth.update_rows(form, expected, slots, ids, grads, 0.1, clock)
        wider = torch.cat([torch.tensor([-1, RECORDS, 2**50]), slots])  # with some that are not there
        fast.update_rows(form, found, wider, torch.cat([wider[:3], ids]), torch.cat([grads[1:4], grads]), 0.1, clock)
        same(found, expected)
    assert not memory[[0, -1]].any()


@every_encoding
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_row_alone(encoding, wrong):
    form, slots, grads = RowFormat(5, encoding), torch.arange(4), torch.ones(4, 5)
    grads[2, 4] = wrong
    found, expected = (torch.zeros(4, form.stride, dtype=torch.uint8) for _ in range(2))
    with np.errstate(all="ignore"):
        fast.update_rows(form, found, slots, slots, grads, 0.1, 0)
    truth.update_rows(form, expected, slots, slots, grads, 0.1, 0)
    others = torch.tensor([0, 1, 3])
    same(found[others], expected[others])
    same(
        found[:, form.row_bytes :].clone().view(torch.float32),
        expected[:, form.row_bytes :].clone().view(torch.float32),
    )
    same(truth.decode(form, found), truth.decode(form, expected))
    assert truth.decode(form, found)[2].isnan().any()


# --- through the tables ---------------------------------------------------------------------------------------------


def batch(number, dim, rows):
    """Distinct ids, and gradients."""
    generator = torch.Generator().manual_seed(number)
    return torch.randperm(rows, generator=generator)[:20], torch.randn(20, dim, generator=generator)


@every_encoding
@pytest.mark.parametrize(("trainable", "std"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_a_device_table_is_the_same_either_way(encoding, trainable, std, monkeypatch):
    form, states = RowFormat(40, encoding, trainable=trainable, std=std, seed=3, first=11), []
    shaped = torch.tensor([[3, 3, 49], [7, 8, 0]])
    for kernels in ("", "triton"):
        monkeypatch.setenv("ENGRAM_KERNELS", kernels)
        table = DeviceTable(50, form)
        state = [table.fetch(shaped.mT)]
        for step in range(3):
            ids, grads = batch(step, 40, 50)
            if trainable:
                table.update(ids, grads, lr=0.5)
            table.write(ids[:5], grads[:5])
            table.restore(ids[5:7], table.records[ids[7:9]])
        sent = table.fetch(shaped, encoded=True)
        rows = codec.decode(form, sent.view(6, -1), shaped.view(-1))
        states.append([*state, table.records, table.fetch(shaped), table.prefetch(shaped).rows(), sent, rows])
        assert torch.equal(rows.view(2, 3, 40), table.fetch(shaped))
        assert table.clock == 3 * trainable
    for plain, found in zip(*states, strict=True):
        same(found, plain)


def test_ids_outside_of_a_table_on_a_gpu_are_nan_and_not_updated(triton):
    table, ids = DeviceTable(50, RowFormat(4)), torch.tensor([-1, 3, 50])
    table.update(ids, torch.ones(3, 4), lr=1.0)
    table.write(torch.tensor([-1, 50]), torch.ones(2, 4))
    table.restore(torch.tensor([-1, 50]), torch.ones(2, table.form.stride, dtype=torch.uint8))
    assert torch.equal(table.records.any(1).nonzero()[:, 0], torch.tensor([3]))
    assert torch.equal(table.fetch(ids).isnan().any(1), torch.tensor([True, False, True]))
    assert torch.equal(deduplicate(ids[[2, 0, 0]])[0], torch.tensor([-1, 50]))


def test_rows_that_are_only_read_are_not_updated(triton):
    table = DeviceTable(5, RowFormat(4, trainable=False))
    for update in (table.update, table.update_reads):
        with pytest.raises(ConfigError, match="only read"):
            update(torch.tensor([0]), torch.ones(1, 4), 0.1)


@every_encoding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tier", "kernels"), [(DeviceTable, "triton"), (DeviceTable, ""), (HostTable, "")])
def test_updates_by_reads_are_those_of_their_sums(encoding, dtype, kernels, tier, monkeypatch):
    form, generator = RowFormat(40, encoding, std=0.1), torch.Generator().manual_seed(2)
    truth_table, table = DeviceTable(50, form), tier(50, form)
    for step in range(2):
        ids = torch.randint(50, (40, 4), generator=generator)
        ids[torch.rand(40, 4, generator=generator) < 0.9] = 0  # has a whole chunk
        grads = torch.randint(-8, 9, (40, 4, 40), generator=generator) / 4  # whose sums are exact
        sums = torch.zeros(50, 40).index_add(0, ids.view(-1), grads.view(-1, 40))
        everywhere = ids.unique()
        truth_table.update(everywhere, sums[everywhere], lr=0.5)
        with monkeypatch.context() as patch:
            patch.setenv("ENGRAM_KERNELS", kernels)
            table.update_reads(ids, grads.to(dtype), lr=0.5)
            table.update_reads(ids[:0], grads[:0].to(dtype), lr=0.5)
        truth_table.clock += 1
        assert table.clock == 2 * step + 2
    same(table.fetch(torch.arange(50)), truth_table.fetch(torch.arange(50)))
    table.close()


def test_updates_by_reads_pass_over_reads_outside(triton):
    table = DeviceTable(50, RowFormat(4))
    table.update_reads(torch.tensor([50, 3, -1, 3, 50]), torch.ones(5, 4), lr=1.0)
    assert torch.equal(table.records.any(1).nonzero()[:, 0], torch.tensor([3]))
