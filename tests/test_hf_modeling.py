"""Our models as models of transformers: saved and loaded bit for bit, generated from exactly, trained as any other."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import BASE, ENGRAM, EVERYTHING, HASH, VOCABULARY, config, finish, live, text, write_texts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging

from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError
from engram_lm.generate import generate
from engram_lm.hf.cache import EngramCache
from engram_lm.hf.modeling import EngramLMConfig, EngramLMForCausalLM, export_run
from engram_lm.memory import EngramConfig
from engram_lm.model import LanguageModel, MemoryConfig
from engram_lm.model.lm import padding_mask
from engram_lm.model.lookup import Lookup
from engram_lm.tables import DeviceTable, DiskTable, HostTable, TableConfig
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train import run as runs
from engram_lm.train.loader import Loader
from engram_lm.train.loop import Training
from engram_lm.train.tokenizer import separator_id

logging.disable_progress_bar()
CONFIGS = {
    "base": BASE,
    "gqa": ENGRAM,
    "mla, streams, experts": replace(EVERYTHING, streams=2),
    "v4.1": replace(
        ENGRAM,
        streams=2,
        attention=EVERYTHING.attention,
        memory=MemoryConfig(HASH, replace(EngramConfig.deepseek_v41(), row_dim=4)),
    ),
    "ple": replace(
        ENGRAM,
        tie_embeddings=True,
        memory=MemoryConfig(replace(HASH, scheme="ple"), EngramConfig(row_dim=4, zero_centered=True)),
    ),
}
MEMORIES = [name for name in CONFIGS if name != "base"]


def wrapped(name, seed=0):
    """A live model as transformers sees it."""
    core, lookup = live(CONFIGS[name], seed)
    model = EngramLMForCausalLM(EngramLMConfig.of(CONFIGS[name], TableConfig()), lookup)
    model.model = core
    return model.eval()


LIVE = {name: wrapped(name) for name in CONFIGS}
EAGER = GenerationConfig(do_sample=False)


@pytest.fixture(params=CONFIGS)
def model(request):
    return LIVE[request.param]


@torch.no_grad()
def whole(model, tokens):
    """Logits [B, T, V] by one pass of the model itself over the whole text."""
    rows = model.lookup.rows(tokens)[0] if model.lookup else None
    return model.model.logits(model.model(tokens, rows)[0])


def greedy(model, tokens, count):
    """Continue by the likeliest token, reading the whole text each time."""
    for _ in range(count):
        tokens = torch.cat([tokens, whole(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def left_padded(texts):
    """Texts of different lengths as one batch: tokens and attention mask [B, T]; what lies under padding is arbitrary."""
    longest = max(len(tokens) for tokens in texts)
    filler = text(longest, seed=99)[0]
    rows = [torch.cat([filler[: longest - len(tokens)], tokens]) for tokens in texts]
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in texts])
    return torch.stack(rows), mask


texts = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(
    lambda lengths: [text(length, seed=number + 7 * length)[0] for number, length in enumerate(lengths)]
)


# --- forward --------------------------------------------------------------------------------------------------------


def test_a_forward_is_the_models_own(model):
    tokens = text(11, batch=2)
    with torch.no_grad():
        found = model(tokens)
        assert torch.equal(model(tokens, use_cache=False).logits, whole(model, tokens))
        assert model(tokens, use_cache=False).past_key_values is None
    close(found.logits, whole(model, tokens))
    assert found.past_key_values.get_seq_length() == 11


def test_labels_are_shifted_and_ignored(model):
    tokens, labels = text(9, batch=2), text(9, batch=2)
    labels[0, :4] = labels[1, 6] = -100
    found = model(tokens, labels=labels, use_cache=False)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    rows = model.lookup.rows(tokens)[0] if model.lookup else None
    with torch.no_grad():
        close(found.loss.detach(), model.model.loss(tokens, targets, rows))
        total = model.model.loss(tokens, targets, rows, reduction="none").sum()
        close(model(tokens, labels=labels, num_items_in_batch=torch.tensor(50)).loss, total / 50)


def test_logits_of_some_positions():
    model, tokens = LIVE["gqa"], text(9, batch=2)
    expected = whole(model, tokens)
    with torch.no_grad():
        for kept, positions in ((1, [8]), (3, [6, 7, 8]), (torch.tensor([0, 4]), [0, 4])):
            close(model(tokens, logits_to_keep=kept).logits, expected[:, positions])


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(texts, st.data())
def test_padding_and_chunks_change_nothing(name, texts, data):
    model = LIVE[name]
    tokens, mask = left_padded(texts)
    cuts = sorted(data.draw(st.sets(st.integers(1, 8))))
    cache, found, done = EngramCache(), [], 0
    for chunk in tokens.tensor_split(cuts, dim=1):
        if chunk.shape[1]:
            done += chunk.shape[1]
            with torch.no_grad():
                found.append(model(chunk, attention_mask=mask[:, :done], past_key_values=cache).logits)
    found = torch.cat(found, dim=1)
    with torch.no_grad():
        close(model(tokens, attention_mask=mask, use_cache=False).logits[mask == 1], found[mask == 1])
    for sequence, logits in zip(texts, found, strict=True):
        close(logits[-len(sequence) :], whole(model, sequence[None])[0])


def test_padding_on_the_right_changes_nothing(model):
    tokens = text(9, batch=2)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    with torch.no_grad():
        found = model(tokens, attention_mask=mask).logits
    close(found[0, :5], whole(model, tokens[:1, :5])[0])
    close(found[1], whole(model, tokens[1:])[0])


def test_packed_documents_do_not_see_each_other(model):
    documents = [text(length, seed=length) for length in (4, 1, 6)]
    positions = torch.cat([torch.arange(tokens.shape[1]) for tokens in documents])[None]
    with torch.no_grad():
        found = model(torch.cat(documents, dim=1), position_ids=positions).logits
        padded = model(
            torch.cat([text(2, seed=9), *documents, text(3, seed=8)], dim=1),
            attention_mask=torch.tensor([[0] * 2 + [1] * 11 + [0] * 3]),
            position_ids=torch.nn.functional.pad(positions, (2, 3)),
        ).logits[:, 2:-3]
    for one, other, tokens in zip(*(x.split([4, 1, 6], dim=1) for x in (found, padded)), documents, strict=True):
        close(one, whole(model, tokens))
        close(other, whole(model, tokens))
    with pytest.raises(MismatchError, match="segments were given together with a state"):
        model(torch.cat(documents, dim=1), position_ids=positions, use_cache=True)


def test_a_mask_that_does_not_fit_is_refused():
    model, tokens = LIVE["gqa"], text(6, batch=2)
    with pytest.raises(MismatchError, match=r"attention_mask is \[2, 5\].*0 positions in the cache and 6 new"):
        model(tokens, attention_mask=torch.ones(2, 5))
    _, mask = left_padded([text(6)[0], text(3)[0]])
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask).past_key_values
        step = torch.ones(2, 1, dtype=torch.int64)
        with pytest.raises(MismatchError, match="hides other positions"):
            model(tokens[:, :1], attention_mask=torch.cat([1 - mask, step], 1), past_key_values=cache)
        with pytest.raises(MismatchError, match="hides other positions"):
            model(tokens[:, :1], attention_mask=torch.ones(2, 7), past_key_values=cache)
        expected = model(tokens[:, :1], attention_mask=torch.cat([mask, step], 1), past_key_values=copy.deepcopy(cache))
        assert torch.equal(model(tokens[:, :1], past_key_values=cache).logits, expected.logits)  # the cache knows it


def test_what_cannot_be_done_is_refused():
    model, tokens = LIVE["gqa"], text(5)
    with pytest.raises(ConfigError, match="addressed by tokens"):
        model(inputs_embeds=torch.zeros(1, 5, 16))
    with pytest.raises(ConfigError, match="DynamicCache, which holds keys and values alone"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="does not know output_attentions, token_type_ids"):
        model(tokens, output_attentions=True, token_type_ids=tokens, output_hidden_states=False)
    with pytest.raises(ConfigError, match="cannot be resized from 48 to 50"):
        model.resize_token_embeddings(50)
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    with pytest.raises(DataError, match="token ids run from"):
        model(tokens + VOCABULARY)
    with pytest.raises(MismatchError, match="has a memory but no table"):
        EngramLMForCausalLM(model.config)(tokens)


def test_tuples_on_request():
    model, tokens = LIVE["gqa"], text(5)
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(logits, model(tokens, labels=tokens).logits)
    assert loss.shape == ()


def test_padding_has_the_shape_of_the_tokens():
    core, tokens = LIVE["base"].model, text(5, batch=2)
    with pytest.raises(MismatchError, match=r"padding is \[2, 4\], but the tokens are \[2, 5\]"):
        core(tokens, padding=torch.zeros(2, 4, dtype=torch.bool))
    nowhere = padding_mask(torch.ones(2, 5, dtype=torch.bool), 3)
    assert torch.equal(nowhere[0, 0], torch.eye(5, dtype=torch.bool)[2:])  # no softmax is over nothing
    _, state = core(tokens, with_state=True)
    assert state.crop(5).position == 5
    for position in (-1, 6):
        with pytest.raises(ValueError, match=f"a state of 5 positions cannot be cropped to {position}"):
            state.crop(position)


def test_a_new_model_has_the_initial_weights():
    fresh = EngramLMForCausalLM(EngramLMConfig.of(CONFIGS["mla, streams, experts"])).model.state_dict()
    for name, value in LanguageModel.build(CONFIGS["mla, streams, experts"]).state_dict().items():
        assert torch.equal(fresh[name], value), name


# --- generate -------------------------------------------------------------------------------------------------------


def test_greedy_is_greedy(model):
    prompt = text(6, batch=2)
    expected = greedy(model, prompt, 12)
    assert torch.equal(model.generate(prompt, EAGER, max_new_tokens=12), expected)
    assert torch.equal(model.generate(prompt, EAGER, max_new_tokens=12, use_cache=False), expected)
    for chunk in (1, 4, 6, 7):
        found = model.generate(prompt, EAGER, max_new_tokens=12, prefill_chunk_size=chunk)
        assert torch.equal(found, expected), chunk
    assert len(expected.unique()) > 3


def test_logits_of_every_step(model):
    prompt = text(6, batch=2)
    found = model.generate(prompt, EAGER, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    close(torch.stack(found.logits, dim=1), whole(model, found.sequences[:, :-1])[:, 5:])


def test_the_seed_decides_the_sample(model):
    prompt = text(6, batch=2)
    settings = {"do_sample": True, "max_new_tokens": 12, "top_k": 0}
    drawn = []
    for seed, use_cache in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, use_cache=use_cache, **settings))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_beams(model):
    tokens, mask = left_padded([text(6)[0], text(3, seed=2)[0]])
    found = [
        model.generate(
            tokens,
            EAGER,
            attention_mask=mask,
            num_beams=3,
            num_return_sequences=2,
            max_new_tokens=8,
            use_cache=cached,
        )
        for cached in (True, False)
    ]
    assert torch.equal(*found)
    alone = model.generate(tokens[1:, 3:], EAGER, num_beams=3, num_return_sequences=2, max_new_tokens=8)
    assert torch.equal(found[0][2:, 6:], alone[:, 3:])


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(texts, st.none() | st.integers(1, 5))
def test_a_padded_batch_is_its_texts_alone(name, texts, chunk):
    model = LIVE[name]
    tokens, mask = left_padded(texts)
    found = model.generate(tokens, EAGER, attention_mask=mask, max_new_tokens=6, prefill_chunk_size=chunk)
    for sequence, row in zip(texts, found, strict=True):
        assert torch.equal(row[-6 - len(sequence) :], greedy(model, sequence[None], 6)[0])


def test_a_conversation_goes_on_with_its_cache(model):
    tokens, mask = left_padded([text(6)[0], text(3, seed=2)[0]])
    cache = EngramCache()
    said = []
    for turn in range(3):
        found = model.generate(tokens, EAGER, attention_mask=mask, past_key_values=cache, max_new_tokens=4)
        again = model.generate(tokens, EAGER, attention_mask=mask, max_new_tokens=4)
        assert torch.equal(found, again)
        assert cache.get_seq_length() == found.shape[1] - 1
        said.append(found[:, -4:])
        tokens = torch.cat([found, text(2, batch=2, seed=turn)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], dim=1)
    assert len(torch.cat(said).unique()) > 3


def test_a_returned_cache_goes_on(model):
    prompt, more = text(6), text(3, seed=5)
    first = model.generate(prompt, EAGER, max_new_tokens=4, return_dict_in_generate=True)
    tokens = torch.cat([first.sequences, more], dim=1)
    second = model.generate(tokens, EAGER, max_new_tokens=4, past_key_values=first.past_key_values)
    assert torch.equal(second, greedy(model, tokens, 4))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("target", "assistant"), [("gqa", "v4.1"), ("mla, streams, experts", "gqa"), ("v4.1", "ple")])
def test_drafts_change_nothing(target, assistant, sampled, monkeypatch):
    model, helper, prompt = LIVE[target], LIVE[assistant], text(6)
    cropped = []
    crop = EngramCache.crop
    monkeypatch.setattr(EngramCache, "crop", lambda cache, count: (cropped.append(count), crop(cache, count))[1])
    helper.generation_config.num_assistant_tokens = 4
    if not sampled:
        found = model.generate(prompt, EAGER, max_new_tokens=16, assistant_model=helper)
        assert torch.equal(found, greedy(model, prompt, 16))
    else:  # its own distribution, so only the state can be checked
        cache = EngramCache()
        torch.manual_seed(0)
        found = model.generate(prompt, do_sample=True, max_new_tokens=16, assistant_model=helper, past_key_values=cache)
        kept = cache.get_seq_length()
        with torch.no_grad():
            close(model(found[:, kept:], past_key_values=cache).logits, whole(model, found)[:, kept:])
    assert min(cropped) < 0  # drafts were rejected


def test_drafts_from_the_prompt(model):
    prompt = text(5).repeat(1, 4)
    found = model.generate(prompt, EAGER, max_new_tokens=12, prompt_lookup_num_tokens=4)
    assert torch.equal(found, greedy(model, prompt, 12))


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_caches_are_refused(kind):
    with pytest.raises(ConfigError, match=f"cache_implementation '{kind}' holds keys and values alone"):
        LIVE["gqa"].generate(text(4), EAGER, max_new_tokens=2, cache_implementation=kind)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@given(st.data())
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
def test_a_cache_can_be_altered_in_every_way(name, data):
    model = LIVE[name]
    tokens, mask = left_padded([text(8)[0], text(5, seed=2)[0], text(8, seed=3)[0]])
    if data.draw(st.booleans()):
        mask = torch.ones_like(mask)
    cache = model(tokens, attention_mask=mask).past_key_values
    kept = copy.deepcopy(cache)
    for _ in range(data.draw(st.integers(1, 4))):
        way = data.draw(st.sampled_from(["crop", "select", "reorder", "repeat", "read"]))
        if way == "crop":
            count = data.draw(st.integers(0, cache.get_seq_length()))
            cache.crop(-count)
            tokens, mask = tokens[:, : tokens.shape[1] - count], mask[:, : mask.shape[1] - count]
        elif way == "repeat":
            cache.batch_repeat_interleave(2)
            tokens, mask = tokens.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
        elif way == "read":
            step = text(2, batch=len(tokens), seed=4)
            tokens, mask = torch.cat([tokens, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
            model(step, attention_mask=mask, past_key_values=cache)
        else:
            chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=4)))
            (cache.batch_select_indices if way == "select" else cache.reorder_cache)(chosen)
            tokens, mask = tokens[chosen], mask[chosen]
    assert (cache.get_seq_length(), cache.batch_size) == (tokens.shape[1], len(tokens))
    step = text(3, batch=len(tokens), seed=5)
    full, seen = torch.cat([tokens, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
    expected = model(full, attention_mask=seen, use_cache=False).logits[:, -3:]
    close(model(step, attention_mask=seen, past_key_values=cache).logits, expected)
    assert kept.get_seq_length() == 8  # a copy is a copy


def test_the_caches_edges():
    cache = EngramCache()
    cache.crop(0)
    cache.batch_repeat_interleave(3)
    assert (cache.get_seq_length(), len(cache), cache.batch_size, cache.is_initialized) == (0, 0, -1, False)
    assert not cache.is_compileable
    assert cache.is_croppable
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.crop(-1)
    LIVE["gqa"](text(4), past_key_values=cache)
    assert (len(cache), cache.batch_size, cache.is_initialized) == (2, 1, True)
    for count in (-5, 1):
        with pytest.raises(ValueError, match="crop"):
            cache.crop(count)
    with pytest.raises(TypeError, match="other models cannot use it"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert repr(cache) == "EngramCache(0 positions)"


# --- directories ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def same(one, other):
    """Logits and rows are equal bit for bit."""
    tokens = text(12, batch=2)
    assert torch.equal(one(tokens).logits, other(tokens).logits)
    if one.lookup:
        everything = torch.arange(one.lookup.table.num_rows)
        assert torch.equal(one.lookup.table.fetch(everything), other.lookup.table.fetch(everything))


@pytest.fixture
def saved(tmp_path):
    LIVE["gqa"].save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_saving_and_loading_is_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is EngramLMForCausalLM
    assert not loaded.training
    same(model, loaded)
    assert loaded.config.core == model.config.core
    assert torch.equal(loaded.generate(text(4), EAGER, max_new_tokens=5), greedy(model, text(4), 5))
    assert loaded.num_parameters() == sum(parameter.numel() for parameter in model.model.parameters())


@pytest.mark.parametrize("tier", ["auto", "device", "host", "disk"])
def test_the_table_goes_to_any_tier(saved, tier):
    before = (saved / "table.safetensors").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(saved, table=TableConfig(tier=tier, memory=1e-5))
    table = loaded.lookup.table
    assert type(table) is {"device": DeviceTable, "disk": DiskTable}.get(tier, HostTable)
    same(LIVE["gqa"], loaded)
    if tier == "disk":
        tokens = text(5)
        loaded(tokens, labels=tokens).loss.backward()
        with pytest.raises(ConfigError, match="opened for reading"):
            loaded.rows.step(0.1)
        table.close()
    assert (saved / "table.safetensors").read_bytes() == before
    assert len(list(saved.glob("table*"))) == 1


def test_large_weights_are_sharded(tmp_path):
    LIVE["gqa"].save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same(LIVE["gqa"], EngramLMForCausalLM.from_pretrained(tmp_path))
    LIVE["gqa"].save_pretrained(tmp_path)  # over it
    assert not list(tmp_path.glob("model-*.safetensors"))
    same(LIVE["gqa"], EngramLMForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_trained_rows_are_saved_with_accumulators_and_clock(tmp_path, encoding):
    torch.manual_seed(0)
    config = TableConfig(encoding=encoding, std=0.1, seed=3)
    built = []
    for tier in ("host", "disk"):
        _, lookup = live(ENGRAM)
        (tmp_path / tier).mkdir()
        placed = replace(config, tier=tier)
        table = runs.build_table(placed, lookup.plan.num_rows, 4, digest=lookup.digest, directory=tmp_path / tier)
        model = EngramLMForCausalLM(EngramLMConfig.of(ENGRAM, placed), Lookup(lookup.vocabulary, lookup.plan, table))
        model.model = live(ENGRAM)[0]
        built.append(model.eval())
    for step in range(3):
        for model in built:
            tokens = text(8, seed=step)
            model(tokens, labels=tokens).loss.backward()
            model.rows.step(0.1)
            if step == 1:
                model.save_pretrained(tmp_path / "saved")
                model = EngramLMForCausalLM.from_pretrained(tmp_path / "saved")
                assert model.lookup.table.clock == 2
    loaded = EngramLMForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = text(8, seed=2)
    loaded(tokens, labels=tokens).loss.backward()
    loaded.rows.step(0.1)
    for model in built:
        same(model, loaded)
    with pytest.raises(CheckpointError, match="in use by"):
        built[1].save_pretrained(tmp_path / "disk")
    built[1].lookup.table.close()


def test_a_model_read_in_place_can_be_saved_over_itself(saved):
    loaded = EngramLMForCausalLM.from_pretrained(saved, table=TableConfig(tier="disk"))
    loaded.save_pretrained(saved)
    same(LIVE["gqa"], loaded)
    same(LIVE["gqa"], EngramLMForCausalLM.from_pretrained(saved))
    loaded.lookup.table.close()


def test_what_is_missing_is_an_error(saved):
    for name in ("table.safetensors", "vocabulary.safetensors"):
        (saved / name).rename(saved / "elsewhere")
        with pytest.raises(CheckpointError, match=f"holds no {name}, so the memory would have been empty"):
            EngramLMForCausalLM.from_pretrained(saved)
        (saved / "elsewhere").rename(saved / name)
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "model.norm.weight"}, saved / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        CheckpointError, match=r"missing keys among the weights, 1 in all, the first model\.norm\.weight"
    ):
        EngramLMForCausalLM.from_pretrained(saved)
    save_file({**weights, "model.extra": torch.zeros(1)}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected keys among the weights.*model\.extra"):
        EngramLMForCausalLM.from_pretrained(saved)


def test_what_does_not_belong_together_is_refused(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    other = live(replace(ENGRAM, memory=replace(ENGRAM.memory, hash=replace(HASH, seed=1))))[1]
    model = LIVE["gqa"]
    with pytest.raises(MismatchError, match="every row would be read from the wrong place"):
        EngramLMForCausalLM(model.config, other)
    with pytest.raises(MismatchError, match="a table was given to a model without a memory"):
        EngramLMForCausalLM(LIVE["base"].config, other)
    with pytest.raises(MismatchError, match="the model was made for"):
        EngramLMForCausalLM(EngramLMConfig.of(ENGRAM, TableConfig(encoding="bf16")), model.lookup)
    with pytest.raises(ConfigError, match=r"table\.encoding = 'int8', but .* holds rows of encoding 'fp32'"):
        EngramLMForCausalLM.from_pretrained(saved, table=TableConfig(encoding="int8"))

    vocabulary = load_file(saved / "vocabulary.safetensors")["canonical"]
    swapped = vocabulary.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    save_file({"canonical": swapped}, saved / "vocabulary.safetensors")
    for tier in ("host", "disk"):
        with pytest.raises(MismatchError, match="wrong place"):
            EngramLMForCausalLM.from_pretrained(saved, table=TableConfig(tier=tier))
    changed = EngramLMForCausalLM(
        EngramLMConfig.of(ENGRAM),
        Lookup(
            CanonicalVocabulary(swapped),
            model.lookup.plan,
            DeviceTable(model.lookup.plan.num_rows, model.lookup.table.form),
        ),
    )
    changed.save_pretrained(tmp_path / "changed")  # its table belongs to its vocabulary, but not to these weights
    shutil.copy(tmp_path / "changed" / "table.safetensors", saved)
    with pytest.raises(MismatchError, match="wrong place"):
        EngramLMForCausalLM.from_pretrained(saved)


def test_configurations_are_strict(saved):
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is EngramLMConfig
    assert config.core == ENGRAM
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCABULARY, 16, 2)
    for name, core in CONFIGS.items():
        assert EngramLMConfig.of(core).core == core, name
        assert EngramLMConfig(**EngramLMConfig.of(core).to_dict()).core == core, name
    data = json.loads((saved / "config.json").read_text())
    for change, message in (
        ({"model": {**data["model"], "layrs": 3}}, "unknown key 'layrs'"),
        ({"model": {**data["model"], "dim": "16"}}, r"config\.model\.dim: expected int"),
        ({"rows": {"encoding": "fp4"}}, "'fp4' is not one of"),
    ):
        (saved / "config.json").write_text(json.dumps(data | change))
        with pytest.raises(ConfigError, match=message):
            AutoConfig.from_pretrained(saved)


def test_uploading_without_the_table_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="before the table is saved"):
        LIVE["gqa"].save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("name", ["gqa", "mla, streams, experts", "v4.1"])
def test_loading_in_bf16(name, tmp_path):
    LIVE[name].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    tokens, mask = left_padded([text(8)[0], text(5, seed=2)[0]])
    with torch.no_grad():
        logits = loaded(tokens, attention_mask=mask).logits
        expected = LIVE[name](tokens, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected)[mask == 1].abs().max() < 0.1 * expected.abs().max()
    assert loaded.generate(tokens, EAGER, attention_mask=mask, max_new_tokens=3).shape == (2, 11)
    loaded(tokens, labels=tokens).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in loaded.parameters() if p.grad is not None)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(saved, device_map):
    same(LIVE["gqa"], AutoModelForCausalLM.from_pretrained(saved, device_map=device_map))


# --- training -------------------------------------------------------------------------------------------------------


def gradients(model, tokens, mask=None):
    """Of the loss, by parameters and distinct rows."""
    model.zero_grad()
    model(tokens, labels=tokens, attention_mask=mask).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if model.rows:
        found["rows"] = torch.cat([leaf.grad for leaf in model.rows.leaves])
        model.rows.zero_grad()
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_blocks_have_the_same_gradients(name, every):
    model, tokens = wrapped(name).train(), text(10, batch=2)
    expected = gradients(model, tokens)
    calls = []
    model.activation_checkpointing_enable(every_n_layers=every)
    assert model.is_activation_checkpointing
    for block in model.model.blocks:
        block.ffn_norm.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, tokens)
    assert len(calls) == (4 if every == 1 else 3)  # of two blocks, those that are checkpointed run twice
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-6)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    calls.clear()
    gradients(model, tokens)
    assert len(calls) == 2


def test_gradients_are_those_of_our_own_loop(model):
    tokens = text(10, batch=2)
    found = gradients(model, tokens)
    leaf = model.lookup.leaf(tokens) if model.lookup else None
    model.model.zero_grad()
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    model.model.loss(tokens, targets, leaf.expand(0, 2) if leaf else None).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)
    if leaf:
        torch.testing.assert_close(found["rows"], leaf.rows.grad, rtol=1e-5, atol=1e-7)
    model.zero_grad()


def test_padding_gets_no_gradient(model):
    tokens, mask = left_padded([text(9)[0], text(4, seed=2)[0]])
    other = torch.where(mask == 1, tokens, (tokens + 5) % VOCABULARY)
    labels = tokens.masked_fill(mask.cumsum(1) < 2, -100)  # what padding predicts counts nowhere
    results = []
    for given_tokens in (tokens, other):
        model.zero_grad()
        model(given_tokens, attention_mask=mask, labels=labels).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        if model.rows:
            model.rows.zero_grad()
    for name in results[0]:
        torch.testing.assert_close(*(result[name] for result in results), rtol=1e-5, atol=1e-6)
    model.zero_grad()


def test_trainer_trains_the_weights(tmp_path):
    model = wrapped("gqa")
    before = copy.deepcopy(model.model.state_dict())
    data = [{"input_ids": text(8)[0], "labels": text(8)[0]} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_steps=4,
        logging_steps=2,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert any(not torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    same(model.eval(), EngramLMForCausalLM.from_pretrained(tmp_path / "checkpoint-4"))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["host", "disk"])
def run(request, tmp_path_factory):
    """A finished run on text, its table in memory or in a file."""
    directory = tmp_path_factory.mktemp("run")
    data, tokenizer = runs.prepare_text(
        str(write_texts(tmp_path_factory.mktemp("texts"))), directory, vocab_size=280, say=lambda line: None
    )
    settings = runs.fit_vocabulary(config(ENGRAM, table=TableConfig(tier=request.param, std=0.1)), tokenizer)
    batches = Loader(data.train, settings.batch_size, settings.length)
    finish(Training(settings, directory, batches, runs.build_lookup(settings, tokenizer, directory)))
    return directory


def test_a_run_becomes_a_model_of_transformers(run, tmp_path):
    trained = runs.load_run(run, "cpu")
    export_run(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    if isinstance(trained.lookup.table, DiskTable):
        trained.lookup.table.close()
        trained = runs.load_run(run, "cpu")
    for words in ("the quick brown fox", "The  lazy dog\n"):
        ids = tokenizer(words)["input_ids"]
        assert ids == trained.tokenizer.encode(words).ids
        prompt = torch.tensor([ids])
        expected = generate(trained.model, trained.lookup, prompt, 12, end_id=separator_id(trained.tokenizer))
        assert torch.equal(model.generate(prompt, EAGER, max_new_tokens=12), expected)
        assert tokenizer.decode(ids) == words
    everything = torch.arange(trained.lookup.table.num_rows)
    assert torch.equal(model.lookup.table.fetch(everything), trained.lookup.table.fetch(everything))
    assert model.lookup.table.clock == trained.lookup.table.clock == 6
    same(EngramLMForCausalLM.from_run(run, "cpu"), model)

    writer = pipeline("text-generation", model=str(tmp_path / "out"))
    two = writer(["the quick", "the lazy dog while memory"], batch_size=2, do_sample=False, max_new_tokens=6)
    one = [writer(words, do_sample=False, max_new_tokens=6) for words in ("the quick", "the lazy dog while memory")]
    assert two == one
    assert one[0][0]["generated_text"].startswith("the quick")


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
