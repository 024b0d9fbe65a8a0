"""The backbone: parity with naive loops, streaming, causality, documents, initial values, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram_lm.config import from_dict, to_dict
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.memory import EngramConfig
from engram_lm.model import (
    PRESETS,
    AttentionConfig,
    LanguageModel,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    get_preset,
)
from engram_lm.model.attention import GroupedQueryAttention, LatentAttention, LatentCache, attend
from engram_lm.model.ffn import MixtureOfExperts, grouped_linear, grouped_linear_loop
from engram_lm.model.hyper import HyperConnection, Residual, sinkhorn
from engram_lm.model.lm import segment_mask
from engram_lm.model.rope import rotate

GQA = AttentionConfig("gqa", heads=4, kv_heads=2, head_dim=8)
MLA = AttentionConfig("mla", heads=4, nope_dim=8, rope_dim=4, value_dim=6, q_rank=12, kv_rank=10)
MOE = MoEConfig(experts=6, active=2, shared=1, width=12, dense_layers=1)
MEMORY = MemoryConfig(HashConfig(orders=(2, 3), heads=2, rows_per_head=50, layers=(1,)), EngramConfig(row_dim=4))
PLAIN = ModelConfig(vocab_size=50, dim=16, layers=3, attention=GQA, ffn_width=24)
FULL = replace(PLAIN, attention=MLA, moe=MOE, streams=4, memory=MEMORY)
CONFIGS = {
    "gqa": PLAIN,
    "mla": replace(PLAIN, attention=MLA),
    "moe": replace(PLAIN, moe=MOE),
    "streams": replace(PLAIN, streams=4),
    "memory": replace(PLAIN, memory=MEMORY, tie_embeddings=True),
    "all": FULL,
}


def build(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model in which every parameter does something: at its own start the sublayers write zeros."""
    model = LanguageModel.build(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def batch(config: ModelConfig, length: int, size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Random tokens and, for a memory, random rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (size, length), generator=generator)
    if config.memory is None:
        return tokens, None
    hashing = config.memory.hash
    shape = (size, length, len(hashing.layers), hashing.rows_per_token, config.memory.engram.row_dim)
    return tokens, torch.randn(shape, generator=generator)


def part(rows: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if rows is None else rows[:, start:end]


# --- attention ----------------------------------------------------------------------------------------------


def naive_rotate(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """One vector, pair by pair."""
    half = len(x) // 2
    first, second = [], []
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        first.append(x[i] * math.cos(angle) - x[i + half] * math.sin(angle))
        second.append(x[i] * math.sin(angle) + x[i + half] * math.cos(angle))
    return torch.stack(first + second)


def naive_norm(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def naive_softmax_sum(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = torch.stack(scores).softmax(0)
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0]))


def naive_gqa(module: GroupedQueryAttention, x: Tensor) -> Tensor:
    """x [T, D] -> [T, D], position by position and head by head."""
    c = module.config
    group = c.heads // c.kv_heads
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(c.heads):
            mine = slice(h * c.head_dim, (h + 1) * c.head_dim)
            shared = slice(h // group * c.head_dim, (h // group + 1) * c.head_dim)
            query = naive_rotate(naive_norm((module.query.weight @ x[t])[mine], module.query_norm.weight), t)
            scores, values = [], []
            for s in range(t + 1):
                key = naive_rotate(naive_norm((module.key.weight @ x[s])[shared], module.key_norm.weight), s)
                scores.append(query @ key / math.sqrt(c.head_dim))
                values.append((module.value.weight @ x[s])[shared])
            heads.append(naive_softmax_sum(scores, values))
        rows.append(module.out.weight @ torch.cat(heads))
    return torch.stack(rows)


def naive_mla(module: LatentAttention, x: Tensor) -> Tensor:
    """x [T, D] -> [T, D], position by position and head by head."""
    c = module.config
    query_up = module.query_up.weight.view(c.heads, c.nope_dim + c.rope_dim, -1)
    kv_up = module.kv_up.weight.view(c.heads, c.nope_dim + c.value_dim, -1)
    down = [module.kv_down.weight @ x_s for x_s in x]
    latent = [naive_norm(d[: c.kv_rank], module.kv_norm.weight) for d in down]
    rope_key = [naive_rotate(d[c.kv_rank :], s) for s, d in enumerate(down)]
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(c.heads):
            low = naive_norm(module.query_down.weight @ x[t], module.query_norm.weight)
            query = query_up[h] @ low
            query = torch.cat([query[: c.nope_dim], naive_rotate(query[c.nope_dim :], t)])
            up = [kv_up[h] @ latent[s] for s in range(t + 1)]
            keys = [torch.cat([u[: c.nope_dim], k]) for u, k in zip(up, rope_key, strict=False)]
            scores = [query @ key / math.sqrt(len(query)) for key in keys]
            heads.append(naive_softmax_sum(scores, [u[c.nope_dim :] for u in up]))
        rows.append(module.out.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "config", "naive"), [(GroupedQueryAttention, GQA, naive_gqa), (LatentAttention, MLA, naive_mla)]
)
def test_attention_equals_naive_loops_in_value_and_gradient(kind, config, naive):
    torch.manual_seed(0)
    module = kind(config, 16).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, _ = module(x, torch.arange(5))
    expected = torch.stack([naive(module, x_b) for x_b in x])
    # angles are fp32, which at these positions is an error of 1e-7
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)

    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), list(module.parameters()))
    truth = torch.autograd.grad((expected * weight).sum(), list(module.parameters()))
    for gradient, true in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(past=st.integers(1, 12), length=st.integers(1, 12), q_rank=st.sampled_from([0, 12]))
def test_absorbed_mla_equals_expanded(past, length, q_rank):
    length = min(length, past)
    torch.manual_seed(past)
    module = LatentAttention(replace(MLA, q_rank=q_rank), 16).double()
    query = torch.randn(2, length, MLA.heads, MLA.query_width, dtype=torch.float64)
    shape = (2, past)
    cache = LatentCache(
        torch.randn(*shape, MLA.kv_rank, dtype=torch.float64),
        torch.randn(*shape, MLA.rope_dim, dtype=torch.float64),
    )
    torch.testing.assert_close(module.absorbed(query, cache), module.expanded(query, cache), rtol=0, atol=1e-12)


def test_mla_absorbs_when_decoding_and_expands_when_training():
    with torch.device("meta"):
        module = LatentAttention(PRESETS["engram-27b"].attention, 16)
    assert module.absorbing_is_cheaper(1, 1000)
    assert not module.absorbing_is_cheaper(1000, 1000)


@settings(deadline=None, max_examples=25)
@given(past=st.integers(0, 6), length=st.integers(1, 5), groups=st.sampled_from([1, 2, 4]))
def test_attention_to_a_longer_past_is_causal_from_its_end(past, length, groups):
    torch.manual_seed(past)
    query = torch.randn(2, length, 4, 6, dtype=torch.float64)
    key, value = torch.randn(2, 2, past + length, groups, 6, dtype=torch.float64)
    repeat = [tensor.repeat_interleave(4 // groups, dim=2) for tensor in (key, value)]
    scores = torch.einsum("bthd,bshd->bhts", query, repeat[0]) / math.sqrt(6)
    hidden = torch.ones(length, past + length).triu(past + 1).bool()
    expected = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), repeat[1])
    torch.testing.assert_close(attend(query, key, value), expected, rtol=0, atol=1e-12)
    mask = ~hidden.expand(2, 1, -1, -1)
    torch.testing.assert_close(attend(query, key, value, mask), expected, rtol=0, atol=1e-12)


def test_rotation_depends_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 3, 8)

    def meet(position: int, distance: int) -> Tensor:
        turned = rotate(query, torch.tensor([position])), rotate(key, torch.tensor([position - distance]))
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(meet(7, 5), meet(90, 5), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(meet(7, 5), meet(7, 6), atol=1e-2)
    two = torch.tensor([[3], [9]])  # positions [B, T]
    together = rotate(query.expand(2, 1, 3, 8), two)
    torch.testing.assert_close(together[1:], rotate(query, two[1]))


# --- experts ------------------------------------------------------------------------------------------------


def naive_moe(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """x [N, D] -> [N, D], token by token and expert by expert."""
    rows = []
    for token in x:
        affinity = (module.router.weight @ token).sigmoid()
        preference = (affinity.detach() + module.bias).tolist()
        chosen = sorted(range(len(preference)), key=lambda e: -preference[e])[: module.config.active]
        total = sum(affinity[e] for e in chosen)
        out = torch.zeros_like(token) if module.shared is None else module.shared(token)
        for e in chosen:
            expert = module.down[e] @ (F.silu(module.gate[e] @ token) * (module.up[e] @ token))
            out = out + affinity[e] / total * module.config.route_scale * expert
        rows.append(out)
    return torch.stack(rows)


def build_moe(config: MoEConfig, dim: int = 16) -> MixtureOfExperts:
    torch.manual_seed(0)
    module = MixtureOfExperts(config, dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
        module.bias.normal_()
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [0, 2])
def test_mixture_of_experts_equals_naive_in_value_and_gradient(dtype, shared):
    module = build_moe(MoEConfig(experts=5, active=3, shared=shared, width=12, route_scale=1.5)).to(dtype)
    x = torch.randn(2, 6, 16, dtype=dtype, requires_grad=True)
    y, expected = module(x), naive_moe(module, x.flatten(0, 1)).view(2, 6, 16)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **tolerance)
    inputs, weight = [x, *module.parameters()], torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), inputs)
    for gradient, true in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, true, **tolerance)


@settings(deadline=None, max_examples=20)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_grouped_linear_equals_its_loop(counts):
    torch.manual_seed(0)
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts), 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(len(counts), 16, 8, dtype=torch.bfloat16, requires_grad=True)
    y, expected = grouped_linear(x, weight, ends), grouped_linear_loop(x, weight, ends)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    towards = torch.randn_like(y)
    gradients = torch.autograd.grad((y * towards).sum(), (x, weight))
    for gradient, true in zip(gradients, torch.autograd.grad((expected * towards).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(gradient, true, rtol=0.02, atol=0.1)


def test_experts_take_the_kernel_under_autocast(monkeypatch):
    module, calls = build_moe(replace(MOE, width=16)), []
    kernel = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert len(calls) == 3
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


def test_balancing_evens_out_the_load():
    module = build_moe(MoEConfig(experts=4, active=1, shared=0, width=8, balance_speed=0.02)).train()
    with torch.no_grad():
        module.bias.zero_()
        module.router.weight[0] += 0.5
    x = torch.randn(256, 16) + 0.5
    loads = []
    for _ in range(80):
        module(x)
        loads.append(module.load.clone())
        assert module.load.sum() == 256
        module.balance()
        assert module.load.sum() == 0
    assert loads[0].max() > 2 * 64
    assert loads[-1].max() < 1.25 * 64
    module.eval()(x)
    assert module.load.sum() == 0, "only training counts"
    assert "load" not in module.state_dict()
    assert "bias" in module.state_dict()


# --- residual streams ---------------------------------------------------------------------------------------


def build_connection(dim: int = 8, streams: int = 4) -> HyperConnection:
    torch.manual_seed(0)
    module = HyperConnection(dim, streams)
    module.reset_static()
    torch.nn.init.normal_(module.project.weight, std=(dim * streams) ** -0.5)
    return module


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), streams=st.integers(2, 5), wild=st.booleans())
def test_sinkhorn_is_doubly_stochastic(seed, streams, wild):
    """After 20 steps for logits about as far apart as a model starts with; wild ones take longer."""
    logits = torch.randn(7, streams, streams, generator=torch.Generator().manual_seed(seed))
    mix = sinkhorn(2 * logits, iterations=2000) if wild else sinkhorn(0.5 * logits)
    ones = torch.ones(7, streams)
    assert (mix >= 0).all()
    torch.testing.assert_close(mix.sum(-1), ones, rtol=0, atol=1e-4)
    torch.testing.assert_close(mix.sum(-2), ones, rtol=0, atol=1e-4)


def test_sinkhorn_survives_logits_whose_exponentials_vanish():
    mix = sinkhorn(torch.tensor([[0.0, -300.0], [-500.0, -900.0]]))
    assert torch.isfinite(mix).all()
    torch.testing.assert_close(mix.sum(-1), torch.ones(2))


def test_hyper_connection_starts_as_a_plain_residual_on_equal_streams():
    module = build_connection()
    stream, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    h = stream.unsqueeze(2).expand(-1, -1, 4, -1)
    with torch.no_grad():
        module.alpha.zero_()  # the static parts alone are exact
    x, write = module(h)
    torch.testing.assert_close(x, stream)
    torch.testing.assert_close(write(y), (stream + y).unsqueeze(2).expand(-1, -1, 4, -1), rtol=1e-4, atol=1e-4)
    read, written, mix = module.weights(h)
    torch.testing.assert_close(read, torch.full_like(read, 0.25))
    torch.testing.assert_close(written, torch.ones_like(written))
    torch.testing.assert_close(mix, torch.eye(4).expand_as(mix), rtol=0, atol=0.02)
    module.reset_static()
    assert not torch.equal(module(h)[1](y)[:, :, 0], module(h)[1](y)[:, :, 1]), "streams must come to differ"


def test_hyper_connection_equals_its_formula():
    module = build_connection().double()
    with torch.no_grad():
        module.alpha.fill_(1.0)
        module.static.normal_()
    h, y = torch.randn(1, 1, 4, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    x, write = module(h)
    flat = h.flatten()
    logits = module.project.weight @ (flat / (flat.square().mean() + 1e-6).sqrt()) + module.static
    mix = logits[8:].view(4, 4).exp()
    for _ in range(20):
        mix = mix / mix.sum(0, keepdim=True)
        mix = mix / mix.sum(1, keepdim=True)
    torch.testing.assert_close(x[0, 0], logits[:4].sigmoid() @ h[0, 0])
    torch.testing.assert_close(write(y)[0, 0], mix @ h[0, 0] + 2 * logits[4:8].sigmoid()[:, None] * y[0, 0])


def test_one_stream_is_the_plain_residual_exactly():
    h, y = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 8)
    x, write = Residual()(h)
    assert torch.equal(x, h[:, :, 0])
    assert torch.equal(write(y)[:, :, 0], h[:, :, 0] + y)

    model, (tokens, _) = build(PLAIN), batch(PLAIN, 7)
    h = F.rms_norm(model.embedding(tokens), (PLAIN.dim,), eps=PLAIN.norm_eps)
    for block in model.blocks:
        h = h + block.attention(block.attention_norm(h), torch.arange(7))[0]
        h = h + block.ffn(block.ffn_norm(h))
    assert torch.equal(model(tokens)[0], model.norm(h))


# --- the whole model ----------------------------------------------------------------------------------------

MODELS = {name: build(config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_any_split_into_chunks_gives_the_same_logits(name, data):
    model, length = MODELS[name], 14
    cuts = data.draw(st.lists(st.integers(1, length - 1), unique=True, max_size=length - 1).map(sorted))
    tokens, rows = batch(model.config, length, seed=data.draw(st.integers(0, 99)))
    with torch.no_grad():
        expected = model.logits(model(tokens, rows)[0])
        state, chunks = None, []
        for start, end in zip([0, *cuts], [*cuts, length], strict=True):
            hidden, state = model(tokens[:, start:end], part(rows, start, end), state=state, with_state=True)
            chunks.append(model.logits(hidden))
    assert state.position == length
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_future_changes_nothing_before_it(name):
    model = MODELS[name]
    tokens, rows = batch(model.config, 10)
    with torch.no_grad():
        before = model(tokens, rows)[0]
        tokens[:, 6] = (tokens[:, 6] + 1) % model.config.vocab_size
        if rows is not None:
            rows[:, 6] += 1.0
        after = model(tokens, rows)[0]
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-6, atol=1e-6)
    assert ((after[:, 6:] - before[:, 6:]).abs().amax(-1) > 1e-4).all(), "and it changes everything after it"


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_as_if_alone(name):
    model = MODELS[name]
    tokens, rows = batch(model.config, 12)
    segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [7] * 2 + [8] * 7 + [9] * 3])
    with torch.no_grad():
        packed = model(tokens, rows, segments=segments)[0]
        for b in range(2):
            for document in segments[b].unique():
                first, last = (segments[b] == document).nonzero()[[0, -1], 0].tolist()
                rows_alone = None if rows is None else rows[b : b + 1, first : last + 1]
                alone = model(tokens[b : b + 1, first : last + 1], rows_alone)[0]
                torch.testing.assert_close(packed[b : b + 1, first : last + 1], alone, rtol=1e-5, atol=1e-5)


def test_constant_segments_take_the_causal_path_and_returning_numbers_do_not():
    assert segment_mask(torch.tensor([[3, 3, 3], [4, 4, 4]])) is None
    mask = segment_mask(torch.tensor([[0, 1, 0]]))
    assert torch.equal(mask[0, 0], torch.eye(3).bool()), "document 0 is over once document 1 begins"


def test_selecting_beams_reorders_the_state():
    model = MODELS["all"]
    tokens, rows = batch(model.config, 9)
    with torch.no_grad():
        _, state = model(tokens[:, :6], part(rows, 0, 6), with_state=True)
        beams = torch.tensor([1, 1, 0])
        chosen = model(tokens[beams, 6:], rows[beams, 6:], state=state.select(beams))[0]
        expected = model(tokens, rows)[0][beams, 6:]
        torch.testing.assert_close(chosen, expected, rtol=1e-5, atol=1e-5)
        again = model(tokens[:, 6:], part(rows, 6, 9), state=state)[0]  # the old state still holds: roll back
        torch.testing.assert_close(again, model(tokens, rows)[0][:, 6:], rtol=1e-5, atol=1e-5)


def test_no_state_unless_asked_for():
    tokens, rows = batch(FULL, 3)
    assert MODELS["all"](tokens, rows)[1] is None


def test_keep_silences_the_memory():
    model = MODELS["memory"]
    tokens, rows = batch(model.config, 8)
    silent = model(tokens, rows, keep=torch.zeros_like(tokens, dtype=torch.bool))[0]
    torch.testing.assert_close(silent, model(tokens, torch.zeros_like(rows))[0])
    assert not torch.allclose(silent, model(tokens, rows)[0], atol=1e-3)


def test_loss_is_the_mean_over_targets_that_count():
    model, (tokens, _) = MODELS["gqa"], batch(PLAIN, 6)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    each = model.loss(tokens, targets, reduction="none")
    assert each.shape == targets.shape
    assert (each[:, -1] == 0).all()
    log_p = model.logits(model(tokens)[0]).log_softmax(-1)
    torch.testing.assert_close(each[1, 2], -log_p[1, 2, targets[1, 2]])
    torch.testing.assert_close(model.loss(tokens, targets), each[:, :-1].mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns_a_batch_by_heart_under_autocast(name):
    model = LanguageModel.build(CONFIGS[name]).train()
    tokens, rows = batch(model.config, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:], part(rows, 0, 7))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.balance()
        losses.append(loss.item())
    assert loss.dtype == torch.float32
    assert abs(losses[0] - math.log(50)) < 0.3, "at the start every token is about equally likely"
    assert losses[-1] < 0.5 * losses[0]
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused


# --- initial values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_init_sets_every_parameter_and_buffer(name):
    with torch.device("meta"):
        model = LanguageModel(CONFIGS[name])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 12345)
    model.init_weights(3)
    for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(tensor).all(), tensor_name
        assert not (tensor == 12345).any(), tensor_name


def test_init_depends_on_the_seed_alone():
    first = LanguageModel.build(FULL, seed=5).state_dict()
    torch.manual_seed(99)
    second = LanguageModel(FULL)
    second.init_weights(5)
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first[name]), name
    other = LanguageModel.build(FULL, seed=6).state_dict()
    assert not torch.equal(other["embedding.weight"], first["embedding.weight"])


def test_the_backbone_starts_the_same_with_and_without_a_memory():
    without = LanguageModel.build(replace(FULL, memory=None)).state_dict()
    with_memory = LanguageModel.build(FULL).state_dict()
    for name, tensor in without.items():
        assert torch.equal(with_memory[name], tensor), name
    tokens, rows = batch(FULL, 5)
    rows = torch.zeros_like(rows)  # an untrained table
    plain = LanguageModel.build(replace(FULL, memory=None))(tokens)[0]
    torch.testing.assert_close(LanguageModel.build(FULL)(tokens, rows)[0], plain)


# --- errors and configurations ------------------------------------------------------------------------------


def test_rows_and_memory_must_belong_together():
    tokens, rows = batch(FULL, 4)
    with pytest.raises(MismatchError, match=r"without rows.*silently"):
        MODELS["all"](tokens)
    with pytest.raises(MismatchError, match="without a memory"):
        MODELS["gqa"](tokens, rows)
    with pytest.raises(MismatchError, match=r"\[2, 4, 1, 4, 4\]"):
        MODELS["all"](tokens, rows[:, :-1])


def test_segments_with_a_state_are_refused():
    tokens, _ = batch(PLAIN, 4)
    with pytest.raises(MismatchError, match="one document"):
        MODELS["gqa"](tokens, segments=torch.zeros_like(tokens), with_state=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: AttentionConfig("gqa", heads=4, kv_heads=3, head_dim=8), "divisor"),
        (lambda: AttentionConfig("gqa", heads=4, kv_heads=2, head_dim=7), "even"),
        (lambda: AttentionConfig("gqa", heads=4, kv_heads=2, head_dim=8, kv_rank=3), "ignored"),
        (lambda: replace(MLA, kv_rank=0), "kv_rank"),
        (lambda: replace(MLA, q_rank=-1), "q_rank"),
        (lambda: replace(MLA, rope_theta=0.0), "rope_theta"),
        (lambda: replace(MOE, active=7), "7 of 6"),
        (lambda: replace(MOE, width=0), "width"),
        (lambda: replace(PLAIN, dim=0), "dim"),
        (lambda: replace(PLAIN, moe=replace(MOE, dense_layers=3)), "dense_layers"),
        (lambda: replace(PLAIN, layers=1, memory=MEMORY), "beyond the last"),
    ],
)
def test_impossible_configurations_are_errors(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong()


@pytest.mark.parametrize("config", [*CONFIGS.values(), *PRESETS.values()])
def test_a_configuration_survives_json(config):
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_an_unknown_preset_names_the_nearest():
    assert get_preset("tiny") is PRESETS["tiny"]
    with pytest.raises(ConfigError, match="'engram-27b'"):
        get_preset("engram-27B")
