"""The parameter table, the schedule, Muon against torch's own, and state that survives a checkpoint."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.model.lm import LanguageModel
from engram_lm.model.presets import PRESETS, get_preset
from engram_lm.train.optim import OptimConfig, Optimizer, muon_step, orthogonalise, rule_of, schedule


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_of_every_preset_has_a_rule_that_suits_it(preset):
    with torch.device("meta"):
        model = LanguageModel(PRESETS[preset])
    for name, parameter in model.named_parameters():
        rule = rule_of(name)
        if rule.optimizer == "muon":
            assert parameter.ndim in (2, 3), f"{name} is no matrix"
        else:
            assert rule.weight_decay == 0
            assert parameter.ndim < 3 or "conv" in name


def test_a_tensor_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="never have been trained"):
        rule_of("blocks.0.new_idea")


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_equals_torch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    momentum = torch.zeros(shape)
    for _ in range(4):
        grad = torch.randn(shape)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        muon_step([ours], [momentum], lr=0.1, momentum=0.95, weight_decay=0.1)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)  # bfloat16 iterations, in another order
    assert (ours - start).abs().mean() > 0.03


def test_muon_on_stacked_experts_equals_one_by_one():
    torch.manual_seed(0)
    stacked, grads = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    together = nn.Parameter(stacked.clone())
    together.grad = grads.clone()
    muon_step([together], [torch.zeros(3, 8, 16)], lr=0.1, momentum=0.9, weight_decay=0.0)
    for index in range(3):
        alone = nn.Parameter(stacked[index].clone())
        alone.grad = grads[index].clone()
        muon_step([alone], [torch.zeros(8, 16)], lr=0.1, momentum=0.9, weight_decay=0.0)
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-2)


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 16, 48)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_schedule_rises_stays_and_falls():
    config = OptimConfig(warmup=0.1, decay=0.5, final=0.1)
    course = [schedule(config, step, 100) for step in range(100)]
    assert course[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(value == 1 for value in course[10:50])
    assert course[50:] == sorted(course[50:], reverse=True)
    assert course[-1] == pytest.approx(0.1 + 0.9 * 0.02)
    assert schedule(OptimConfig(warmup=0, decay=0), 0, 1) == 1


def tiny_model(seed=0):
    return LanguageModel.build(
        replace(get_preset("tiny"), vocab_size=64, dim=32, layers=2, memory=None, ffn_width=48), seed=seed
    )


def take_steps(model, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(0, 64, (2, 9), generator=generator)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.clip()
        optimizer.step(1.0)


def test_state_continues_exactly():
    whole, half = tiny_model(), tiny_model()
    optimizer = Optimizer(whole, OptimConfig())
    take_steps(whole, optimizer, 3, seed=1)
    first = Optimizer(half, OptimConfig())
    take_steps(half, first, 3, seed=1)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed = Optimizer(half, OptimConfig())
    resumed.load_state(state)
    take_steps(whole, optimizer, 3, seed=2)
    take_steps(half, resumed, 3, seed=2)
    for (name, one), other in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_state_of_another_model_is_refused():
    optimizer = Optimizer(tiny_model(), OptimConfig())
    with pytest.raises(MismatchError, match="another model"):
        optimizer.load_state({})


def test_clip_counts_memory_rows_too():
    model = tiny_model()
    optimizer = Optimizer(model, OptimConfig(clip=1.0))
    tokens = torch.randint(0, 64, (2, 9))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    rows = torch.zeros(5, 3, requires_grad=True)
    rows.grad = torch.full((5, 3), 100.0)
    norm = optimizer.clip([rows.grad])
    assert norm > 100
    grads = [parameter.grad for parameter in model.parameters()] + [rows.grad]
    assert torch.stack([grad.norm() for grad in grads]).norm() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("limit", [0.0, 0.3, 1e9])
def test_clip_gives_the_bits_of_torch(limit):
    ours, theirs = tiny_model(), tiny_model()
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
    assert Optimizer(ours, OptimConfig(clip=limit)).clip() == float(expected)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_state_is_complete_before_the_first_step():
    model = tiny_model()
    optimizer = Optimizer(model, OptimConfig())
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    take_steps(model, optimizer, 1, seed=0)
    after = optimizer.state()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[name].shape, after[name].dtype)
        assert not tensor.any()


def test_state_of_another_shape_is_refused():
    model = tiny_model()
    state = Optimizer(model, OptimConfig()).state()
    state["muon.blocks.0.ffn.gate.weight"] = torch.zeros(1, 32)
    with pytest.raises(MismatchError, match=r"gate.weight has the shape \[1, 32\], not \[48, 32\]"):
        Optimizer(model, OptimConfig()).load_state(state)


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"table_lr": -1.0}, {"warmup": 0.8, "decay": 0.5}, {"betas": (0.9,)}])
def test_impossible_settings(change):
    with pytest.raises(ConfigError, match="optim"):
        replace(OptimConfig(), **change)
