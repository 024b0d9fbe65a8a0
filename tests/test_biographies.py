"""Sentences about made-up people: true, told equally often, asked as they should be, and without the trap of such data."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.evaluate.biographies import FORMS, PHRASINGS, invent
from engram_lm.evaluate.exposures import ABSENT, Exposures, asked, packed, told
from engram_lm.evaluate.facts import ATTRIBUTES
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.loader import IGNORED, LoaderState

SETTINGS = {"attributes": 2, "values": 9, "names": (9, 9, 9)}
SETS = {form: invent(form, 40, **SETTINGS) for form in FORMS}
PHRASES = list(ATTRIBUTES.values())


def facts_of(people) -> list[tuple[str, int, str]]:
    """(name, attribute, value) of every fact, in words."""
    return [
        (" ".join(people.words[token] for token in name), attribute, people.words[value])
        for name, values in zip(people.names.tolist(), people.values.tolist(), strict=True)
        for attribute, value in enumerate(values)
    ]


def spelled(form: str, people) -> set[str]:
    """Every sentence that may be told, written by hand."""
    found = set()
    for person in range(people.people):
        (name, _, first), (_, _, second) = facts_of(people)[2 * person : 2 * person + 2]
        told = [(PHRASES[0], first), (PHRASES[1], second)]
        for phrase, value in told:
            if form in ("single", "split", "long", "question"):
                found.add(f"{name} {phrase} {value}")
            if form == "question" and person % 2 == 0:
                found.add(f"Q: {name} {phrase} ? A: {value}")
        for kind, (_, value) in zip(("city", "subject"), told, strict=True):
            if form == "paraphrase":
                found |= {f"{name} {phrase} {value}" for phrase in PHRASINGS[kind][0]}
        for one, other in (told, told[::-1]):
            if form == "story":
                found.add(f"{name} {' '.join(one)} {' '.join(other)}")
            if form == "pronoun":
                found.add(f"{name} {' '.join(one)} . They {' '.join(other)}")
    return {f"<|endoftext|> {text}" for text in found}


def all_rows(people):
    """Every sentence in every variant."""
    which = torch.arange(len(people)).repeat_interleave(people.variants)
    return people.sentences(which, torch.arange(people.variants).repeat(len(people)))


@pytest.mark.parametrize("form", FORMS)
def test_sentences_are_those_of_the_form_and_true(form):
    people = SETS[form]
    assert {people.text(row) for row in all_rows(people)} == spelled(form, people)


@pytest.mark.parametrize("form", FORMS)
def test_people_differ_and_words_are_one_token_each(form):
    people = SETS[form]
    assert len({tuple(name) for name in people.names.tolist()}) == people.people == 40
    assert len(set(people.words)) == len(people.words)
    assert people.tokenizer().get_vocab_size() == len(people.words)
    assert CanonicalVocabulary.from_tokenizer(people.tokenizer(), cache=False).size == len(people.words)


def test_a_seed_decides_everything():
    again, other = invent("story", 40, **SETTINGS), invent("story", 40, **SETTINGS, seed=1)
    assert again.words == SETS["story"].words
    assert torch.equal(again.values, SETS["story"].values)
    assert other.words != again.words


def test_values_are_drawn_evenly_and_their_entropy_is_said():
    people = invent("single", 8000, attributes=4, values=16)
    assert people.value_bits == 4
    assert people.name_bits == pytest.approx(math.log2(100**3))
    for values in people.values.unbind(1):
        counts = torch.unique(values, return_counts=True)[1]
        assert len(counts) == 16
        assert (counts - 500).abs().max() < 6 * math.sqrt(500)


# --- the trap, and what makes a form hard ---------------------------------------------------------------------------


def ngrams(rows, order: int, end: torch.Tensor) -> list[tuple[int, ...]]:
    """The n-gram of each row that ends at `end` [n]."""
    return [tuple(row[: last + 1][-order:]) for row, last in zip(rows.tolist(), end.tolist(), strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_no_ngram_that_ends_before_a_value_names_the_person(form):
    people = SETS[form]
    for questions in people.questions(1000).values():
        end = (questions.targets != IGNORED).int().argmax(1)
        for ngram in ngrams(questions.tokens, 3, end):
            assert sum(token in set(people.names.flatten().tolist()) for token in ngram) < people.names.shape[1]


@pytest.mark.parametrize(("form", "identified"), [("single", True), ("split", False), ("long", False)])
def test_whether_the_name_ends_in_an_ngram_of_its_own(form, identified):
    people = invent(form, 400, names=(9, 9, 9))
    endings = Counter(ngrams(people.names, 3, torch.full((400,), people.names.shape[1] - 1)))
    assert (max(endings.values()) == 1) == identified
    if not identified:
        assert min(endings.values()) > 1


def test_phrasings_do_not_begin_one_another_and_held_out_ones_have_no_words_of_their_own():
    everything = [phrase.split() for both in PHRASINGS.values() for phrases in both for phrase in phrases]
    for one, other in combinations(everything, 2):
        assert one[: len(other)] != other
        assert other[: len(one)] != one
    for told_ones, held_out in PHRASINGS.values():
        assert set(" ".join(held_out).split()) <= set(" ".join(told_ones).split())
        assert not set(held_out) & set(told_ones)
        assert len({len(phrase.split()) for phrase in told_ones}) > 1


# --- questions ------------------------------------------------------------------------------------------------------

KINDS = {
    "story": ["as told", "after another fact"],
    "pronoun": ["as told", "after They"],
    "paraphrase": ["as told", "held-out phrasing"],
    "question": ["as told", "question, told as one", "question, told as a statement"],
}


@pytest.mark.parametrize("form", FORMS)
def test_questions_ask_for_the_value_after_its_name(form):
    people = SETS[form]
    truth = {(name, value) for name, _, value in facts_of(people)}
    kinds = people.questions(1000)
    assert list(kinds) == KINDS.get(form, ["as told"])
    for questions in kinds.values():
        assert ((questions.targets != IGNORED).sum(1) == 1).all()
        for tokens, targets in zip(questions.tokens, questions.targets, strict=True):
            place = int((targets != IGNORED).int().argmax())
            text = people.text(tokens[: place + 1])
            assert any(name in text and people.words[targets[place]] == value for name, value in truth)
            assert people.words[targets[place]] not in text


@pytest.mark.parametrize("form", FORMS)
def test_as_told_means_the_beginning_of_a_sentence_that_is_told(form):
    people = SETS[form]
    sentences = spelled(form, people)
    questions = people.questions(10)["as told"]
    assert len(questions.tokens) == 10
    for tokens, targets in zip(questions.tokens, questions.targets, strict=True):
        place = int((targets != IGNORED).int().argmax())
        text = people.text(torch.cat([tokens[: place + 1], targets[place : place + 1]]))
        assert any(sentence.startswith(text) for sentence in sentences)


def test_what_is_held_out_is_never_told():
    for form, kinds in (("paraphrase", ["held-out phrasing"]), ("question", ["question, told as a statement"])):
        people = SETS[form]
        seen = {people.text(row) for row in all_rows(people)}
        for kind in kinds:
            questions = people.questions(1000)[kind]
            answers = questions.targets.max(1).values[:, None]
            asked_about = {
                people.text(torch.cat([row[row != 0], answer]))
                for row, answer in zip(questions.tokens, answers, strict=True)
            }
            assert asked_about
            assert not {f"<|endoftext|> {text}" for text in asked_about} & seen


def test_names_are_targets_by_themselves():
    for people in SETS.values():
        batch = people.name_tokens(7)
        assert torch.equal(batch.targets, people.names[:7])
        assert torch.equal(batch.tokens[:, 1:], people.names[:7, :-1])


@pytest.mark.parametrize(
    ("form", "people", "changes", "message"),
    [
        ("single", 0, {}, "cannot invent 0 people"),
        ("single", 730, {}, "there are 729 different names"),
        ("pronoun", 10, {"attributes": 1}, "it takes 2 to 4 attributes"),
        ("single", 10, {"attributes": 5}, "it takes 1 to 4 attributes"),
        ("single", 10, {"values": 1}, "at least 2 values"),
        ("single", 10, {"names": (9, 0, 9)}, "sizes of at least 1"),
    ],
)
def test_what_cannot_be_invented_is_refused(form, people, changes, message):
    with pytest.raises(ConfigError, match=message):
        invent(form, people, **SETTINGS | changes)


# --- rows and exposures ---------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from([ABSENT, 0, 1, 2, 3]), min_size=5, max_size=5), min_size=1, max_size=6))
def test_packing_keeps_the_order_and_targets_leave_padding_out(rows):
    row = packed(*torch.tensor(rows).split([2, 3], dim=1))
    for one, other in zip(rows, row.tolist(), strict=True):
        present = [token for token in one if token != ABSENT]
        assert other == present + [ABSENT] * (5 - len(present))
    batch = told(row)
    assert batch.tokens.min() >= 0
    for one, targets in zip(row.tolist(), batch.targets.tolist(), strict=True):
        assert targets == [IGNORED if token == ABSENT else token for token in one[1:]]


def test_answers_of_several_tokens_are_asked_whole():
    rows = torch.tensor([[0, 5, 6, 7, ABSENT], [0, 5, 6, 7, 8], [0, 4, 3, ABSENT, ABSENT]])
    batch = asked(rows, torch.tensor([2, 3, 1]))
    assert batch.targets.tolist() == [
        [IGNORED, 6, 7, IGNORED],
        [IGNORED, 6, 7, 8],
        [IGNORED, 3, IGNORED, IGNORED],
    ]


@settings(max_examples=25)
@given(st.sampled_from(FORMS), st.integers(1, 150), st.integers(0, 9))
def test_every_sentence_comes_once_an_epoch(form, batch_size, seed):
    """Also where batches do not divide the sentences: compared with a list of all epochs one after the other."""
    people, epochs = SETS[form], 3
    exposures, state = Exposures(people, batch_size, seed), LoaderState()
    rows: list[str] = []
    while len(rows) < epochs * len(people):
        batch, state = exposures.next(state)
        assert len(batch.tokens) == batch_size
        assert (state.epoch * len(people) + state.index) == len(rows) + batch_size
        full = torch.cat([batch.tokens[:, :1], batch.targets.masked_fill(batch.targets == IGNORED, ABSENT)], dim=1)
        rows += [people.text(row) for row in full]
    number = {people.text(row): place // people.variants for place, row in enumerate(all_rows(people))}
    seen = np.array([number[row] for row in rows[: epochs * len(people)]]).reshape(epochs, -1)
    assert (np.sort(seen, axis=1) == np.arange(len(people))).all()
    assert (seen[0] != seen[1]).any()


@pytest.mark.parametrize("form", ["story", "pronoun", "paraphrase"])
def test_variants_are_drawn_anew(form):
    people = SETS[form]
    exposures = Exposures(people, len(people), 0)
    one, other = (sorted(exposures.next(LoaderState(epoch))[0].targets.tolist()) for epoch in range(2))
    assert one != other


def test_the_same_state_gives_the_same_batch():
    state = LoaderState(3, 5)
    one, other, seeded = (Exposures(SETS["story"], 16, seed).next(state)[0].tokens for seed in (7, 7, 8))
    assert torch.equal(one, other)
    assert not torch.equal(one, seeded)
