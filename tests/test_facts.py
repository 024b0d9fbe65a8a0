"""Made-up people: distinct, told truthfully, seen equally often, and recalled by those who know them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ENGRAM, live
from torch import nn

from engram_lm.errors import ConfigError
from engram_lm.evaluate.facts import (
    ATTRIBUTES,
    SENTENCE,
    SIZES,
    SUBJECTS,
    Exposures,
    People,
    answers,
    distinct,
    invented_words,
    recall,
)
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.loader import LoaderState

PEOPLE = People.invent(240, seed=1)
FACTS = dict(zip(map(tuple, PEOPLE.names.tolist()), PEOPLE.values.tolist(), strict=True))


def test_people_are_distinct_and_the_same_for_a_seed():
    again, others = People.invent(240, seed=1), People.invent(240, seed=2)
    assert len(PEOPLE) == len(FACTS) == 240
    assert again.words == PEOPLE.words
    assert torch.equal(again.names, PEOPLE.names)
    assert torch.equal(again.values, PEOPLE.values)
    assert not torch.equal(others.names, PEOPLE.names)


def test_every_word_is_one_token_of_its_own():
    assert len(set(PEOPLE.words)) == len(PEOPLE.words)
    tokenizer = PEOPLE.tokenizer()
    assert tokenizer.get_vocab_size() == len(PEOPLE.words)
    assert [tokenizer.id_to_token(token) for token in range(len(PEOPLE.words))] == list(PEOPLE.words)
    assert PEOPLE.words[:2] == ("<|endoftext|>", "lives in")
    assert [PEOPLE.words[token] for token in PEOPLE.phrases.tolist()] == list(ATTRIBUTES.values())


@pytest.mark.parametrize("seed", [0, 1, 8])  # in 8 there is a Drama, which was a subject too
def test_no_two_words_fold_into_one(seed):
    """Or the memory would take two people of different names for one."""
    people = People.invent(10, seed)
    vocabulary = CanonicalVocabulary.from_tokenizer(people.tokenizer(), cache=False)
    assert vocabulary.size == len(people.words)


def test_names_and_values_come_from_their_own_words():
    columns = torch.cat([PEOPLE.names, PEOPLE.values], dim=1)
    pools = [set(column.tolist()) for column in columns.unbind(1)]
    assert sum(map(len, pools)) == len(set.union(*pools))
    words = [[PEOPLE.words[token] for token in pool] for pool in pools]
    assert all(word.startswith("University of ") for word in words[5])
    assert all(word.endswith(" Ltd") for word in words[6])
    assert all(word.islower() for word in words[4])


def test_a_sentence_tells_the_facts_in_the_order_asked_for():
    people = torch.tensor([5, 17])
    orders = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    told = PEOPLE.sentences(people, orders)
    assert told.shape == (2, SENTENCE)
    for sentence, person, order in zip(told.tolist(), people.tolist(), orders.tolist(), strict=True):
        assert sentence[0] == 0
        assert sentence[1:4] == PEOPLE.names[person].tolist()
        for place, attribute in enumerate(order):
            phrase, value = sentence[4 + 2 * place : 6 + 2 * place]
            assert PEOPLE.words[phrase] == list(ATTRIBUTES.values())[attribute]
            assert value == PEOPLE.values[person, attribute]
    text = PEOPLE.text(told[0])
    assert text.startswith("<|endoftext|> ")
    assert " lives in " in text
    assert text.endswith(PEOPLE.words[told[0, -1]])


@pytest.mark.parametrize("attribute", range(4))
def test_a_question_is_the_beginning_of_a_sentence_that_answers_it(attribute):
    others = [other for other in range(4) if other != attribute]
    orders = torch.tensor([attribute, *others]).expand(len(PEOPLE), -1)
    told = PEOPLE.sentences(torch.arange(len(PEOPLE)), orders)
    questions = PEOPLE.questions(attribute)
    assert torch.equal(told[:, : questions.shape[1]], questions)
    assert torch.equal(told[:, questions.shape[1]], PEOPLE.values[:, attribute])


def test_knowing_the_others_does_not_help():
    """Attributes are drawn independently and about evenly."""
    people = People.invent(20_000, seed=0)
    for attribute, kind in enumerate(ATTRIBUTES):
        counts = np.unique(people.values[:, attribute], return_counts=True)[1]
        expected = 20_000 / SIZES.get(kind, len(SUBJECTS))
        assert len(counts) == SIZES.get(kind, len(SUBJECTS))
        assert abs(counts - expected).max() < 6 * math.sqrt(expected)
    city, company = people.values[:, 0].double(), people.values[:, 3].double()
    assert abs(torch.corrcoef(torch.stack([city, company]))[0, 1]) < 5 / math.sqrt(20_000)


NAMES = SIZES["first"] * SIZES["middle"] * SIZES["last"]


@pytest.mark.parametrize("count", [0, -1, NAMES + 1])
def test_too_many_people_are_refused(count):
    with pytest.raises(ConfigError, match=f"cannot invent {count:,} people: there are {NAMES:,} different names"):
        People.invent(count)


@given(st.integers(1, 300), st.data())
def test_distinct_numbers_are(possible, data):
    count = data.draw(st.integers(1, possible))
    found = distinct(np.random.default_rng(data.draw(st.integers(0, 99))), possible, count)
    assert len(set(found.tolist())) == count == len(found)
    assert found.min() >= 0
    assert found.max() < possible


def test_invented_words_differ():
    words = list(invented_words(np.random.default_rng(0), 3000))
    assert len(set(words)) == 3000
    assert all(word.isalpha() and word[0].isupper() for word in words)


# --- exposures ----------------------------------------------------------------------------------------------


@given(st.sampled_from([1, 5, 48, 240]), st.integers(0, 9))
def test_everyone_comes_once_an_epoch(batch_size, seed):
    exposures, state = Exposures(PEOPLE, batch_size, seed), LoaderState()
    met = []
    for epoch in range(2):
        names = []
        for index in range(exposures.steps_per_epoch):
            assert state == LoaderState(epoch, index)
            batch, state = exposures.next(state)
            assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
            assert batch.tokens.shape == (batch_size, SENTENCE - 1)
            names += map(tuple, batch.tokens[:, 1:4].tolist())
        assert sorted(names) == sorted(FACTS)
        met.append(names)
    assert state == LoaderState(2, 0)
    assert met[0] != met[1]


def test_every_exposure_is_true_and_in_a_fresh_order():
    exposures = Exposures(PEOPLE, 240)
    orders = []
    for epoch in range(2):
        batch, _ = exposures.next(LoaderState(epoch))
        rows = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1).tolist()
        told = {}
        for row in rows:
            phrases, values = row[4::2], row[5::2]
            attributes = [phrase - int(PEOPLE.phrases[0]) for phrase in phrases]
            assert sorted(attributes) == [0, 1, 2, 3]
            assert values == [FACTS[tuple(row[1:4])][attribute] for attribute in attributes]
            told[tuple(row[1:4])] = tuple(attributes)
        assert len(set(told.values())) == 24
        orders.append(told)
    assert sum(orders[0][name] == orders[1][name] for name in FACTS) < len(FACTS) / 4


def test_the_same_state_gives_the_same_batch():
    state = LoaderState(3, 2)
    one, other = Exposures(PEOPLE, 48, 7).next(state)[0], Exposures(PEOPLE, 48, 7).next(state)[0]
    assert torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.tokens, Exposures(PEOPLE, 48, 8).next(state)[0].tokens)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="240 people do not fill batches of 7"):
        Exposures(PEOPLE, 7)


# --- recall -------------------------------------------------------------------------------------------------


class Answering(nn.Module):
    """Stands in for a language model: answers each question [T] by a function of its tokens."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1, 1)
        self.answer = answer

    def forward(self, tokens, rows=None):
        return tokens[:, None].expand(-1, tokens.shape[1], -1), None  # every position holds the whole question

    def logits(self, hidden):
        said = torch.tensor([[self.answer(question) for question in row] for row in hidden.tolist()])
        return nn.functional.one_hot(said, len(PEOPLE.words)).float()


def knows(question: list[int]) -> int:
    return FACTS[tuple(question[1:4])][question[4] - int(PEOPLE.phrases[0])]


def test_an_oracle_recalls_everything():
    assert recall(Answering(knows), None, PEOPLE, batch_size=100) == {
        "recall": 1.0,
        **dict.fromkeys(ATTRIBUTES, 1.0),
    }


def test_who_knows_one_attribute_recalls_a_quarter():
    city = recall(Answering(lambda question: FACTS[tuple(question[1:4])][0]), None, PEOPLE)
    assert city == {"recall": 0.25, "city": 1.0, "subject": 0.0, "university": 0.0, "company": 0.0}


def test_who_knows_only_frequencies_recalls_little():
    commonest = PEOPLE.values.mode(dim=0).values.tolist()
    found = recall(Answering(lambda question: commonest[question[4] - int(PEOPLE.phrases[0])]), None, PEOPLE)
    for attribute, kind in enumerate(ATTRIBUTES):
        assert found[kind] == pytest.approx(float((PEOPLE.values[:, attribute] == commonest[attribute]).float().mean()))
    assert found["recall"] < 0.05


def test_a_real_model_reads_its_memory():
    """Answers of a batch are those of one question after the other, and depend on the table's rows."""
    model, lookup = live(ENGRAM)
    questions = torch.randint(1, ENGRAM.vocab_size, (6, 5), generator=torch.Generator().manual_seed(0))
    said = answers(model, lookup, questions)
    assert said.tolist() == [int(answers(model, lookup, question[None])) for question in questions]
    lookup.table.rows.neg_()
    assert answers(model, lookup, questions).tolist() != said.tolist()
