"""The thirteen tasks by the counts that define them, their lengths, both metrics by hand, and models that answer."""

import io
import json
import re
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engram_lm.cli.needle import Needle
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.needle import (
    TASKS,
    Question,
    grid,
    make_samples,
    prefer_task,
    read_questions,
    run_task,
    string_match_all,
    string_match_part,
)
from engram_lm.evaluate.needle.metrics import interval
from engram_lm.evaluate.needle.run import log_likelihoods
from engram_lm.evaluate.needle.samples import INTERPOLATED, largest_fit
from engram_lm.evaluate.needle.sources import NOISE, split_sentences
from engram_lm.evaluate.needle.tasks import COUNT, FIND, FOUND_ONE, NEEDLE, NOTICE, READ, TRACK, TRACKED, Draft
from engram_lm.evaluate.needle.words import ADJECTIVES, NOUNS, invented, numbers, words
from engram_lm.train.checkpoint import write_whole
from engram_lm.train.loader import Loader
from engram_lm.train.loop import Training
from engram_lm.train.run import build_lookup
from engram_lm.train.tokenizer import id_limit, train_tokenizer

RNG = np.random.default_rng(0)
CORPUS = [" ".join(f"{' '.join(RNG.choice(tiny.WORDS, RNG.integers(3, 12)))}." for _ in range(400)) for _ in range(3)]
QUESTIONS = [
    Question(
        f"Where is item {i}?", (f"place {i}", f"spot {i}"), (f"Item {i} lies at place {i}. {CORPUS[0][i : i + 90]}",)
    )
    for i in range(200)
]
WORDING = " ".join((NOISE, FIND, FOUND_ONE, NEEDLE, TRACK, TRACKED, COUNT, NOTICE, READ, "0 1 2 3 4 5 6 7 8 9"))
TOKENIZER = train_tokenizer([*CORPUS, *[WORDING] * 60], 700)
LENGTH = 2048
PLACED = re.compile(r"A (number|code) to remember for ([\w-]+): ([\w-]+)\.")
ITEM = re.compile(r"\d+\. (\w+)")


def samples(task: str, length: int = LENGTH, count: int = 3, seed: int = 0, **options):
    return make_samples(task, TOKENIZER, length, count, seed, CORPUS, QUESTIONS, **options)


def size(text: str) -> int:
    return len(TOKENIZER.encode(text).ids)


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_samples_come_near_the_length_and_never_exceed_it(task):
    for sample in samples(task):
        assert sample.tokens == 1 + size(sample.text) + TASKS[task].budget
        assert 0.93 * LENGTH < sample.tokens <= LENGTH
        assert sample.references


@pytest.mark.parametrize("task", TASKS)
def test_lengths_below_the_minimum_are_refused_with_the_minimum(task):
    with pytest.raises(ConfigError, match=rf"{task} at length 60: .* Ask for at least \d+") as refused:
        samples(task, 60)
    minimum = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert max(sample.tokens for sample in samples(task, minimum)) == minimum
    with pytest.raises(ConfigError, match=f"at least {minimum}"):
        samples(task, minimum - 1)


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(0, 400), st.integers(1, 5))
def test_the_largest_size_that_fits(costs, length, smallest):
    """Any haystack whose units cost 0 to 50 tokens, against a loop over all sizes."""
    totals = np.cumsum([30] * smallest + costs)
    draft = Draft(lambda size: size, smallest, len(totals))
    least = int(totals[smallest - 1])
    if least <= length:
        expected = max(size for size in range(smallest, len(totals) + 1) if totals[size - 1] <= length)
        assert largest_fit(draft, lambda size: int(totals[size - 1]), least, length) == expected


@given(st.integers(0, 2**32))
def test_the_search_ends_whatever_it_is_told(seed):
    rng, calls = np.random.default_rng(seed), []

    def tokens(size: int) -> int:
        calls.append(size)
        return int(rng.choice([0, 10**9, 50]))

    largest = 10**6
    assert 1 <= largest_fit(Draft(lambda size: size, 1, largest), tokens, 40, 100) <= largest
    assert len(calls) <= INTERPOLATED + 20  # log2 of largest


# --- the same, and not the same ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_samples_differ_and_more_of_them_begin_alike(task):
    few, many = samples(task, count=2), samples(task, count=4)
    assert many[:2] == few
    assert len({sample.text for sample in many}) == 4
    assert samples(task, count=2, seed=1)[0].text != few[0].text


def one_of_each() -> list[str]:
    return [sample.text for task in TASKS for sample in samples(task, count=1)]


def test_the_same_samples_in_another_process(processes):
    with ProcessPoolExecutor(1, mp_context=processes) as others:
        assert others.submit(one_of_each).result() == one_of_each()


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("cwe", "fwe")])
def test_the_same_is_asked_at_every_length(task):
    for short, long in zip(samples(task, 1100), samples(task, 2200), strict=True):
        assert (short.references, short.prefix) == (long.references, long.prefix)
        assert len(short.prompt) < len(long.prompt)


# --- needles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "keys", "values", "answers", "key_is", "value_is"),
    [
        ("niah_single_1", 1, 1, 1, "words", "number"),
        ("niah_single_2", 1, 1, 1, "words", "number"),
        ("niah_single_3", 1, 1, 1, "words", "code"),
        ("niah_multikey_1", 4, 1, 1, "words", "number"),
        ("niah_multikey_2", None, 1, 1, "words", "number"),
        ("niah_multikey_3", None, 1, 1, "code", "code"),
        ("niah_multivalue", 1, 4, 4, "words", "number"),
        ("niah_multiquery", 4, 1, 4, "words", "number"),
    ],
)
def test_needles(task, keys, values, answers, key_is, value_is):
    for sample in samples(task):
        needles = PLACED.findall(sample.prompt)
        by_key = {key: [v for _, k, v in needles if k == key] for _, key, _ in needles}
        assert {kind for kind, _, _ in needles} == {value_is}
        assert len(by_key) == keys if keys else len(by_key) > 10  # None: the haystack is needles and nothing else
        assert {len(found) for found in by_key.values()} == {values}
        assert len({value for _, _, value in needles}) == len(needles)
        question = sample.prompt.split("Question:")[1]
        asked = [key for key in by_key if key in question]
        assert {value for key in asked for value in by_key[key]} == set(sample.references)
        assert len(sample.references) == answers
        assert all(key in sample.prefix for key in asked)
        for key in by_key:
            assert str(uuid.UUID(key)) == key if key_is == "code" else re.fullmatch(r"[a-z]+-[a-z]+", key)
        for reference in sample.references:
            assert (
                str(uuid.UUID(reference)) == reference if value_is == "code" else re.fullmatch(r"[1-9]\d{6}", reference)
            )
        assert len(sample.depths) == (keys or 1) * values
        assert list(sample.depths) == sorted(sample.depths)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_a_needle_lies_where_it_was_put(task, depth):
    for sample in samples(task, depth=depth):
        hay = sample.prompt.split("\n\n", 1)[1].rsplit("\n\nQuestion", 1)[0]
        before = hay[: hay.index(sample.references[0])]
        assert 100 * len(before) / len(hay) == pytest.approx(depth, abs=4)
        assert sample.depths == (pytest.approx(depth, abs=4),)


def test_drawn_depths_are_all_over_the_text():
    depths = [depth for sample in samples("niah_multiquery", count=40) for depth in sample.depths]
    assert np.histogram(depths, 4, (0, 100))[0].min() > 20


def test_an_essay_haystack_is_the_text_itself():
    for sample in samples("niah_single_2"):
        hay = sample.prompt.split("\n\n", 1)[1].rsplit("\n\nQuestion", 1)[0]
        bare = PLACED.sub("", hay).replace(".  ", ". ").strip()
        joined = f"{' '.join(CORPUS)} {' '.join(CORPUS)}"
        assert " ".join(bare.split()) in joined


@given(st.text(alphabet="ab .!?。\n", max_size=900))
def test_sentences_are_the_text_cut(text):
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 241 for piece in pieces)


def test_sentences_of_two_scripts():
    assert split_sentences("It is 3.5 m. Good!\nNo") == ["It is 3.5 m. ", "Good!\n", "No"]
    assert split_sentences("你好。再见！") == ["你好。", "再见！"]


def test_any_text_is_a_haystack():
    corpus = ["<|endoftext|> is text here, too. " * 60, "x" * 5000, "天地玄黄，宇宙洪荒。" * 90, ""]
    for sample in make_samples("niah_single_2", TOKENIZER, 1500, 4, 0, corpus):
        assert 0.8 * 1500 < sample.tokens <= 1500


# --- chains, counts, documents ----------------------------------------------------------------------------------------


def test_variable_tracking():
    for sample in samples("vt"):
        example, asked = sample.prompt.split("\n\nVariables", 1)
        for text, names, letters in (
            (example, example.rsplit(" are ", 1)[1].split(), 3),
            (asked, sample.references, 5),
        ):
            values: dict[str, str] = {}
            for name, of in re.findall(r"LET (\w+) = (\w+)", text):
                assert of.isdigit() or of in values  # in the order of the chain
                values[name] = values.get(of, of)
            wanted = re.search(r"have the value (\d{5})\?", text)[1]
            assert list(names) == [name for name, value in values.items() if value == wanted]
            assert (len(names), len(values)) == (5, 5)
            assert {len(name) for name in names} == {letters}


@pytest.mark.parametrize(("length", "counts", "example"), [(2048, (6, 1), (20, 3, 1)), (5000, (30, 3), (40, 10, 3))])
def test_common_words(length, counts, example):
    (sample,) = samples("cwe", length, 1)
    shown, asked = sample.prompt.split("\n\nThe following", 1)
    shown_list, shown_answer = shown.split("Answer:")
    found = Counter(ITEM.findall(asked))
    assert {found[word] for word in sample.references} == {counts[0]}
    assert {count for word, count in found.items() if word not in sample.references} == {counts[1]}
    assert len(sample.references) == 10
    solved = Counter(ITEM.findall(shown_list))
    assert len(solved) == example[0]
    assert {solved[word] for word in ITEM.findall(shown_answer)} == {example[1]}
    assert sorted(solved.values()) == [example[2]] * (example[0] - 10) + [example[1]] * 10
    assert not set(solved) & set(found)


@pytest.mark.parametrize("length", [800, 2048, 5000])
def test_frequent_words(length):
    for sample in samples("fwe", length):
        coded = sample.prompt.split("\n\n")[1].split()
        (dots, most), *others = Counter(coded).most_common()
        assert dots == "..."
        assert tuple(word for word, _ in others[:3]) == sample.references
        assert others[2][1] > others[3][1]  # the third is not tied with the fourth
        for rank, (word, count) in enumerate(others[:6], start=2):
            assert len(word) == 6
            assert count == pytest.approx(most / rank**2, abs=1.5)


def test_questions_among_documents():
    seen = set()
    for sample in samples("qa_1", count=8):
        question = next(item for item in QUESTIONS if item.question in sample.prompt)
        documents = re.findall(r"Document (\d+):\n(.*?)\n\n", sample.prompt, re.DOTALL)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        assert len({text for _, text in documents}) == len(documents) > 5
        place = [text for _, text in documents].index(question.paragraphs[0])
        assert sample.depths == (pytest.approx(100 * place / len(documents), abs=0.06),)
        assert sample.references == question.answers
        seen.add(question.question)
    assert len(seen) == 8


def test_questions_of_several_documents():
    items = [
        Question(f"What joins {i} and {i + 1}?", (f"a road {i}",), (f"Town {i}. " * 9, f"City {i}. " * 9))
        for i in range(90)
    ]
    assert len(make_samples("qa_2", TOKENIZER, 1000, 2, 0, questions=items)[0].depths) == 2
    with pytest.raises(DataError, match="0 were given"):  # each is asked with two paragraphs
        make_samples("qa_1", TOKENIZER, 1000, 2, 0, questions=items)


def test_too_little_data_is_refused():
    with pytest.raises(DataError, match="hides its needles in text"):
        make_samples("niah_single_2", TOKENIZER, 1000, 1, 0)
    with pytest.raises(DataError, match="the data fills only"):
        make_samples("niah_single_2", TOKENIZER, 4000, 1, 0, ["A short text. " * 20])
    with pytest.raises(DataError, match="5 samples need as many questions, and 4"):
        make_samples("qa_1", TOKENIZER, 1000, 5, 0, questions=QUESTIONS[:4])
    with pytest.raises(DataError, match="the data fills only"):
        make_samples("qa_1", TOKENIZER, 4000, 4, 0, questions=QUESTIONS[:4])


def test_what_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no task is called 'niah'"):
        samples("niah")
    with pytest.raises(ConfigError, match="depth"):
        samples("niah_multiquery", depth=50)
    with pytest.raises(ConfigError, match="depth"):
        samples("niah_single_1", depth=101)
    with pytest.raises(ConfigError, match="count"):
        samples("vt", count=0)


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_never_repeat_nor_contain_each_other():
    rng = np.random.default_rng(0)
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)
    many = words(rng, len(ADJECTIVES) * len(NOUNS) + 1)
    assert len(set(many)) == len(many)
    assert {word.count("-") for word in many} == {2}
    assert not any(one != other and other.startswith(one) for one in NOUNS for other in NOUNS)  # shy-oak in shy-oaken
    for count in (30, 9000):
        drawn = invented(rng, count)
        assert (len(set(drawn)), len(set(map(len, drawn)))) == (count, 1)
    assert len(set(numbers(rng, 1000))) == 1000


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_both_metrics_by_hand():
    outputs = ["It is ALPHA, then gamma", "nothing"]
    references = [["alpha", "beta"], ["delta"]]
    assert string_match_all(outputs, references) == pytest.approx((1 / 2 + 0) / 2)
    assert string_match_part(outputs, references) == pytest.approx((1 + 0) / 2)
    assert string_match_all(["1234567"], [["234"]]) == 1  # contained is enough, as published


def test_lm_eval_scores_alternatives_by_their_mean():
    outputs, references = ["alpha"], [["alpha", "beta"]]
    of_lm_eval = max(
        sum(reference in output for reference in accepted) / len(accepted)
        for output, accepted in zip(outputs, references, strict=True)
    ) / len(outputs)
    assert (string_match_part(outputs, references), of_lm_eval) == (1.0, 0.5)


@pytest.mark.parametrize(("outputs", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_nothing_to_score_is_refused(outputs, references):
    for metric in (string_match_all, string_match_part):
        with pytest.raises(DataError, match="cannot be scored"):
            metric(outputs, references)


def test_intervals():
    assert interval([0.0] * 20) == (0, pytest.approx(0.1611, abs=1e-4))
    assert interval([1.0] * 8 + [0.0] * 2) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert interval([0.5]) == (0.0, 1.0)
    scores = np.random.default_rng(0).choice([0, 0.25, 0.5, 1], 200).tolist()
    half = 1.96 * np.std(scores) / np.sqrt(200)
    assert interval(scores) == pytest.approx((np.mean(scores) - half, np.mean(scores) + half), abs=0.01)


# --- models -----------------------------------------------------------------------------------------------------------

MODEL, LOOKUP = tiny.live(replace(tiny.ENGRAM, vocab_size=id_limit(TOKENIZER)))


@torch.no_grad()
def logits_after(tokens: list[int]) -> torch.Tensor:
    given = torch.tensor([tokens])
    return MODEL.logits(MODEL(given, LOOKUP.rows(given)[0])[0])[0]


def test_a_model_answers_greedily():
    (sample,) = samples("vt", 1100, 1)
    steps = []
    result = run_task(MODEL, LOOKUP, TOKENIZER, [sample], progress=lambda: steps.append(1))
    tokens = [0, *TOKENIZER.encode(sample.text).ids]
    prompt = len(tokens)
    for _ in range(TASKS["vt"].budget):
        tokens.append(int(logits_after(tokens)[-1].argmax()))
        if tokens[-1] == 0:
            break
    (answer,) = result["samples"]
    assert answer["output"] == TOKENIZER.decode(tokens[prompt:])
    assert (result["task"], result["metric"], result["count"]) == ("vt", "string_match_all", 1)
    assert (result["score"], result["tokens"], steps) == (answer["score"], sample.tokens, [1])
    assert json.loads(json.dumps(result)) == result

    said = answer["output"].strip()
    right = replace(sample, references=(said.upper(), "never said"))
    assert run_task(MODEL, LOOKUP, TOKENIZER, [right])["score"] == 0.5


def test_likelihoods_equal_those_of_one_pass():
    text, continuations = "the quick brown", [" fox", " 1234567", "!"]
    for found, continuation in zip(
        log_likelihoods(MODEL, LOOKUP, TOKENIZER, text, continuations), continuations, strict=True
    ):
        start = [0, *TOKENIZER.encode(text).ids]
        more = TOKENIZER.encode(continuation).ids
        logs = logits_after([*start, *more]).log_softmax(-1)
        expected = sum(float(logs[len(start) - 1 + i, token]) for i, token in enumerate(more))
        assert found == pytest.approx(expected, rel=1e-4)


def test_preference():
    drawn = samples("niah_single_1", 600, 6)
    result = prefer_task(MODEL, LOOKUP, TOKENIZER, drawn, others=3)
    assert result["chance"] == 0.25
    assert result["score"] == np.mean([answer["score"] for answer in result["samples"]])
    for answer in result["samples"]:
        assert answer["score"] == (answer["output"] == answer["references"][0])
    with pytest.raises(ConfigError, match="vt"):
        prefer_task(MODEL, LOOKUP, TOKENIZER, samples("vt", 1100, 2), others=1)
    with pytest.raises(DataError, match="6 samples"):
        prefer_task(MODEL, LOOKUP, TOKENIZER, drawn)


def test_tasks_are_not_mixed():
    with pytest.raises(DataError, match="of 2"):
        run_task(MODEL, LOOKUP, TOKENIZER, [*samples("vt", 1100, 1), *samples("niah_single_1", 600, 1)])
    with pytest.raises(DataError, match="of 0"):
        run_task(MODEL, LOOKUP, TOKENIZER, [])


def test_grid():
    asked = []

    def right_below_the_middle(model, lookup, tokenizer, drawn, *, progress):
        asked.append(drawn[0])
        share = float(np.mean([sample.depths[0] > 45 for sample in drawn]))
        return {"metric": "m", "score": share, "interval": [0, 1], "count": len(drawn)}

    found = grid(MODEL, LOOKUP, TOKENIZER, (600, 900), (0, 100), 3, 0, CORPUS, run=right_below_the_middle)
    assert found["scores"] == [[0, 1], [0, 1]]
    assert found["counts"] == [[3, 3], [3, 3]]
    assert (found["task"], found["lengths"], found["depths"]) == ("niah_single_2", [600, 900], [0, 100])
    assert len({sample.references for sample in asked}) == 1  # the same needle in every cell
    with pytest.raises(ConfigError, match="one needle"):
        grid(MODEL, LOOKUP, TOKENIZER, (600,), (0,), 3, 0, CORPUS, task="vt")


# --- files ------------------------------------------------------------------------------------------------------------


def test_questions_from_files(tmp_path):
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "Lima is in Peru.",
                        "qas": [
                            {
                                "question": "Where is Lima?",
                                "answers": [{"text": "Peru"}, {"text": "Peru"}, {"text": "in Peru"}],
                            },
                            {"question": "Why?", "answers": []},
                        ],
                    }
                ]
            }
        ]
    }
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    assert read_questions(tmp_path / "squad.json") == [
        Question("Where is Lima?", ("Peru", "in Peru"), ("Lima is in Peru.",))
    ]
    lines = [
        {"question": "Who?", "answers": "Bob", "context": "Bob did."},
        {"question": "Both?", "answers": ["yes"], "context": ["One.", "Two."]},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_questions(tmp_path / "own.jsonl") == [
        Question("Who?", ("Bob",), ("Bob did.",)),
        Question("Both?", ("yes",), ("One.", "Two.")),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{}"),
        ("a.json", '{"data": []}'),
        ("a.jsonl", "nonsense"),
        ("a.jsonl", '{"question": "Q?", "answers": []}'),
        ("a.jsonl", '{"question": "Q?", "answers": [], "context": "C."}'),
    ],
)
def test_files_without_questions_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(name)):
        read_questions(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "missing.json")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_whole(directory / "tokenizer.json", TOKENIZER.to_str())
    config = tiny.config(replace(tiny.ENGRAM, vocab_size=id_limit(TOKENIZER)))
    lookup = build_lookup(config, TOKENIZER, directory)
    tiny.finish(Training(config, directory, Loader(tiny.split(), 4, 10, 0), lookup))
    (directory / "hay.txt").write_text(CORPUS[0])
    return directory


def test_the_command(run, tmp_path):
    said = io.StringIO()
    command = Needle(
        run,
        tasks=("niah_single_1", "niah_multikey_1"),
        lengths=(600,),
        count=10,
        haystack=str(run / "hay.txt"),
        score="preference",
        depths=(50,),
        longppl=run,
        out=tmp_path / "needle.json",
    )
    assert command.run(Console(file=said, width=200)) == 0
    results = json.loads((tmp_path / "needle.json").read_text())
    assert set(results["tasks"]) == {"niah_single_1", "niah_multikey_1"}
    assert results["tasks"]["niah_single_1"]["600"]["chance"] == 0.1
    assert np.shape(results["grid"]["scores"]) == (1, 1)
    assert results["longppl"]["settings"]["trunc_len"] == 2
    for part in ("niah_multikey_1", "preference", "600 tokens", "by length and depth", "LongPPL", "needle.json"):
        assert part in said.getvalue()


def test_all_tasks_are_those_that_the_data_allows(run):
    everything = Needle(run, tasks=("all",))
    assert everything.names(corpus=True, questions=True) == list(TASKS)
    assert (
        everything.names(corpus=False, questions=False)
        == "niah_single_1 niah_multikey_2 niah_multikey_3 vt cwe fwe".split()
    )
    assert "vt" not in replace(everything, score="preference").names(corpus=True, questions=True)
    assert Needle(run, tasks=("vt", "cwe", "vt")).names(corpus=True, questions=True) == ["vt", "cwe"]


def test_the_command_writes_into_the_run(run):
    assert Needle(run, lengths=(500,), count=1).run(Console(file=io.StringIO())) == 0
    results = json.loads((run / "needle.json").read_text())
    assert results["tasks"]["niah_single_1"]["500"]["metric"] == "string_match_all"
    with pytest.raises(ConfigError, match="haystack"):
        Needle(run, lengths=(500,), count=1, longppl=run).run(Console(file=io.StringIO()))
