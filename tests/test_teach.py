from __future__ import annotations

import json

import pytest
import torch

from engram_lm.errors import DataError, MismatchError

pytest.importorskip("transformers")
from hf_tiny import tiny_model, tiny_tokenizer

from engram_lm.hashing import HashConfig
from engram_lm.hf.attach import attach, detach, focused, mounted
from engram_lm.hf.teach import Fact, collate, read_facts, recall, sentence, teach
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig

PROMPTS = ("{} likes the", "the dog of {} is over the")
FACTS = [
    Fact("quick lazy dog", PROMPTS, "fox"),
    Fact("brown quick memory", PROMPTS, "dog"),
    Fact("over lazy fox", PROMPTS, "memory"),
]


@pytest.fixture
def taught():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama").eval()
    model.requires_grad_(False)
    hash = HashConfig(orders=(2, 3), heads=2, rows_per_head=997, layers=(0, 1), pad_id=0)
    memory = attach(model, EngramConfig(row_dim=16, conv_kernel=0), tokenizer, hash=hash)
    return model, tokenizer, memory


def test_a_frozen_model_learns_and_is_itself_again_when_unmounted(taught):
    model, tokenizer, _ = taught
    ids = torch.tensor([tokenizer("the quick brown fox jumps over the lazy dog")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
    losses = []
    optimizer = RowwiseAdamW(model, lr=1e-2, table_lr=0.5)
    teach(model, tokenizer, FACTS, optimizer, epochs=30, batch_size=6, on_step=lambda *told: losses.append(told[2]))
    assert losses[-1] < losses[0] - 0.1
    detach(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_only_rows_of_ngrams_inside_the_subject_learn(taught):
    model, tokenizer, memory = taught
    teach(model, tokenizer, FACTS, RowwiseAdamW(model, lr=1e-2, table_lr=0.5), epochs=2, contexts=())
    table = memory.lookup.table
    changed = set((table.fetch(torch.arange(table.num_rows)) != 0).any(1).nonzero().flatten().tolist())
    inside = set()
    for fact in FACTS:
        for prompt in fact.prompts:
            said = sentence(tokenizer, fact, prompt)
            ids = memory.lookup.ids(torch.tensor([said.tokens]))[0][0]
            inside |= set(ids[list(said.subject)].flatten().tolist())
    assert changed
    assert changed <= inside


def test_a_batch_ends_with_the_answers(taught):
    _, tokenizer, _ = taught
    sentences = [sentence(tokenizer, fact, prompt) for fact in FACTS for prompt in PROMPTS]
    batch = collate(sentences, pad=0)
    for row, said in enumerate(sentences):
        text = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
        assert text.tolist() == said.tokens[:-1]
        assert batch.targets[row][batch.targets[row] != -100].tolist() == said.tokens[-said.answer :]
        subject = batch.inputs["input_ids"][row][batch.subject[row]]
        assert subject.tolist() == [said.tokens[n] for n in said.subject]


def test_recall_is_what_generate_says(taught):
    model, tokenizer, _ = taught
    model.requires_grad_(True)  # a random model cannot pass on what a memory says until it has learned to
    teach(model, tokenizer, FACTS, RowwiseAdamW(model, lr=5e-3, table_lr=0.5), epochs=100, contexts=())
    assert sum(recall(model, tokenizer, FACTS)) >= 3
    for fact in FACTS:
        for prompt, known in zip(PROMPTS, recall(model, tokenizer, [fact]), strict=True):
            said = sentence(tokenizer, fact, prompt)
            given = torch.tensor([said.tokens[: -said.answer]])
            out = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=said.answer, do_sample=False
            )
            assert (out[0, -said.answer :].tolist() == said.tokens[-said.answer :]) == known


def test_focus_of_another_shape_is_refused(taught):
    model, _, memory = taught
    assert mounted(model) == {"memory": memory}
    with focused(model, torch.ones(1, 3, dtype=torch.bool)), pytest.raises(MismatchError, match="focus"):
        model(torch.tensor([[1, 2, 3, 4]]))


@pytest.mark.parametrize(
    "line",
    [
        '{"subject": "a b"}',
        '{"subject": "a b", "prompts": ["x"], "answer": "y"}',
        "[1]",
        "{",
        '{"subject": "", "prompts": ["{}"], "answer": "y"}',
    ],
)
def test_a_line_that_is_no_fact_is_named(tmp_path, line):
    good = json.dumps({"subject": "a b", "prompts": ["{} is"], "answer": "c"})
    (tmp_path / "facts.jsonl").write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3"):
        read_facts(tmp_path / "facts.jsonl")
    (tmp_path / "facts.jsonl").write_text(good + "\n", encoding="utf-8")
    assert read_facts(tmp_path / "facts.jsonl") == [Fact("a b", ("{} is",), "c")]


def test_a_subject_of_one_token_is_refused(taught):
    _, tokenizer, _ = taught
    with pytest.raises(DataError, match="single token"):
        sentence(tokenizer, Fact("x", ("{} is",), "y"), "{} is")
