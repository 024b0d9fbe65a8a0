"""What a model holds: answers judged one by one, and bits as the formula has them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import ENGRAM, VOCABULARY, live

from engram_lm.evaluate.biographies import invent
from engram_lm.evaluate.capacity import answer, bits_stored, capacity
from engram_lm.evaluate.exposures import ABSENT, asked
from engram_lm.model import LanguageModel


def questions(count: int = 9, seed: int = 0):
    """Rows of different lengths whose answers are of one to three tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, VOCABULARY, (count, 8), generator=generator)
    lengths = torch.randint(5, 9, (count,), generator=generator)
    rows[torch.arange(8) >= lengths[:, None]] = ABSENT
    answers = torch.randint(1, 4, (count,), generator=generator)
    return rows, lengths.tolist(), answers


def test_answers_are_those_of_each_question_by_itself():
    model, lookup = live(ENGRAM)
    rows, lengths, answers = questions()
    found = answer(model, lookup, asked(rows, answers), batch_size=4)
    for row, length, size, right, nats in zip(rows, lengths, answers.tolist(), *found, strict=True):
        tokens = row[None, :length]
        with torch.no_grad():
            hidden, _ = model(tokens, lookup.rows(tokens)[0])
            logits = model.logits(hidden)[0, length - 1 - size : length - 1]
        truth = tokens[0, length - size :]
        assert right == (logits.argmax(-1) == truth).all()
        assert nats == pytest.approx(float(F.cross_entropy(logits, truth, reduction="sum")), rel=1e-4)


def test_an_answer_is_right_only_if_all_of_it_is():
    model, lookup = live(ENGRAM)
    rows = questions()[0][:, :5]
    for tokens in (rows[:, :-2], rows[:, :-1]):  # the last two tokens become what the model says
        with torch.no_grad():
            said = model.logits(model(tokens, lookup.rows(tokens)[0])[0][:, -1]).argmax(-1)
        rows[:, tokens.shape[1]] = said
    assert answer(model, lookup, asked(rows, 2)).recall == 1
    rows[:4, -2] = (rows[:4, -2] + 1) % VOCABULARY
    found = answer(model, lookup, asked(rows, 2))
    assert found.right.tolist() == [False] * 4 + [True] * 5
    assert found.recall == pytest.approx(5 / 9)


def test_a_model_that_knows_only_the_words_stores_nothing():
    people = invent("single", 64, values=16)
    model = LanguageModel.build(replace(ENGRAM, vocab_size=len(people.words), memory=None))
    with torch.no_grad():
        model.head.weight.zero_()  # every word is as likely
    found = answer(model, None, people.questions(1000)["as told"])
    assert found.loss == pytest.approx(math.log(len(people.words)))
    assert bits_stored(people.facts, people.value_bits, found.loss) == 0


def test_bits_are_the_formula():
    subjects, names, values, name_nats, value_nats = 1000, 1e6, 300.0**4, 7.5, 2.5
    expected = subjects * math.log2(names / math.exp(name_nats)) + subjects * math.log2(values / math.exp(value_nats))
    assert capacity(subjects, math.log2(names), name_nats, math.log2(values), value_nats) == pytest.approx(expected)


@given(st.integers(1, 10**6), st.integers(2, 10**6), st.floats(0, 100))
def test_bits_lie_between_nothing_and_all_there_is(count, choices, nats):
    prior = math.log2(choices)
    assert 0 <= bits_stored(count, prior, nats) <= count * prior * (1 + 1e-9)
    assert bits_stored(count, prior, 0.0) == pytest.approx(count * prior)
    assert bits_stored(count, prior, math.log(choices)) == pytest.approx(0, abs=1e-6 * count)
