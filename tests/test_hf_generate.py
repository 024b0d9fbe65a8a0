"""Generation with a memory that matters: whatever carries a text in pieces, the result is that of the text in one piece."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hf_tiny import ENGRAM, KINDS, PLAIN, tiny_batch, tiny_memory, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache, TextStreamer, pipeline

from engram_lm.errors import MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.hf.attach import detach, place, using

TRIGRAMS = HashConfig(orders=(1, 2, 4), heads=2, rows_per_head=97, layers=(0, 3), pad_id=2)
PLE = HashConfig(orders=(2, 3), heads=2, rows_per_head=97, layers=(2,), pad_id=1, scheme="ple")
STEPS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def model_with_memory(kind: str = "llama", config: Any = ENGRAM, **options: Any) -> PreTrainedModel:
    model = tiny_model(kind, **options.pop("changes", {}))
    tiny_memory(model, config, **options)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A llama with a convolution; tests leave it as it is."""
    return model_with_memory()


@torch.no_grad()
def in_one(model: PreTrainedModel, tokens: Tensor, **inputs: Any) -> Tensor:
    """Logits [B, T, V] of a text without a cache."""
    return model(tokens, use_cache=False, **inputs).logits


@torch.no_grad()
def in_pieces(model: PreTrainedModel, pieces: list[Tensor], cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a text in pieces; positions count what the mask shows."""
    parts, start = [], cache.get_seq_length()
    for piece in pieces:
        end = start + piece.shape[1]
        inputs: dict[str, Any] = {}
        if mask is not None:
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, start:end]}
        parts.append(model(piece, past_key_values=cache, **inputs).logits)
        start = end
    return torch.cat(parts, dim=1)


def positions(mask: Tensor) -> Tensor:
    """As `generate` counts them."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def padded(texts: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Texts [T] in one batch, and its mask."""
    length = max(map(len, texts))
    tokens, mask = torch.full((len(texts), length), 2), torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        where = slice(length - len(text), None) if side == "left" else slice(0, len(text))
        tokens[row, where], mask[row, where] = text, 1
    return tokens, mask


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-4, rtol=0)


# --- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ENGRAM, PLAIN], ids=["conv", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_generation_without(kind, config):
    model = model_with_memory(kind, config)
    tokens, mask = padded([tiny_batch(1, n, seed=n)[0] for n in (12, 9, 1)])
    options = {"return_dict_in_generate": True, "output_logits": True, **STEPS}
    cached = model.generate(tokens, attention_mask=mask, **options)
    plain = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    assert close(torch.stack(cached.logits), torch.stack(plain.logits))
    with using(model):
        assert not torch.equal(model.generate(tokens, attention_mask=mask, **STEPS), cached.sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_of_a_padded_batch_is_generated_as_if_alone(kind):
    model = model_with_memory(kind, hash=TRIGRAMS)
    texts = [tiny_batch(1, n, seed=n)[0] for n in (12, 7, 2)]
    tokens, mask = padded(texts)
    together = model.generate(tokens, attention_mask=mask, **STEPS)
    for row, text in enumerate(texts):
        alone = model.generate(text[None], attention_mask=torch.ones(1, len(text)), **STEPS)
        assert torch.equal(together[row, tokens.shape[1] :], alone[0, len(text) :])


@pytest.mark.parametrize("scheme", ["engram", "ple", "capacity_1"])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_every_way_to_generate_equals_itself_without_a_cache(how, scheme):
    model = model_with_memory(hash=HashConfig(**{**vars(PLE), "scheme": scheme}))
    tokens, mask = padded([tiny_batch(1, n, seed=n)[0] for n in (13, 8)])
    plain = {key: how[key] for key in how if key not in ("prefill_chunk_size", "cache_implementation")}
    found = []
    for options in how, {**plain, "use_cache": False}:
        torch.manual_seed(0)
        found.append(model.generate(tokens, attention_mask=mask, **{**STEPS, **options}))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_neox"])
def test_static_caches_know_padding_by_their_masks(kind):
    """`generate` gives the model masks of four dimensions then, of which those in sliding windows move along."""
    model = model_with_memory(kind)
    tokens, mask = padded([tiny_batch(1, n, seed=n)[0] for n in (9, 4)])
    static = model.generate(tokens, attention_mask=mask, cache_implementation="static", **STEPS)
    assert torch.equal(static, model.generate(tokens, attention_mask=mask, use_cache=False, **STEPS))


def test_a_static_cache_may_be_reset_and_used_again(model):
    cache = StaticCache(model.config, max_cache_len=32)
    first, second = tiny_batch(1, 6, seed=1), tiny_batch(1, 9, seed=2)
    with torch.no_grad():
        model(first, past_key_values=cache)
        cache.reset()
        assert close(model(second, past_key_values=cache).logits, in_one(model, second))


def test_a_quantised_cache_takes_the_past_along():
    """Its keys are approximate, so only the memory is: rows and convolutions, seen through a model without attention."""
    model = model_with_memory()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    tokens = tiny_batch(2, 9)
    beams = {**STEPS, "num_beams": 3}
    assert torch.equal(model.generate(tokens, **options, **beams), model.generate(tokens, use_cache=False, **beams))


@pytest.mark.parametrize("assistant", ["with", "without", "itself", "lookup"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_speculative_decoding_equals_plain_decoding(kind, assistant):
    model = model_with_memory(kind)
    draft = tiny_model(kind, seed=0 if assistant == "with" else 1)
    if assistant == "with":  # nearly the same model: some drafts are accepted, others rolled back
        tiny_memory(draft)
        with torch.no_grad():
            draft.get_input_embeddings().weight.add_(0.003 * torch.randn(400, 32))
    tokens = tiny_batch(1, 10).repeat(1, 2)
    options = {**STEPS, "max_new_tokens": 16}
    how = {"prompt_lookup_num_tokens": 3} if assistant == "lookup" else {"assistant_model": draft}
    if assistant == "itself":
        how = {"assistant_model": model}
    expected = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **how, **options), expected)


def test_a_cache_after_speculative_decoding_goes_on(model):
    tokens = tiny_batch(1, 8)
    first = model.generate(tokens, prompt_lookup_num_tokens=4, return_dict_in_generate=True, **STEPS)
    asked = torch.cat([first.sequences, tiny_batch(1, 5, seed=3)], dim=1)
    second = model.generate(asked, past_key_values=first.past_key_values, **STEPS)
    assert torch.equal(second, model.generate(asked, use_cache=False, **STEPS))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_conversation_goes_on_from_its_cache(kind):
    model = model_with_memory(kind)
    text, cache = tiny_batch(1, 7), DynamicCache(config=model.config)
    for turn in range(3):
        text = torch.cat([text, tiny_batch(1, 4, seed=turn)], dim=1)
        answer = model.generate(text, past_key_values=cache, **STEPS)
        assert torch.equal(answer, model.generate(text, use_cache=False, **STEPS))
        text = answer


def test_a_batch_of_conversations_goes_on_though_padding_lies_inside(model):
    """One answer ended early and was padded: its next turn follows what it said, not the padding."""
    texts = [tiny_batch(1, n, seed=n)[0] for n in (9, 6)]
    tokens, mask = padded(texts)
    said = torch.cat([tokens, tiny_batch(2, 5, seed=7)], dim=1)
    said[1, -2:] = 2
    seen = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], dim=1)
    seen[1, -2:] = 0
    cache, asked = DynamicCache(), tiny_batch(2, 4, seed=8)
    in_pieces(model, [said], cache, seen)
    everything = torch.cat([said, asked], dim=1)
    seen = torch.cat([seen, torch.ones(2, 4, dtype=torch.int64)], dim=1)
    answer = model.generate(everything, attention_mask=seen, past_key_values=cache, **STEPS)[:, everything.shape[1] :]
    for row in range(2):
        alone = everything[row, seen[row].bool()][None]
        assert torch.equal(answer[row], model.generate(alone, use_cache=False, **STEPS)[0, alone.shape[1] :])


# --- chunks and caches by hand ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_any_pieces_of_any_padded_batch_equal_each_text_in_one(data):
    """Padding on the left, on the right and inside; pieces of any length; a cache that is copied on the way."""
    model = _NO_CONV if data.draw(st.booleans()) else _LLAMA
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    tokens = tiny_batch(batch, length, seed=data.draw(st.integers(0, 99)))
    mask = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.sampled_from([0, 1, 1, 1]), min_size=length, max_size=length),
                min_size=batch,
                max_size=batch,
            )
        )
    )
    mask[:, -1] = 1
    ends = sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) | {length})
    cache, found, start = DynamicCache(), [], 0
    for end in ends:
        found.append(in_pieces(model, [tokens[:, start:end]], cache, mask))
        cache, start = copy.deepcopy(cache), end
    logits = torch.cat(found, dim=1)
    for row in range(batch):
        text = mask[row].bool()
        assert close(logits[row, text], in_one(model, tokens[row, text][None])[0])


_LLAMA, _NO_CONV = model_with_memory(hash=TRIGRAMS), model_with_memory(config=PLAIN, hash=PLE)


@settings(max_examples=25)
@given(length=st.integers(2, 20), cut=st.integers(1, 19), taken=st.integers(1, 19), seed=st.integers(0, 9))
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(length, cut, taken, seed):
    cut = min(cut, length - 1)
    taken = min(taken, length - cut)
    tokens, other = tiny_batch(2, length, seed), tiny_batch(2, 6, seed + 1)
    cache = DynamicCache()
    in_pieces(_LLAMA, [tokens[:, :cut], tokens[:, cut:]], cache)
    cache.crop(-taken)
    text = torch.cat([tokens[:, : length - taken], other], dim=1)
    assert close(in_pieces(_LLAMA, [other], cache), in_one(_LLAMA, text)[:, -6:])


@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
@settings(max_examples=10)
@given(rows=st.lists(st.integers(0, 2), min_size=2, max_size=5))
def test_sequences_of_a_cache_may_be_picked_and_repeated(how, rows):
    tokens, cache = tiny_batch(3, 9), DynamicCache()
    in_pieces(_LLAMA, [tokens], cache)
    if how == "repeat":
        cache.batch_repeat_interleave(len(rows))
        tokens = tokens.repeat_interleave(len(rows), 0)
    else:
        picked = torch.tensor(rows)
        (cache.reorder_cache if how == "reorder" else cache.batch_select_indices)(picked)
        tokens = tokens[picked]
    more = tiny_batch(len(tokens), 4, seed=5)
    assert close(in_pieces(_LLAMA, [more], cache), in_one(_LLAMA, torch.cat([tokens, more], dim=1))[:, -4:])


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_prefix_is_read_once_for_two_continuations(model, again):
    prefix, cache = tiny_batch(1, 9), DynamicCache()
    in_pieces(model, [prefix], cache)
    twin = again(cache)
    for seed, one in (1, cache), (2, twin):
        more = tiny_batch(1, 5, seed)
        assert isinstance(one, DynamicCache)
        assert close(in_pieces(model, [more], one), in_one(model, torch.cat([prefix, more], dim=1))[:, -5:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_given_follows_even_when_none_is_returned(kind):
    model, text, cache = model_with_memory(kind), tiny_batch(1, 9), DynamicCache()
    with torch.no_grad():
        model(text[:, :5], past_key_values=cache, use_cache=False)
        tail = model(text[:, 5:], past_key_values=cache, use_cache=False).logits
    assert close(tail, in_one(model, text)[:, 5:])


# --- caches that do not fit -------------------------------------------------------------------------------------------


def test_a_cache_filled_without_the_memory_is_refused(model):
    tokens, cache = tiny_batch(1, 6), DynamicCache()
    with using(model):
        in_pieces(model, [tokens], cache)
    with pytest.raises(MismatchError, match="filled with the memories none on, now memory are"):
        in_pieces(model, [tokens], cache)
    bare = tiny_model()
    cache = DynamicCache()
    in_pieces(bare, [tokens], cache)
    with pytest.raises(MismatchError, match="holds 6 positions, but the memory followed 0"):
        in_pieces(model, [tokens], cache)


def test_what_a_cache_held_before_a_reset_does_not_count(model):
    cache = DynamicCache()
    in_pieces(model, [tiny_batch(1, 6)], cache)
    cache.reset()
    in_pieces(tiny_model(), [tiny_batch(1, 6)], cache)
    with pytest.raises(MismatchError, match="followed 0"):
        in_pieces(model, [tiny_batch(1, 6)], cache)


def test_a_cache_of_another_batch_is_refused(model):
    cache = DynamicCache()
    in_pieces(model, [tiny_batch(1, 6)], cache)
    with pytest.raises(MismatchError, match="holds 1 sequences and 2 are to go on"):
        in_pieces(model, [tiny_batch(2, 6)], cache)


def test_a_cache_that_went_on_elsewhere_is_refused():
    model = model_with_memory()
    cache = DynamicCache()
    in_pieces(model, [tiny_batch(1, 6)], cache)
    (memory,) = detach(model)
    in_pieces(model, [tiny_batch(1, 3)], cache)
    place(model, memory)
    with pytest.raises(MismatchError, match="holds 9 positions, but the memory followed 6"):
        in_pieces(model, [tiny_batch(1, 3)], cache)


def test_documents_inside_a_continuation_are_refused(model):
    cache = DynamicCache()
    in_pieces(model, [tiny_batch(1, 6)], cache)
    with pytest.raises(MismatchError, match="documents begin inside a text that continues a cache"):
        model(tiny_batch(1, 4), past_key_values=cache, position_ids=torch.tensor([[6, 7, 0, 1]]))


# --- around generate --------------------------------------------------------------------------------------------------


def test_pipelines_and_streamers_generate_the_same(model, capsys):
    tokenizer, texts = tiny_tokenizer(), ["The capital of Peru is", "Alice", "She sells sea shells by the"]
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    together = run(texts, batch_size=3, return_full_text=False, **STEPS)
    for text, (found,) in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        new = model.generate(ids, use_cache=False, **STEPS)[0, ids.shape[1] :]
        assert found["generated_text"] == tokenizer.decode(new)
    model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **STEPS)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(new).rstrip("\n")
