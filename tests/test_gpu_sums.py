"""Sums of gradients that fell on the same row, by the GPU's kernels, interpreted."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.tables.expand import expand

pytest.importorskip("triton")
sums = pytest.importorskip("engram_lm.kernels.gpu.sums")
CHUNK = sums.CHUNK


def summed(grads, inverse, count):
    out = torch.full((count, grads.shape[1]), math.nan)
    sums.sum_rows(grads, inverse, out)
    return out


def one_after_another(grads, inverse, count):
    return torch.zeros(count, grads.shape[1]).index_add(0, inverse, grads.float())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    size=st.sampled_from([0, 1, 40, CHUNK - 1]),
    count=st.sampled_from([1, 3, 50]),
    dim=st.sampled_from([1, 7, 32, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_few_reads_are_added_in_their_order(seed, size, count, dim, dtype):
    generator = torch.Generator().manual_seed(seed)
    inverse = (torch.rand(size, generator=generator) ** 3 * count).long()
    grads = (torch.randn(size, dim, generator=generator) * 10).to(dtype)
    assert torch.equal(summed(grads, inverse, count), one_after_another(grads, inverse, count))


@pytest.mark.parametrize("before", [0, 1, CHUNK - 1, CHUNK])
@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_a_row_that_has_most_reads(before, length):
    generator = torch.Generator().manual_seed(before + length)
    inverse = torch.cat([torch.zeros(before), torch.ones(length), torch.full((3,), 2)]).long()
    inverse = inverse[torch.randperm(len(inverse), generator=generator)]
    grads = torch.randn(len(inverse), 6, generator=generator)
    exact = torch.zeros(4, 6, dtype=torch.float64).index_add(0, inverse, grads.double())
    found = summed(grads, inverse, 4)
    assert (found - exact).norm() < 1e-6 * grads.norm()
    assert not found[3].any()
    whole = grads.round()
    assert torch.equal(summed(whole, inverse, 4), one_after_another(whole, inverse, 4))


def test_reads_of_no_row_are_left_out_and_nan_stays_on_its_row():
    inverse = torch.tensor([-1, 0, 2, 5, 1, 2**40])
    grads = torch.ones(6, 3)
    grads[0], grads[2, 1] = math.nan, math.nan
    found = summed(grads, inverse, 5)
    assert torch.equal(found.isnan().nonzero(), torch.tensor([[2, 1]]))
    assert torch.equal(found.nan_to_num(9.0)[:, 0], torch.tensor([1.0, 1, 1, 0, 0]))


@given(ids=st.lists(st.integers(-2, 5) | st.just(2**40), min_size=1, max_size=30))
def test_reads_of_distinct_ids(ids):
    reads = sums.reads_of_distinct(torch.tensor(ids))
    starts, order = reads.starts.tolist(), reads.order.tolist()
    rows = [order[first:end] for first, end in pairwise(starts)]
    distinct = sorted(set(ids))
    assert rows == [[n for n, id in enumerate(ids) if id == each] for each in distinct] + [[]] * (
        len(ids) - len(distinct)
    )
    assert reads.rows.tolist() == [distinct.index(ids[n]) for n in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expand(dtype, monkeypatch):
    monkeypatch.setenv("ENGRAM_KERNELS", "triton")
    generator = torch.Generator().manual_seed(0)
    rows, inverse = torch.randn(20, 9, generator=generator, requires_grad=True), torch.randint(20, (4, 10, 3))
    grad = torch.randn(10, 4, 3, 9, generator=generator).to(dtype)
    found = expand(rows, inverse.transpose(0, 1), dtype)
    assert torch.equal(found, F.embedding(inverse.transpose(0, 1), rows).to(dtype))
    (ours,) = torch.autograd.grad(found, rows, grad)
    assert torch.equal(ours, one_after_another(grad.view(-1, 9), inverse.transpose(0, 1).flatten(), 20))
    (first,) = torch.autograd.grad(expand(rows, inverse).pow(3).sum(), rows, create_graph=True)
    (ours,) = torch.autograd.grad(first.square().sum(), rows)
    (first,) = torch.autograd.grad(F.embedding(inverse, rows).pow(3).sum(), rows, create_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(first.square().sum(), rows)[0])
