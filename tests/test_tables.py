"""Tables: rows by id, the row-wise update against its formula, and gradients that reach each row once."""

import pytest
import torch
import torch.nn.functional as F

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.model.lookup import Lookup, build_plan
from engram_lm.tables import DeviceTable, deduplicate
from engram_lm.tokens import CanonicalVocabulary


def test_deduplicate():
    ids = torch.tensor([[5, 3], [5, 9]])
    unique, inverse = deduplicate(ids)
    assert unique.tolist() == [3, 5, 9]
    assert torch.equal(unique[inverse], ids)
    unique, inverse = deduplicate(torch.empty(0, 2, dtype=torch.int64))
    assert len(unique) == 0
    assert inverse.shape == (0, 2)


def test_fetch_gives_a_copy_in_the_shape_of_the_ids():
    table = DeviceTable(10, 4, std=1.0)
    ids = torch.tensor([[1, 2, 1], [0, 9, 9]])
    rows = table.fetch(ids)
    assert torch.equal(rows, table.rows[ids])
    rows.zero_()
    assert table.rows[1].abs().sum() > 0
    assert torch.equal(table.prefetch(ids).rows(), table.rows[ids])
    assert table.fetch(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 4)


@pytest.mark.parametrize("wrong", [-1, 10])
def test_ids_outside_the_table(wrong):
    table = DeviceTable(10, 4)
    with pytest.raises(IndexError):
        table.fetch(torch.tensor([0, wrong]))


def test_update_is_row_wise_adagrad():
    table = DeviceTable(6, 4, std=1.0)
    before, moment = table.rows.clone(), torch.zeros(6)
    for step in range(3):
        ids = torch.tensor([4, 1]) if step else torch.tensor([2, 4])
        grads = torch.randn(2, 4)
        table.update(ids, grads, lr=0.5)
        for row, grad in zip(ids.tolist(), grads, strict=True):
            moment[row] += grad.square().mean()
            before[row] -= 0.5 * grad / moment[row].sqrt()
    torch.testing.assert_close(table.rows, before)
    torch.testing.assert_close(table.second_moment, moment)


def test_the_first_step_of_a_row_has_the_size_of_the_learning_rate():
    table = DeviceTable(3, 8)
    table.update(torch.tensor([0, 2]), torch.randn(2, 8) * torch.tensor([[1e-6], [1e6]]), lr=0.25)
    torch.testing.assert_close(table.rows.square().mean(1).sqrt(), torch.tensor([0.25, 0.0, 0.25]))


def test_a_row_without_gradient_stays():
    table = DeviceTable(3, 8, std=1.0)
    before = table.rows.clone()
    table.update(torch.tensor([1]), torch.zeros(1, 8), lr=1.0)
    assert torch.equal(table.rows, before)
    table.update(torch.empty(0, dtype=torch.int64), torch.empty(0, 8), lr=1.0)
    assert torch.equal(table.rows, before)


def test_leaf_gradients_equal_a_dense_embedding():
    plan = build_plan(HashConfig(heads=2, rows_per_head=50, layers=(0, 1), pad_id=0), CanonicalVocabulary.identity(20))
    lookup = Lookup(CanonicalVocabulary.identity(20), plan, DeviceTable(plan.num_rows, 4, std=1.0))
    tokens, weight = torch.randint(0, 20, (4, 30)), torch.randn(4, 30, 2, 4, 4)
    leaf = lookup.leaf(tokens)
    for part in (slice(0, 1), slice(1, 4)):  # in parts, as gradient accumulation does
        (leaf.expand(part.start, part.stop).sin() * weight[part]).sum().backward()
    dense = lookup.table.rows.clone().requires_grad_()
    (F.embedding(lookup.ids(tokens)[0], dense).sin() * weight).sum().backward()
    torch.testing.assert_close(leaf.rows.grad, dense.grad[leaf.unique])
    assert dense.grad.abs().sum(1).count_nonzero() == len(leaf.unique)


def test_state_round_trip_and_refusals():
    table, other = DeviceTable(5, 2, std=1.0), DeviceTable(5, 2)
    table.update(torch.tensor([3]), torch.ones(1, 2), lr=0.1)
    other.load_state(table.state())
    assert torch.equal(other.rows, table.rows)
    assert torch.equal(other.second_moment, table.second_moment)
    with pytest.raises(MismatchError, match="expected"):
        DeviceTable(6, 2).load_state(table.state())
    with pytest.raises(ConfigError, match="at least one row"):
        DeviceTable(0, 2)


def test_a_table_too_small_for_the_plan_is_refused():
    vocabulary = CanonicalVocabulary.identity(20)
    plan = build_plan(HashConfig(heads=2, rows_per_head=50, layers=(0,), pad_id=0), vocabulary)
    with pytest.raises(MismatchError, match="read past its end"):
        Lookup(vocabulary, plan, DeviceTable(plan.num_rows - 1, 4))
