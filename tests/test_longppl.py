"""LongPPL against a loop that predicts each token from its own context, and refusals of what would mean nothing."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.evaluate.longppl import key_tokens, longppl
from engram_lm.train.run import TrainedModel

WORDS = ["<|endoftext|>", *(f"w{number}" for number in range(1, tiny.VOCABULARY))]


def tokenizer(words=WORDS) -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def reader(config=tiny.ENGRAM, seed=0, words=WORDS) -> TrainedModel:
    model, lookup = tiny.live(config, seed)
    return TrainedModel(tiny.config(config), model, lookup, tokenizer(words), torch.device("cpu"), 0)


def text(length: int, seed: int = 0) -> str:
    return " ".join(WORDS[token] for token in tiny.text(length, seed=seed)[0].clamp(min=1).tolist())


@torch.no_grad()
def loss(reader: TrainedModel, context: list[int], target: int) -> float:
    tokens = torch.tensor([context])
    rows = reader.lookup.rows(tokens)[0] if reader.lookup else None
    hidden, _ = reader.model(tokens, rows)
    return float(F.cross_entropy(reader.model.logits(hidden[:, -1]), torch.tensor([target])))


def naive(evaluated, evaluator, texts, trunc_len, slide, alpha, max_loss) -> tuple[float, float, int]:
    everything, key = [], []
    for document in texts:
        tokens = [0, *evaluated.tokenizer.encode(document).ids]
        for i in range(1, len(tokens)):
            everything.append(loss(evaluated, tokens[:i], tokens[i]))
            if i >= trunc_len:
                start = (i - trunc_len) // slide * slide
                full = loss(evaluator, tokens[:i], tokens[i])
                short = loss(evaluator, tokens[start:i], tokens[i])
                if short - full > alpha and full < max_loss:
                    key.append(everything[-1])
    return math.exp(sum(key) / len(key)), math.exp(sum(everything) / len(everything)), len(key)


@pytest.mark.parametrize(("trunc_len", "slide"), [(8, 3), (5, 5), (10, 40), (1, 1)])
def test_equals_the_naive_loop(trunc_len, slide):
    evaluated, evaluator = reader(seed=1), reader(tiny.BASE, seed=2)
    texts = [text(30, seed=3), text(21, seed=4)]
    expected = naive(evaluated, evaluator, texts, trunc_len, slide, 0.0, 4.5) if slide != 40 else None
    found = longppl(evaluated, evaluator, texts, trunc_len=trunc_len, slide=slide, alpha=0.0, max_loss=4.5)
    assert found["n_candidates"] == 31 + 22 - 2 * trunc_len
    assert found["n_tokens"] == 30 + 21
    if expected is None:  # the one window is the whole text: a short context that lacks nothing has no key tokens
        assert (found["n_key"], found["longppl"]) == (0, None)
    else:
        assert found["n_key"] == expected[2] > 3
        assert found["longppl"] == pytest.approx(expected[0], rel=1e-5)
        assert found["ppl"] == pytest.approx(expected[1], rel=1e-5)


def test_a_model_may_evaluate_itself_and_texts_may_be_cut():
    model = reader(seed=1)
    settings = {"trunc_len": 6, "slide": 2, "alpha": 0.0, "max_loss": 9.0}
    found = longppl(model, model, [text(30)], max_tokens=20, **settings)
    again = longppl(model, reader(seed=1), [text(19)], **settings)
    assert found["n_tokens"] == 19
    assert {**found, "settings": 0} == {**again, "settings": 0}


def test_key_tokens_are_likely_and_much_likelier_in_full():
    full = torch.tensor([0.5, 0.5, 2.5, 1.9, 2.0])
    short = torch.tensor([2.6, 2.4, 9.0, 4.0, 9.0])
    assert key_tokens(full, short, alpha=2.0, max_loss=2.0).tolist() == [True, False, False, True, False]


def test_progress_is_told_of_every_text():
    model, seen = reader(), []
    longppl(model, model, [text(9), text(9), text(9)], trunc_len=4, slide=2, progress=lambda: seen.append(1))
    assert len(seen) == 3


def test_refuses_what_would_mean_nothing():
    model = reader()
    other_words = reader(words=[WORDS[0], *WORDS[:0:-1]])
    with pytest.raises(MismatchError, match="tokenizer"):
        longppl(model, other_words, [text(20)], trunc_len=4, slide=2)
    wider = replace(tiny.BASE, vocab_size=tiny.VOCABULARY + 1)
    with pytest.raises(MismatchError, match="49"):
        longppl(model, reader(wider), [text(20)], trunc_len=4, slide=2)
    with pytest.raises(DataError, match="text 1 has 20 tokens"):
        longppl(model, model, [text(20), text(19)], trunc_len=20, slide=2)
    with pytest.raises(DataError, match="no texts"):
        longppl(model, model, [], trunc_len=4, slide=2)
    with pytest.raises(ConfigError, match="slide 0"):
        longppl(model, model, [text(20)], trunc_len=4, slide=0)
