"""Rows of one key in the place of another's: the answer follows where the memory decides it."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from engram_lm.analysis.flip import Pair, flip, flips
from engram_lm.errors import DataError, MismatchError
from engram_lm.statistics import wilson

ANSWERS = (7, 9)


def prompts(seed=0):
    """Two prompts that differ in their last token only."""
    a = tiny.text(8, seed=seed)[0]
    b = a.clone()
    b[-1] = (a[-1] + 1) % tiny.VOCABULARY
    return a, b


def planted(seed=0):
    """A model that answers with what the memory says at the last position: the rows of prompt A say 7, those of B say 9."""
    model, lookup = tiny.live(tiny.ENGRAM)
    (a, b), table = prompts(seed), lookup.table
    memory = model.blocks[1].memory
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        table.rows.zero_()
        model.norm.weight.fill_(1.0)
        model.head.weight.copy_(F.normalize(model.head.weight, dim=1))  # a token's own direction suits no other better
        memory.project.weight[-model.config.dim :, 0] = model.head.weight[ANSWERS[0]] * 50
        memory.project.weight[-model.config.dim :, 1] = model.head.weight[ANSWERS[1]] * 50
        for prompt, column in (a, 0), (b, 1):
            table.rows[lookup.ids(prompt[None])[0][0, -1, 0], :] = torch.eye(4)[column]
    return model, lookup, a, b


def test_a_planted_fact_flips():
    model, lookup, a, b = planted()
    table = lookup.table.rows.clone()
    found = flip(model, lookup, a, b)
    assert found["answers"] == list(ANSWERS)
    assert found["top_1"] == list(ANSWERS)
    assert found["right"]
    assert found["flipped"]
    assert found["shift"] > 0
    assert torch.equal(table, lookup.table.rows)


def test_logits_are_those_of_a_forward_with_other_rows():
    model, lookup = tiny.live(tiny.EVERYTHING)
    a, b = prompts()
    rows_a, rows_b = (lookup.rows(prompt[None])[0] for prompt in (a, b))
    other_rows = rows_a.clone()
    other_rows[0, 5] = rows_b[0, 5]
    other_rows[0, 7] = rows_b[0, 7]
    found = flip(model, lookup, a, b, -1, ANSWERS)
    with torch.no_grad():
        before, after, whole = (
            model.logits(model(prompt[None], rows)[0][0, -1])[list(ANSWERS)].tolist()
            for prompt, rows in ((a, rows_a), (a, other_rows), (b, rows_b))
        )
    for number, name in enumerate(("logit_a", "logit_b")):
        assert found[name] == pytest.approx([before[number], after[number]], abs=1e-5)
    shift = (after[1] - after[0]) - (before[1] - before[0])
    assert found["shift"] == pytest.approx(shift, abs=1e-5)
    assert found["way"] == pytest.approx(shift / ((whole[1] - whole[0]) - (before[1] - before[0])), abs=1e-4)
    assert found == flip(model, lookup, a, b, 7, ANSWERS)


def test_the_same_rows_change_nothing():
    model, lookup = tiny.live(tiny.ENGRAM)
    a, b = prompts()
    found = flip(model, lookup, a, b, 3, ANSWERS)  # the prompts agree up to their last token
    assert found["shift"] == 0
    assert not found["right"]
    assert not found["flipped"]


def test_pairs_are_counted_together():
    model, lookup, a, b = planted()
    same = Pair(a, a)
    there, back, nothing = Pair(a, b), Pair(b, a), Pair(a, b, 3, ANSWERS)
    each = [flip(model, lookup, p.prompt_a, p.prompt_b, p.position, p.answers) for p in (there, back, nothing)]
    found = flips(model, lookup, [there, same, back, nothing])
    assert (found["pairs"], found["same"]) == (3, 1)
    assert found["right"] == found["flipped"] == pytest.approx(2 / 3)
    assert found["right_interval"] == found["flipped_interval"] == list(wilson(2 / 3, 3))
    shifts = torch.tensor([one["shift"] for one in each])
    assert found["shift"] == pytest.approx(float(shifts.mean()))
    assert found["shift_error"] == pytest.approx(float(shifts.std() / 3**0.5))
    assert flips(model, lookup, [there])["shift_error"] is None


def test_pairs_without_a_fact_are_refused():
    model, lookup, a, b = planted()
    with pytest.raises(DataError, match="no fact to flip"):
        flips(model, lookup, [Pair(a, a)])
    with pytest.raises(DataError, match="position 8 lies outside of the 8 tokens of prompt_a"):
        flip(model, lookup, a, b, 8)
    with pytest.raises(DataError, match="prompt_b"):
        flip(model, lookup, a, b[:4], -5)
    with pytest.raises(MismatchError, match="no memory"):
        flip(tiny.live(tiny.BASE)[0], lookup, a, b)
