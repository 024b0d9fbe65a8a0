"""A retrofit in plain PyTorch, in Trainer and in TRL: rows and parameters learn, stop, and go on as they should."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hf_tiny import HASH, SENTENCES, tiny_batch, tiny_memory, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.hf.attach import Memory, mounted
from engram_lm.hf.checkpoints import EngramCallback, load_memories, save_memories
from engram_lm.hf.modeling import EngramLMConfig, EngramLMForCausalLM
from engram_lm.hf.training import RowwiseAdamW, trained_rows
from engram_lm.tables import TableConfig

pytestmark = [  # of Trainer and peft about themselves
    pytest.mark.filterwarnings(r"ignore:.*gradient_checkpointing.* is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Trainer collects garbage whenever it begins: a second each time, were it not for this."""
    gc.freeze()
    yield
    gc.unfreeze()


def retrofit(frozen: bool = True, live: bool = False, **options: Any) -> tuple[nn.Module, Memory]:
    """A tiny model with a memory, ready to be trained."""
    model = tiny_model()
    if frozen:
        model.requires_grad_(False)
    return model.train(), tiny_memory(model, live=live, **options)


def backward(model: nn.Module, tokens: Tensor, scale: float = 1.0) -> float:
    loss = model(input_ids=tokens, labels=tokens).loss
    (scale * loss).backward()
    return loss.item()


def rows_of(memory: Memory) -> Tensor:
    return memory.lookup.table.fetch(torch.arange(memory.lookup.table.num_rows))


def records_of(memory: Memory) -> Tensor:
    """Rows with their accumulators."""
    return memory.lookup.table.records.clone()  # type: ignore[attr-defined]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All that training may change."""
    records = {f"rows of {name}": records_of(memory) for name, memory in mounted(model).items()}
    return {name: value.clone() for name, value in model.state_dict().items()} | records


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- plain PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen base", "full base"])
def test_rows_and_parameters_learn(frozen: bool):
    model, _ = retrofit(frozen)
    before, tokens = state_of(model), tiny_batch(4, 16)
    optimizer = RowwiseAdamW(model, lr=3e-3, table_lr=0.1)
    losses = []
    for _ in range(15):
        losses.append(backward(model, tokens))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    changed = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
    assert "rows of memory" in changed
    assert any(".engram." in name for name in changed)
    assert frozen == all("engram" in name or "rows" in name for name in changed)


def test_a_lora_base_learns_with_its_memory():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    memory = tiny_memory(wrapped, live=False)
    optimizer, tokens = RowwiseAdamW(wrapped, lr=1e-2), tiny_batch()
    for _ in range(3):
        backward(wrapped, tokens)
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(value, after[name.replace("q_proj", "q_proj.base_layer")]) for name, value in before.items())
    assert any("lora_B" in name and value.any() for name, value in after.items())
    assert rows_of(memory).any()


def test_peft_after_attach_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, _ = retrofit()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="call get_peft_model first, then attach"):
        RowwiseAdamW(wrapped)
    assert len(RowwiseAdamW(wrapped, rows_alone=True).tables) == 1
    model, _ = retrofit()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="put adapters into the memory"):
        RowwiseAdamW(wrapped)


@pytest.mark.parametrize("frozen", ["projections", "rows by their rate", "rows by their memory"])
def test_either_half_of_a_memory_may_be_frozen(frozen: str):
    model, memory = retrofit(live=True)
    memory.requires_grad_(frozen != "projections")
    memory.train_rows = frozen != "rows by their memory"
    optimizer = RowwiseAdamW(
        model, table_lr=0.0 if "rate" in frozen else 0.1, rows_alone=frozen == "projections", weight_decay=0.1
    )
    rows, weights = records_of(memory), [p.clone() for p in memory.parameters()]
    backward(model, tiny_batch())
    optimizer.step()
    moved = any(not torch.equal(p, w) for p, w in zip(memory.parameters(), weights, strict=True))
    assert moved == (frozen != "projections")
    assert torch.equal(records_of(memory), rows) == ("rows" in frozen)
    assert memory.rows.leaves == []


def test_nothing_to_train_is_refused():
    model, memory = retrofit()
    memory.requires_grad_(False)
    memory.train_rows = False
    with pytest.raises(ConfigError, match="nothing would change"):
        RowwiseAdamW(model)


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "as they are"])
def test_accumulated_gradients_are_those_of_one_large_batch(clip: bool):
    tokens, outcomes = tiny_batch(4, 12), []
    for parts in (1, 2, 4):
        model, memory = retrofit(live=True)
        optimizer = RowwiseAdamW(model, lr=1e-2, table_lr=0.1)
        for part in tokens.chunk(parts):
            backward(model, part, 1 / parts)
        norm = optimizer.clip(1e-2) if clip else torch.tensor(0.0)
        optimizer.step()
        outcomes.append((norm, rows_of(memory)))
    for norm, rows in outcomes[1:]:
        torch.testing.assert_close(norm, outcomes[0][0])
        torch.testing.assert_close(rows, outcomes[0][1], atol=1e-5, rtol=1e-4)


def test_clip_includes_rows():
    model, memory = retrofit(live=True)
    optimizer = RowwiseAdamW(model)
    backward(model, tiny_batch())
    (rows,) = memory.rows.leaves
    parameters = [p.grad for p in memory.parameters() if p.grad is not None]
    total = torch.cat([g.flatten() for g in [rows.grad, *parameters]]).norm()
    torch.testing.assert_close(optimizer.clip(0.1), total)
    clipped = torch.cat([g.flatten() for g in [rows.grad, *parameters]]).norm()
    assert total > 0.2
    torch.testing.assert_close(clipped, torch.tensor(0.1), rtol=1e-3, atol=0)


def test_only_matrices_decay():
    model, memory = retrofit(live=True)
    optimizer = RowwiseAdamW(model, lr=0.1, weight_decay=0.5)
    before = {name: p.clone() for name, p in memory.named_parameters()}
    for parameter in memory.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in memory.named_parameters():
        expected = 0.95 * before[name] if name.endswith("project.weight") else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_schedules_scale_rows_too():
    model, memory = retrofit(live=True)
    optimizer = RowwiseAdamW(model, lr=1e-3, table_lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 0.5)
    before = records_of(memory)
    backward(model, tiny_batch())
    optimizer.step()  # warming up: a rate of 0
    assert torch.equal(records_of(memory), before)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-4, 0.05]
    alone, other = retrofit(live=True)
    expected = RowwiseAdamW(alone, lr=5e-4, table_lr=0.05)
    for each, its in ((model, optimizer), (alone, expected)):
        for part in (other, memory):
            part.zero_grad()
        backward(each, tiny_batch(seed=1))
        its.step()
    assert torch.equal(records_of(memory), records_of(other))


def test_forgotten_gradients_move_nothing():
    model, memory = retrofit(live=True)
    optimizer, before = RowwiseAdamW(model), records_of(memory)
    backward(model, tiny_batch())
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(records_of(memory), before)


def test_a_kept_graph_starts_anew_after_a_step():
    model, memory = retrofit(live=True)
    loss = model(input_ids=tiny_batch(), labels=tiny_batch()).loss
    loss.backward(retain_graph=True)
    first = memory.rows.leaves[0].grad.clone()  # type: ignore[union-attr]
    memory.rows.step(0.0)
    loss.backward(retain_graph=True)
    assert torch.equal(memory.rows.leaves[0].grad, first)  # type: ignore[arg-type]
    loss.backward()
    assert len(memory.rows.leaves) == 1
    torch.testing.assert_close(memory.rows.leaves[0].grad, 2 * first)


def test_a_forward_without_a_backward_leaves_nothing_behind():
    model, memory = retrofit(live=True)
    found: list[Any] = []
    read = memory.rows.lookup.table.fetch

    def fetch(ids: Tensor) -> Tensor:
        rows = read(ids)
        found.append(weakref.ref(rows))
        return rows

    memory.rows.lookup.table.fetch = fetch  # type: ignore[method-assign]
    gc.disable()
    try:
        output = model(input_ids=tiny_batch(), use_cache=False)
        assert found[-1]() is not None
        del output
        assert found[-1]() is None
    finally:
        gc.enable()
    assert memory.rows.leaves == []


def test_no_state_grows_with_the_table():
    sizes = []
    for rows in (101, 20_011):
        model, memory = retrofit(hash=replace(HASH, rows_per_head=rows))
        optimizer, biggest = RowwiseAdamW(model), memory.lookup.table.num_rows
        backward(model, tiny_batch())
        assert all(len(leaf) <= 2 * 12 * HASH.rows_per_token * len(HASH.layers) for leaf in memory.rows.leaves)
        optimizer.step()
        tensors = [v for state in optimizer.state.values() for v in state.values()]
        sizes.append(sum(v.numel() for v in tensors))
        assert biggest not in {size for v in tensors for size in v.shape}
    assert sizes[0] == sizes[1]


def test_a_closure_is_called_once():
    (model, _), (other, _) = retrofit(live=True), retrofit(live=True)
    losses: list[float] = []

    def closure() -> float:
        losses.append(backward(model, tiny_batch()))
        return losses[-1]

    loss, optimizer = RowwiseAdamW(model).step(closure), RowwiseAdamW(other)
    assert losses == [loss] == [backward(other, tiny_batch())]
    optimizer.step()
    assert_same(state_of(model), state_of(other))


def test_scaled_gradients_give_the_same_step():
    outcomes = []
    for scale in (None, 1024.0):
        model, memory = retrofit(live=True)
        optimizer = RowwiseAdamW(model, lr=1e-2, table_lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for seed in range(2):
            for part in tiny_batch(4, 8, seed=seed).chunk(2):
                scaler.scale(model(input_ids=part, labels=part).loss).backward()
            if seed:  # with and without clipping
                scaler.unscale_(optimizer)
                optimizer.clip(0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        outcomes.append(rows_of(memory))
    torch.testing.assert_close(*outcomes, atol=1e-6, rtol=1e-4)


def test_an_overflow_skips_rows_too():
    model, memory = retrofit(live=True)
    memory.requires_grad_(False)  # infinities in the gradients of rows alone
    optimizer, scaler = RowwiseAdamW(model, rows_alone=True), torch.amp.GradScaler("cpu", init_scale=1e38)
    before = records_of(memory)
    for _ in range(2):
        scaler.scale(1e4 * model(input_ids=tiny_batch(), labels=tiny_batch()).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert torch.equal(records_of(memory), before)


def test_plain_training_goes_on_from_what_was_saved(tmp_path: Path):
    model, _ = retrofit()
    optimizer = RowwiseAdamW(model, lr=1e-2)
    for step in range(6):
        if step == 3:
            save_memories(model, tmp_path)
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        backward(model, tiny_batch(seed=step))
        optimizer.step()
        optimizer.zero_grad()
    again, _ = retrofit()
    resumed = RowwiseAdamW(again, lr=1e-2)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    load_memories(again, tmp_path)
    for step in range(3, 6):
        backward(again, tiny_batch(seed=step))
        resumed.step()
        resumed.zero_grad()
    assert_same(state_of(model), state_of(again))


def test_rows_of_another_moment_are_refused():
    model, _ = retrofit()
    optimizer = RowwiseAdamW(model)
    backward(model, tiny_batch())
    optimizer.step()
    with pytest.warns(UserWarning, match="holds no rows"):
        state = optimizer.state_dict()
    other, _ = retrofit()
    forgetful = RowwiseAdamW(other)
    forgetful.load_state_dict(state)
    backward(other, tiny_batch())
    with pytest.raises(MismatchError, match="after 1 updates, this table had 0"):
        forgetful.step()


def test_damaged_and_foreign_memories_are_refused(tmp_path: Path):
    model, memory = retrofit()
    save_memories(model, tmp_path)
    other, _ = retrofit(hash=replace(HASH, rows_per_head=307))
    with pytest.raises(MismatchError, match="vocabulary and plan"):
        load_memories(other, tmp_path)
    named, _ = retrofit(name="other")
    with pytest.raises(CheckpointError, match="holds no memory"):
        load_memories(named, tmp_path)
    memory.train_rows = False
    with pytest.raises(MismatchError, match="rows that train"):
        load_memories(model, tmp_path)
    memory.train_rows = True
    file = next(tmp_path.rglob("weights.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="altered"):
        load_memories(model, tmp_path)


def test_several_memories_train_at_their_own_rates(tmp_path: Path):
    model, first = retrofit(live=True)
    second = tiny_memory(model, name="second", seed=1)
    optimizer = RowwiseAdamW(model, table_lr=0.1)
    optimizer.param_groups[-1]["lr"] = 0.0
    before = records_of(first), records_of(second)
    backward(model, tiny_batch())
    optimizer.step()
    assert not torch.equal(records_of(first), before[0])
    assert torch.equal(records_of(second), before[1])
    save_memories(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "second"}


def test_other_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    model, _ = retrofit()
    optimizer = RowwiseAdamW(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="drift apart"):
        optimizer.step()


# --- Trainer --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of a process."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def examples(count: int = 16, length: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tiny_batch(count, length)]


def trainer_of(directory: Path, *, callbacks: list[Any] | None = None, model: nn.Module | None = None, **changes: Any):
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    model, data = model or retrofit()[0], changes.pop("train_dataset", None) or examples()
    return Trainer(
        model,
        TrainingArguments(str(directory), **settings | changes),
        train_dataset=data,
        eval_dataset=examples(4),
        optimizers=(RowwiseAdamW(model, lr=1e-2, table_lr=0.1), None),
        callbacks=[EngramCallback()] if callbacks is None else callbacks,
    )


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen base", "full base"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, frozen: bool):
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    whole = trainer_of(tmp_path / "whole", model=retrofit(frozen)[0], **schedule)
    whole.train()
    killed = trainer_of(
        tmp_path / "cut", model=retrofit(frozen)[0], callbacks=[EngramCallback(), KillAt(5)], **schedule
    )
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer_of(tmp_path / "cut", model=retrofit(frozen)[0], **schedule)
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(whole.model), state_of(resumed.model))
    moments = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    assert all(torch.equal(moments[0][n]["exp_avg_sq"], moments[1][n]["exp_avg_sq"]) for n in moments[0])


def test_a_table_on_disk_resumes_too(tmp_path: Path):
    def model_in(directory: Path) -> nn.Module:
        return retrofit(table=TableConfig("disk", memory=0.0), directory=directory)[0]

    outcomes = []
    for cut in (False, True):
        directory = tmp_path / str(cut)
        run = trainer_of(directory, model=model_in(directory), callbacks=[EngramCallback(), KillAt(5 if cut else 9)])
        if cut:
            with pytest.raises(Killed):
                run.train()
            mounted(run.model)["memory"].lookup.table.close()
            anew = trainer_of(directory, model=model_in(directory))
            with pytest.raises(MismatchError, match="earlier run"):
                anew.train()
            mounted(anew.model)["memory"].lookup.table.close()
            run = trainer_of(directory, model=model_in(directory))
            run.train(resume_from_checkpoint=True)
        else:
            run.train()
        outcomes.append(rows_of(mounted(run.model)["memory"]))
        mounted(run.model)["memory"].lookup.table.close()
    assert torch.equal(*outcomes)


def test_a_lora_run_resumes(tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def model() -> nn.Module:
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        tiny_memory(wrapped, live=False)
        return wrapped

    whole = trainer_of(tmp_path / "whole", model=model())
    whole.train()
    killed = trainer_of(tmp_path / "cut", model=model(), callbacks=[EngramCallback(), KillAt(5)])
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer_of(tmp_path / "cut", model=model())
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(whole.model), state_of(resumed.model))


def test_checkpoints_hold_exact_memories_and_go_with_their_directory(tmp_path: Path):
    seen: dict[str, dict[str, Tensor]] = {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[f"checkpoint-{state.global_step}"] = state_of(kwargs["model"])

    run = trainer_of(tmp_path, callbacks=[EngramCallback(), Watch()], save_total_limit=2, save_only_model=True)
    run.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-6"}
    other, _ = retrofit()
    load_memories(other, tmp_path / "checkpoint-4" / "engram")
    assert_same(seen["checkpoint-4"], state_of(other))
    resumed = trainer_of(tmp_path, save_only_model=True)  # parameters and rows go on, moments begin anew
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert mounted(resumed.model)["memory"].lookup.table.clock == 6


def test_the_best_model_has_its_rows(tmp_path: Path):
    seen: dict[int, dict[str, Tensor]] = {}

    class Worsen(TrainerCallback):
        """Spoils training from the third step on."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 2:
                kwargs["optimizer"].param_groups[-1]["lr"] = 1e3

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = state_of(kwargs["model"])

    run = trainer_of(
        tmp_path,
        callbacks=[EngramCallback(), Worsen()],
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    run.train()
    assert run.state.best_global_step == 2
    assert not torch.equal(seen[6]["rows of memory"], seen[2]["rows of memory"])
    assert_same(state_of(run.model), seen[2])


def test_every_option_of_trainers_takes_one_step_of_rows_a_step(tmp_path: Path):
    plain = trainer_of(tmp_path / "plain", gradient_accumulation_steps=2, max_steps=3)
    plain.train()
    losses = {}
    for name, changes in {
        "checkpointing": {"gradient_checkpointing": True},
        "smoothing": {"label_smoothing_factor": 0.1},
        "autocast": {"bf16": True},
        "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "max_grad_norm": 0.0},
    }.items():
        run = trainer_of(tmp_path / name, gradient_accumulation_steps=2, max_steps=3, **changes)
        run.train()
        memory = mounted(run.model)["memory"]
        assert memory.lookup.table.clock == 3, name
        assert rows_of(memory).any()
        losses[name] = [line["loss"] for line in run.state.log_history if "loss" in line]
        if name == "checkpointing":
            assert_same(state_of(run.model), state_of(plain.model))
    expected = [line["loss"] for line in plain.state.log_history if "loss" in line]
    assert losses["autocast"] == pytest.approx(expected, rel=2e-2)


def test_forgetting_the_callback_is_noticed_when_saving_and_when_resuming(tmp_path: Path):
    run = trainer_of(tmp_path, callbacks=[])
    with pytest.warns(UserWarning, match="EngramCallback"):
        run.train()
    with pytest.raises(MismatchError, match="EngramCallback"):
        trainer_of(tmp_path, callbacks=[], max_steps=8).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="saved without EngramCallback"):
        trainer_of(tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_the_rows_of_another_run_are_refused(tmp_path: Path):
    for name in ("one", "two"):
        trainer_of(tmp_path / name, max_steps=2).train()
    elsewhere = str(shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "moved"))
    with pytest.raises(CheckpointError, match="lies elsewhere"):
        trainer_of(tmp_path / "two", max_steps=4).train(resume_from_checkpoint=elsewhere)
    resumed = trainer_of(tmp_path / "two", max_steps=4, callbacks=[EngramCallback(resume_from=elsewhere)])
    resumed.train(resume_from_checkpoint=elsewhere)
    assert mounted(resumed.model)["memory"].lookup.table.clock == 4


def test_a_checkpoint_whose_writing_was_cut_short_is_refused(tmp_path: Path):
    trainer_of(tmp_path, max_steps=4).train()
    (path,) = (tmp_path / "checkpoint-4" / "engram" / "memory").glob("step-*")
    path.rename(path.with_suffix(".partial"))
    with pytest.raises(CheckpointError, match="cut short"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_parameters_that_the_optimizer_does_not_have_are_refused(tmp_path: Path):
    run = trainer_of(tmp_path)
    next(iter(run.model.parameters())).requires_grad_(True)
    with pytest.raises(ConfigError, match="embed_tokens"):
        run.train()
    run = trainer_of(tmp_path)
    run.optimizer = torch.optim.AdamW(p for p in run.model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="does not have the rows of 'memory'"):
        run.train()
    run = trainer_of(tmp_path, max_steps=1, save_strategy="no")
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})  # behind the rows
    run.train()
    assert mounted(run.model)["memory"].lookup.table.clock == 1


def test_a_step_that_a_scaler_skipped_leaves_no_gradients(tmp_path: Path):
    class Skip(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].optimizer.step = lambda closure=None: None

    run = trainer_of(tmp_path, callbacks=[EngramCallback(), Skip()], save_strategy="no")
    run.train()
    assert mounted(run.model)["memory"].rows.leaves == []


# --- TRL ------------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
SPLIT = [(text[: text.index(" ", 12)], text[text.index(" ", 12) :]) for text in SENTENCES]
DATA: dict[str, dict[str, Any]] = {
    "text": {"text": SENTENCES},
    "completion": {"prompt": [a for a, _ in SPLIT], "completion": [b for _, b in SPLIT]},
    "chat": {"messages": [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in SPLIT]},
}


def sft(directory: Path, data: str, model: nn.Module, **changes: Any) -> Any:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT
    options = {key: changes.pop(key) for key in ("peft_config", "optimizer_cls_and_kwargs") if key in changes}
    if "optimizer_cls_and_kwargs" not in options:
        options["optimizers"] = (RowwiseAdamW(model, lr=3e-3, table_lr=0.1), None)
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "max_length": 64,
        "logging_steps": 1,
        "save_steps": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(str(directory), **settings | changes),
        train_dataset=datasets.Dataset.from_dict(DATA[data]),
        processing_class=tokenizer,
        callbacks=[EngramCallback()],
        **options,
    )


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ("text", {}),
        ("text", {"packing": True, "packing_strategy": "wrapped"}),
        ("text", {"packing": True}),
        ("completion", {"completion_only_loss": True}),
        ("chat", {"assistant_only_loss": True}),
    ],
    ids=["text", "wrapped", "packed", "completion", "assistant"],
)
def test_sft_trains_the_memory_alone(tmp_path: Path, data: str, changes: dict[str, Any]):
    model, memory = retrofit()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = sft(tmp_path, data, model, **changes)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert memory.lookup.table.clock == 8
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert (tmp_path / "checkpoint-8" / "engram" / "memory").is_dir()


def test_sft_with_lora_in_the_order_that_works(tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(tiny_model(), lora)
    memory = tiny_memory(wrapped, live=False)
    sft(tmp_path / "first", "text", wrapped, max_steps=2).train()
    assert memory.lookup.table.clock == 2

    model, memory = retrofit()  # SFTTrainer wraps by itself: the optimizer is made later, the memory thawed in between
    late = (RowwiseAdamW, {"model": model, "lr": 3e-3})
    run = sft(tmp_path / "late", "text", model, peft_config=lora, optimizer_cls_and_kwargs=late, max_steps=2)
    memory.requires_grad_(True)
    run.train()
    assert memory.lookup.table.clock == 2
    assert any("lora_B" in name and p.any() for name, p in model.named_parameters())

    for options, match in (({}, "lora_A"), ({"optimizer_cls_and_kwargs": late}, "call get_peft_model first")):
        model, _ = retrofit()
        if options:
            options = {"optimizer_cls_and_kwargs": (RowwiseAdamW, {"model": model})}
        with pytest.raises(ConfigError, match=match):
            sft(tmp_path / "wrong", "text", model, peft_config=lora, max_steps=2, **options).train()


def own() -> Any:
    """A model of ours with a memory."""
    torch.manual_seed(0)
    return EngramLMForCausalLM(EngramLMConfig.of(tiny.ENGRAM), tiny.lookup_of(tiny.ENGRAM)).train()


def test_rows_count_once_however_they_are_wrapped(tmp_path: Path):
    class Wrapper(nn.Module):
        """Passes on the attributes of what it wraps, as peft's do."""

        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = wrapped

        def __getattr__(self, name: str) -> Any:
            own = self.__dict__["_modules"]
            return own[name] if name in own else getattr(own["wrapped"], name)

    model = own()
    wrapped = Wrapper(model)
    assert wrapped.rows is model.rows
    assert list(trained_rows(wrapped)) == [model.rows]
    save_memories(wrapped, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_our_own_models_train_by_the_same_optimizer(tmp_path: Path):
    def run(directory: Path, *callbacks: Any) -> Any:
        tokens = tiny.text(12, batch=16)
        data = [{"input_ids": row, "labels": row} for row in tokens]
        return trainer_of(directory, model=own(), callbacks=[EngramCallback(), *callbacks], train_dataset=data)

    whole = run(tmp_path / "whole")
    whole.train()
    assert whole.model.lookup.table.clock == 6
    with pytest.raises(Killed):
        run(tmp_path / "cut", KillAt(5)).train()
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(whole.model.lookup.table.records, resumed.model.lookup.table.records)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
