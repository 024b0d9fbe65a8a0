"""Distinct rows repeated for a batch: torch's embedding is the truth."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import engram_lm.kernels
from engram_lm.tables.expand import expand


def example(seed, shape, count=50, dim=7):
    """rows [U, d], inverse [...] with favourites, and a gradient [..., d] of the output."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator)
    inverse = (torch.rand(shape, generator=generator) ** 3 * count).long()
    return rows.requires_grad_(), inverse, torch.randn(*shape, dim, generator=generator)


@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from([(0,), (1,), (300,), (2, 9, 1, 3)]),
    count=st.sampled_from([1, 2, 50]),
    dim=st.sampled_from([1, 7, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_value_and_gradient_are_those_of_embedding(seed, shape, count, dim, dtype):
    rows, inverse, grad = example(seed, shape, count, dim)
    found = expand(rows, inverse, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, F.embedding(inverse, rows).to(dtype))
    grad = grad.to(dtype)
    (ours,) = torch.autograd.grad(found, rows, grad)
    truth = torch.zeros(count, dim).index_add_(
        0, inverse.flatten(), grad.float().view(-1, dim)
    )  # one read after another
    assert torch.equal(ours, truth)


def test_gradients_are_the_same_bits_for_any_number_of_threads(monkeypatch):
    kernel = pytest.importorskip("engram_lm.kernels.expand")
    monkeypatch.setattr(kernel, "PART", 1)
    rows, inverse, grad = example(0, (4000,))
    found = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(engram_lm.kernels, "threads", lambda threads=threads: threads)
        found += torch.autograd.grad(expand(rows, inverse), rows, grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_contiguous():
    rows, inverse, grad = example(1, (6, 8, 3))
    (ours,) = torch.autograd.grad(expand(rows, inverse[::2].mT), rows, grad[::2].transpose(1, 2))
    (theirs,) = torch.autograd.grad(
        expand(rows, inverse[::2].mT.contiguous()), rows, grad[::2].transpose(1, 2).contiguous()
    )
    assert torch.equal(ours, theirs)
    (summed,) = torch.autograd.grad(expand(rows, inverse).sum(), rows)  # a gradient that is one number, expanded
    assert torch.equal(summed[:, 0], inverse.flatten().bincount(minlength=len(rows)).float())


def test_gradients_of_gradients():
    rows, inverse, _ = example(2, (40,))
    (grad,) = torch.autograd.grad(expand(rows, inverse).pow(3).sum(), rows, create_graph=True)
    (ours,) = torch.autograd.grad(grad.square().sum(), rows)
    (grad,) = torch.autograd.grad(F.embedding(inverse, rows).pow(3).sum(), rows, create_graph=True)
    (theirs,) = torch.autograd.grad(grad.square().sum(), rows)
    torch.testing.assert_close(ours, theirs)


def test_a_read_outside_is_refused():
    rows, inverse, _ = example(3, (5,))
    inverse[2] = len(rows)
    with pytest.raises(IndexError):
        expand(rows, inverse)


def test_without_kernels_and_in_double_precision(monkeypatch):
    rows, inverse, _ = example(4, (5,))
    assert expand(rows.double(), inverse, torch.float64).dtype == torch.float64
    monkeypatch.setattr(import_module("engram_lm.tables.expand"), "compiled", lambda: False)
    assert "Expand" not in type(expand(rows, inverse).grad_fn).__name__
