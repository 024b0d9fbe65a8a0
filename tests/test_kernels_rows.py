"""The kernels against the truth, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lm import kernels
from engram_lm.tables import rows as truth
from engram_lm.tables.rows import ENCODINGS, RowFormat

pytest.importorskip("numba")
fast = pytest.importorskip("engram_lm.kernels.rows")

every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
every_dim = pytest.mark.parametrize("dim", [1, 3, 32, 33, 64, 80, 160, 256])


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(kernels, "threads", lambda: request.param)


def same(array, tensor):
    """Equal bit for bit, except that one NaN is as good as another."""
    expected = tensor.numpy()
    if array.dtype == np.float32:
        np.testing.assert_array_equal(np.isnan(array), np.isnan(expected))
        array, expected = np.nan_to_num(array, nan=0.0), np.nan_to_num(expected, nan=0.0)
    assert array.tobytes() == expected.tobytes()


def rows_of_all_sizes(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(8 * torch.randn(count, 1, generator=generator))
    return size * torch.randn(count, dim, generator=generator)


@every_encoding
@every_dim
def test_encode(encoding, dim):
    form, rows, ids = RowFormat(dim, encoding, seed=5), rows_of_all_sizes(40, dim), torch.arange(40) * 10**9
    out = np.full((40, form.row_bytes), 255, np.uint8)
    fast.encode(form, rows.numpy(), out)
    same(out, truth.encode(form, rows))
    fast.encode(form, rows.numpy(), out, ids.numpy(), clock=7)
    same(out, truth.encode(form, rows, truth.noise(form, ids, 7)))


@every_encoding
@every_dim
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_update_then_read(encoding, dim, std):
    form, generator = RowFormat(dim, encoding, std=std, seed=-9), torch.Generator().manual_seed(dim)
    expected = torch.zeros(50, form.stride, dtype=torch.uint8)
    records = expected.numpy().copy()
    for clock in range(4):
        slots, ids = torch.randperm(50, generator=generator)[:30], torch.randint(2**40, (30,), generator=generator)
        grads = rows_of_all_sizes(30, dim, seed=clock)
        grads[::7] = 0
        truth.update_rows(form, expected, slots, ids, grads, 0.1, clock)
        fast.update_rows(form, records, slots.numpy(), ids.numpy(), grads.numpy(), 0.1, clock)
        same(records, expected)
    everywhere, out = torch.arange(50), np.empty((50, dim), np.float32)
    fast.read_rows(form, records, everywhere.numpy(), everywhere.numpy(), out)
    same(out, truth.read_rows(form, expected, everywhere, everywhere))


@every_encoding
def test_encode_into_part_of_a_record(encoding):
    form, rows = RowFormat(33, encoding), rows_of_all_sizes(6, 33)
    records = np.full((6, form.stride), 255, np.uint8)
    fast.encode(form, rows.numpy(), records[:, : form.row_bytes])
    same(records[:, : form.row_bytes].copy(), truth.encode(form, rows))
    assert (records[:, form.row_bytes :] == 255).all()


def test_every_fp8_number_under_every_scale():
    form = RowFormat(256, "fp8_e8m0", trainable=False)
    codes = torch.arange(256, dtype=torch.uint8)
    records = torch.cat([codes.expand(256, 256), codes[:, None].expand(256, 8)], dim=1)
    out, places = np.empty((256, 256), np.float32), torch.arange(256)
    fast.read_rows(form, records.numpy(), places.numpy(), places.numpy(), out)
    same(out, truth.decode(form, records))


def test_every_bf16_number():
    form, codes, place = RowFormat(1 << 16, "bf16", trainable=False), torch.arange(1 << 16), torch.zeros(1).long()
    records, out = codes.to(torch.int16).view(torch.uint8)[None], np.empty((1, 1 << 16), np.float32)
    fast.read_rows(form, records.numpy(), place.numpy(), place.numpy(), out)
    same(out, truth.decode(form, records))


@every_encoding
@given(words=st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0x7F800000, 0x7F7FFFFF, 1, 0x80000000]), min_size=1))
def test_any_float32_is_encoded_alike(encoding, words):
    rows = torch.from_numpy(np.array([words], np.uint32).view(np.float32))
    form, ids = RowFormat(len(words), encoding), torch.tensor([3])
    out = np.empty((1, form.row_bytes), np.uint8)
    for arguments, noise in (((), None), ((ids.numpy(), 1), truth.noise(form, ids, 1))):
        fast.encode(form, rows.numpy(), out, *arguments)
        expected = truth.encode(form, rows, noise)
        if encoding == "int8":  # its scale may be NaN
            same(out[:, :4].copy().view(np.float32), expected[:, :4].clone().view(torch.float32))
        same(out[:, 4 * (encoding == "int8") :], expected[:, 4 * (encoding == "int8") :])


@pytest.mark.parametrize("stride", [4, 36, 68, 264, 268, 320])
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_gather_and_scatter(stride, count, threads):
    generator = np.random.default_rng(stride)
    records = generator.integers(0, 256, (6000, stride), np.uint8)
    slots = generator.permutation(6000)[:count]
    out = np.empty((count, stride), np.uint8)
    fast.gather(records, slots, out)
    assert np.array_equal(out, records[slots])
    target = np.zeros_like(records)
    fast.scatter(target, slots, out)
    expected = np.zeros_like(records)
    expected[slots] = out
    assert np.array_equal(target, expected)


def test_many_rows_on_many_threads(threads):
    form, generator = RowFormat(16, "bf16", std=0.1), torch.Generator().manual_seed(0)
    expected, slots = (
        torch.zeros(9000, form.stride, dtype=torch.uint8),
        torch.randperm(9000, generator=generator)[:7000],
    )
    records, ids, grads = expected.numpy().copy(), slots * 3, torch.randn(7000, 16, generator=generator)
    truth.update_rows(form, expected, slots, ids, grads, 0.1, 0)
    fast.update_rows(form, records, slots.numpy(), ids.numpy(), grads.numpy(), 0.1, 0)
    same(records, expected)
    out = np.empty((7000, 16), np.float32)
    fast.read_rows(form, records, slots.numpy(), ids.numpy(), out)
    same(out, truth.read_rows(form, expected, slots, ids))


def test_records_of_a_file_that_is_mapped_for_reading(tmp_path):
    form, rows = RowFormat(32, "fp8_e8m0"), rows_of_all_sizes(20, 32)
    records = np.concatenate([truth.encode(form, rows).numpy(), np.ones((20, 4), np.uint8)], axis=1)
    (tmp_path / "rows").write_bytes(records.tobytes())
    mapped = np.memmap(tmp_path / "rows", np.uint8, "r").reshape(20, form.stride)
    slots, out = np.array([19, 0, 7]), np.empty((3, 32), np.float32)
    fast.read_rows(form, mapped, slots, slots, out)
    same(out, truth.decode(form, torch.from_numpy(records[slots])))
