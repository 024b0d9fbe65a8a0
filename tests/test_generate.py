"""Decoding with state says what one pass over the whole text says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BASE, ENGRAM, EVERYTHING, HASH, VOCABULARY, live, text

from engram_lm.errors import ConfigError, DataError
from engram_lm.generate import START, advance, generate, sample
from engram_lm.memory import EngramConfig
from engram_lm.model import MemoryConfig

CONFIGS = {
    "gqa": BASE,
    "mla": replace(BASE, attention=EVERYTHING.attention),
    "moe": replace(BASE, moe=EVERYTHING.moe),
    "streams": replace(BASE, streams=4),
    "memory": ENGRAM,
    "orders 2, 3, 4": replace(ENGRAM, memory=replace(ENGRAM.memory, hash=replace(HASH, orders=(2, 3, 4)))),
    "order 1": replace(ENGRAM, memory=replace(ENGRAM.memory, hash=replace(HASH, orders=(1,)))),
    "v4.1": replace(ENGRAM, memory=MemoryConfig(HASH, replace(EngramConfig.deepseek_v41(), row_dim=4))),
    "ple": replace(
        ENGRAM, memory=MemoryConfig(replace(HASH, scheme="ple"), EngramConfig(row_dim=4, zero_centered=True))
    ),
    "everything": EVERYTHING,
}
LIVE = {name: live(config) for name, config in CONFIGS.items()}


@pytest.fixture(params=CONFIGS)
def both(request):
    return LIVE[request.param]


@torch.no_grad()
def whole(model, lookup, tokens):
    """The next token's logits [B, V] by one pass over the whole text."""
    rows = lookup.rows(tokens)[0] if lookup else None
    return model.logits(model(tokens, rows)[0])[:, -1]


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_greedy_with_a_cache_is_greedy_without(both):
    prompt = text(7, batch=2)
    tokens, (logits, state) = prompt, advance(*both, prompt)
    for _ in range(20):
        expected = whole(*both, tokens)
        close(logits, expected)
        tokens = torch.cat([tokens, expected.argmax(-1)[:, None]], dim=1)
        logits, state = advance(*both, tokens[:, -1:], state)
    assert torch.equal(generate(*both, prompt, 20), tokens)
    assert len(tokens.unique()) > 3  # a model that repeats itself would prove little


@pytest.mark.parametrize("name", CONFIGS)
@given(st.data())
def test_a_prompt_may_come_in_any_chunks(name, data):
    both = LIVE[name]
    tokens = text(data.draw(st.integers(1, 14)), batch=2, seed=1)
    cuts = sorted(data.draw(st.sets(st.integers(1, 13))))
    state, logits = START, None
    for chunk in tokens.tensor_split(cuts, dim=1):
        if chunk.shape[1]:
            logits, state = advance(*both, chunk, state)
    close(logits, whole(*both, tokens))


def test_an_old_state_rolls_back(both):
    prompt, draft, accepted = text(9, batch=2), text(4, batch=2, seed=1), text(3, batch=2, seed=2)
    _, before = advance(*both, prompt)
    straight, after = advance(*both, accepted, before)
    advance(*both, draft, before)  # rejected
    again, _ = advance(*both, accepted, before)
    assert torch.equal(again, straight)
    close(again, whole(*both, torch.cat([prompt, accepted], dim=1)))
    advance(*both, draft, after)


def test_beams_are_selected(both):
    prompt, more = text(8, batch=3), text(2, batch=4, seed=3)
    _, state = advance(*both, prompt)
    chosen = torch.tensor([2, 0, 0, 1])
    logits, state = advance(*both, more, state.select(chosen))
    beams = torch.cat([prompt[chosen], more], dim=1)
    close(logits, whole(*both, beams))
    step = text(1, batch=4, seed=4)
    close(advance(*both, step, state)[0], whole(*both, torch.cat([beams, step], dim=1)))


def test_nothing_can_be_selected_from_the_start():
    assert START.select(torch.tensor([0])) == START


# --- sampling -----------------------------------------------------------------------------------------------


def test_the_seed_decides_the_sample():
    drawn = [generate(*LIVE["memory"], text(5), 30, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(99)  # nobody else's generator matters
    assert torch.equal(generate(*LIVE["memory"], text(5), 30, temperature=1.0, seed=0), drawn[0])


def test_one_likeliest_token_is_greedy():
    both = LIVE["memory"]
    greedy = generate(*both, text(5), 20)
    assert torch.equal(generate(*both, text(5), 20, temperature=1.0, top_k=1, seed=5), greedy)
    assert torch.equal(generate(*both, text(5), 20, temperature=1e-4, seed=5), greedy)


def test_samples_come_from_the_top_with_their_probabilities():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    found = torch.bincount(sample(logits, 0.5, 3, generator), minlength=4) / 20_000
    expected = (torch.tensor([3.0, 1.0, 2.0, -torch.inf]) / 0.5).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert found[3] == 0
    found = torch.bincount(sample(logits, 1.0, 0, generator), minlength=4) / 20_000
    torch.testing.assert_close(found, logits[0].softmax(-1), rtol=0, atol=0.02)
    assert set(sample(logits, 1.0, 99, generator).tolist()) == {0, 1, 2, 3}


# --- stopping and refusing ----------------------------------------------------------------------------------


def test_generation_stops_at_the_end():
    both, prompt = LIVE["memory"], text(5)
    free = generate(*both, prompt, 20)[0, 5:].tolist()
    end = free[6]
    stopped = generate(*both, prompt, 20, end_id=end)[0, 5:].tolist()
    assert stopped == free[: free.index(end) + 1]


def test_a_batch_stops_when_all_have_ended():
    both, prompts = LIVE["memory"], text(5, batch=3)
    free = generate(*both, prompts, 40)[:, 5:]
    common = set.intersection(*(set(row.tolist()) for row in free))
    assert common, "choose another seed"
    end = min(common)
    stopped = generate(*both, prompts, 40, end_id=end)[:, 5:]
    assert stopped.shape[1] == max(row.tolist().index(end) for row in free) + 1
    assert torch.equal(stopped, free[:, : stopped.shape[1]])


def test_every_new_token_is_handed_over():
    heard = []
    tokens = generate(*LIVE["gqa"], text(4, batch=2), 6, on_token=heard.append)
    assert torch.equal(torch.stack(heard, dim=1), tokens[:, 4:])
    assert torch.equal(generate(*LIVE["gqa"], text(4), 0), text(4))


@pytest.mark.parametrize("name", ["gqa", "memory"])
def test_what_cannot_be_continued_is_refused(name):
    with pytest.raises(DataError, match="the prompt has no tokens"):
        generate(*LIVE[name], text(0), 5)
    for token in (-1, VOCABULARY):
        with pytest.raises(DataError, match=f"run from .*but the model knows {VOCABULARY}"):
            generate(*LIVE[name], torch.tensor([[3, token]]), 5)
    for settings in ({"temperature": -1.0}, {"top_k": -1}):
        with pytest.raises(ConfigError, match="must be at least 0"):
            generate(*LIVE[name], text(3), 5, **settings)
