"""The loop: it learns, touches only the rows it reads, and goes on from anywhere as if nothing happened."""

import json
import math
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from late import LateSide
from tiny import (
    BASE,
    ENGRAM,
    EVERYTHING,
    MODELS,
    assert_same,
    config,
    finish,
    lookup_of,
    outcome,
    split,
    training,
)
from torch.utils._python_dispatch import TorchDispatchMode

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.evaluate.controls import model_of_arm
from engram_lm.model import PRESETS
from engram_lm.model.lookup import Leaf
from engram_lm.tables import TableConfig, pinned, tiers
from engram_lm.train.checkpoint import Checkpoint, checkpoints, latest
from engram_lm.train.loader import Loader, LoaderState
from engram_lm.train.loop import (
    Metrics,
    TrainConfig,
    choose_device,
    differences,
    interruptible,
    read_metrics,
    train,
    train_together,
)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


# --- learning -----------------------------------------------------------------------------------------------


def test_the_loss_falls(tmp_path, model):
    run = finish(training(tmp_path, config(model, steps=12, length=20, checkpoint_every=0)))
    losses = [line["loss"] for line in run.metrics.lines]
    assert losses[0] == pytest.approx(math.log(model.vocab_size), abs=0.1)
    assert np.mean(losses[-3:]) < losses[0] - 0.1
    assert all(line["norm"] > 0 for line in run.metrics.lines)


def test_the_loss_of_the_first_step_is_the_models(tmp_path):
    """Nats a token over the targets that count, however the batch is cut."""
    for accumulate in (1, 2, 4):
        run = training(tmp_path / str(accumulate), config(accumulate=accumulate))
        batch, _ = run.batches.next(LoaderState())
        assert (batch.targets < 0).any()
        rows, _ = run.lookup.rows(batch.tokens, segments=batch.segments)
        with torch.no_grad():
            expected = run.model.loss(batch.tokens, batch.targets, rows, segments=batch.segments)
        assert run.step()["loss"] == pytest.approx(float(expected), rel=1e-5)
        run.close()


def test_parts_add_up_to_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("engram_lm.train.optim.bf16_is_fast", lambda device: False)  # a rounding would hide a mistake
    runs = [
        finish(training(tmp_path / str(parts), config(EVERYTHING, accumulate=parts, steps=3))) for parts in (1, 2, 4)
    ]
    for other in runs[1:]:
        for (name, one), two in zip(runs[0].model.state_dict().items(), other.model.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(runs[0].lookup.table.rows, other.lookup.table.rows, rtol=1e-3, atol=1e-4)
        for one, two in zip(runs[0].metrics.lines, other.metrics.lines, strict=True):
            assert one["norm"] == pytest.approx(two["norm"], rel=1e-3)


def test_only_rows_that_were_read_move(tmp_path):
    run = training(tmp_path, config())
    table = run.lookup.table
    table.rows.normal_(generator=torch.Generator().manual_seed(0))
    state = LoaderState()
    for _ in range(2):
        before = table.records.clone()
        batch, state = run.batches.next(state)
        read = torch.zeros(table.num_rows, dtype=torch.bool)
        read[run.lookup.ids(batch.tokens, segments=batch.segments)[0].flatten()] = True
        run.step()
        moved = (table.records != before).any(1)  # rows and accumulators
        assert moved.any()
        assert not (moved & ~read).any()
    run.close()


def test_rows_learn_from_zero(tmp_path):
    run = finish(training(tmp_path, config(steps=1)))
    rows = run.lookup.table.rows
    assert rows.any()
    rate = run.config.optim.peak_table_lr * run.metrics.lines[0]["lr"]
    moved = rows[rows.any(1)]
    torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((len(moved),), rate), rtol=1e-3, atol=0)


def test_clipping_counts_the_rows_too(tmp_path, monkeypatch):
    run = training(tmp_path, config())
    given, clip = [], run.optimizer.clip
    monkeypatch.setattr(run.optimizer, "clip", lambda also: given.extend(also) or clip(also))
    run.step()
    run.close()
    assert [rows.shape[1] for rows in given] == [4]
    assert given[0].any()


def test_experts_are_balanced_after_every_step(tmp_path):
    run = finish(training(tmp_path, config(EVERYTHING, steps=1)))
    experts = run.model.blocks[1].ffn
    assert experts.bias.any()
    assert not experts.load.any()


class Sizes(TorchDispatchMode):
    """Notes every operator that takes or gives a tensor with as many elements as the table has rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.seen = rows, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if any(tensor.numel() >= self.rows for tensor in tensors):
            self.seen.add(function.overloadpacket.__name__)
        return result


def test_nothing_in_a_step_has_the_size_of_the_table(tmp_path):
    """No dense gradient, no optimizer pass: only gathers and scatters of rows see the table."""
    wide = replace(ENGRAM, memory=replace(ENGRAM.memory, hash=replace(ENGRAM.memory.hash, rows_per_head=25_000)))
    run = training(tmp_path, config(wide, checkpoint_every=0))
    run.step()  # the optimizer makes its state
    with Sizes(run.lookup.table.num_rows) as sizes:
        run.step()
    run.close()
    assert sizes.seen == {"index_select", "index_copy_"}
    assert all(p.numel() < 25_000 for p in run.model.parameters())
    assert all(tensor.numel() < 25_000 for tensor in run.optimizer.state().values())


def test_a_table_behind_a_gpu_trains_as_one_on_the_device(tmp_path, monkeypatch):
    settings = config(table=TableConfig(encoding="fp8_e8m0", std=0.1), steps=8)
    finish(training(tmp_path / "device", settings))
    monkeypatch.setattr(tiers, "on_gpu", lambda device: True)
    monkeypatch.setattr(pinned, "SideStream", lambda device: LateSide())
    for name, memory in ("pinned", 0.0), ("with hot rows", 2e-6):
        table = replace(settings.table, tier="host", device_memory=memory)
        run = training(tmp_path / name, replace(settings, table=table))
        assert isinstance(run.lookup.table, pinned.PinnedTable)
        assert (run.lookup.table.hot is not None) == (memory > 0)
        finish(run)
        assert_same(outcome(tmp_path / "device"), outcome(tmp_path / name))


def test_only_deterministic_operations(tmp_path):
    finish(training(tmp_path / "any", config()))
    try:
        run = finish(training(tmp_path / "deterministic", config(deterministic=True)))
        assert torch.are_deterministic_algorithms_enabled()
        assert run.done
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # as it was: other tests find unwritten memory by it
    assert_same(outcome(tmp_path / "any"), outcome(tmp_path / "deterministic"))


def test_leaf_rows_take_the_sum_of_all_reads():
    lookup = lookup_of(ENGRAM)
    leaf = lookup.leaf(torch.tensor([[3, 4, 3, 4], [3, 4, 3, 4]]))
    assert isinstance(leaf, Leaf)
    (leaf.expand(0, 1).sum() + 2 * leaf.expand(1, 2).sum()).backward()
    reads = torch.bincount(leaf.inverse.flatten(), minlength=len(leaf.unique))
    assert torch.equal(leaf.rows.grad, (reads * 1.5)[:, None].expand_as(leaf.rows))


def test_arms_differ_in_the_memory_alone(tmp_path):
    seen = {}

    class Recorded:
        def __init__(self, arm):
            self.arm, self.loader = arm, Loader(split(), 4, 10)

        def next(self, state):
            batch, state = self.loader.next(state)
            seen.setdefault(self.arm, []).append(batch.tokens)
            return batch, state

    arms = ("base", "capacity_1", "engram")
    runs = {
        arm: training(tmp_path / arm, config(model_of_arm(ENGRAM, arm), steps=3), batches=Recorded(arm)) for arm in arms
    }
    base, capacity_1, engram = (dict(runs[arm].model.named_parameters()) for arm in arms)
    assert capacity_1.keys() == engram.keys()
    assert {name for name in engram if ".memory." in name} == engram.keys() - base.keys() != set()
    for name, parameter in engram.items():
        assert torch.equal(parameter, capacity_1[name])
        assert name not in base or torch.equal(parameter, base[name])
    assert runs["capacity_1"].lookup.table.num_rows == 4  # one row a head
    for arm in arms:
        finish(runs[arm])
    assert len(seen["base"]) == 3
    for tokens in zip(*seen.values(), strict=True):
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[0], tokens[2])


def test_an_arm_needs_a_memory():
    assert model_of_arm(ENGRAM, "engram") == ENGRAM
    assert model_of_arm(ENGRAM, "base") == BASE
    with pytest.raises(ConfigError, match="has none"):
        model_of_arm(BASE, "capacity_1")


# --- going on -----------------------------------------------------------------------------------------------


def test_a_run_stopped_anywhere_ends_the_same(tmp_path, model):
    settings = config(model, steps=5, checkpoint_every=0, accumulate=2)
    finish(training(tmp_path / "whole", settings))
    whole = outcome(tmp_path / "whole")
    assert whole["step"] == 5
    for stop in range(1, 5):
        first = training(tmp_path / str(stop), settings)
        for _ in range(stop):
            first.step()
        first.save()
        first.close()
        second = training(tmp_path / str(stop), settings, resume=True)
        assert second.done_steps == stop
        finish(second)
        assert_same(outcome(tmp_path / str(stop)), whole)


def test_a_run_stopped_at_every_step_ends_the_same(tmp_path):
    settings = config(EVERYTHING, steps=5, checkpoint_every=1)
    finish(training(tmp_path / "whole", settings))
    for _ in range(5):
        finish(training(tmp_path / "parts", settings, resume=True), steps=1)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_a_finished_run_resumes_to_nothing(tmp_path):
    finish(training(tmp_path, config()))
    before = outcome(tmp_path)
    run = training(tmp_path, config(), resume=True)
    assert run.done
    assert train(run)
    assert_same(outcome(tmp_path), before)


def test_evaluations_come_once_whatever_happens(tmp_path):
    calls = []

    def evaluate(model, lookup):
        assert not model.training
        assert not torch.is_grad_enabled()
        calls.append(1)
        return {"val_loss": 1.0}

    settings = config(steps=5, eval_every=2, checkpoint_every=3)
    run = training(tmp_path, settings, evaluate=evaluate)
    for _ in range(4):
        run.step()  # evaluated at 2 and 4, saved at 3
    run.close()
    run = finish(training(tmp_path, settings, evaluate=evaluate, resume=True))
    assert [line["step"] for line in run.metrics.lines if "val_loss" in line] == [2, 4, 5]
    assert [line["step"] for line in run.metrics.lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path / "metrics.jsonl") == run.metrics.lines
    assert len(calls) == 4


def test_checkpoints_come_when_they_are_due(tmp_path):
    run = training(tmp_path, config(steps=5, checkpoint_every=2, keep_checkpoints=9))
    finish(run)
    assert [path.name[-1] for path in checkpoints(tmp_path / "checkpoints")] == ["2", "4", "5"]
    facts = Checkpoint(latest(tmp_path / "checkpoints")).facts
    assert facts["config"]["steps"] == 5
    assert facts["loader"] == {"epoch": run.loader_state.epoch, "index": run.loader_state.index}
    assert facts["address_digest"] == run.lookup.digest
    assert TrainConfig(**{**vars(config()), "steps": 5, "keep_checkpoints": 9}) == run.config


def test_saving_twice_writes_once(tmp_path):
    run = training(tmp_path, config())
    run.save()
    assert latest(tmp_path / "checkpoints") is None  # nothing has been learned yet
    run.step()
    run.save()
    written = latest(tmp_path / "checkpoints") / "model.safetensors"
    before = written.stat().st_mtime_ns
    run.save()
    assert written.stat().st_mtime_ns == before
    run.close()


def test_together_is_the_same_as_alone(tmp_path):
    for arm in ("base", "engram"):
        finish(training(tmp_path / "alone" / arm, config(MODELS[arm])))
    runs = {arm: training(tmp_path / "together" / arm, config(MODELS[arm])) for arm in ("base", "engram")}
    assert train_together(runs)
    for arm, run in runs.items():
        assert not run.model.training
        assert_same(outcome(tmp_path / "together" / arm), outcome(tmp_path / "alone" / arm))
        training(tmp_path / "together" / arm, config(MODELS[arm]), resume=True).close()  # the directory is free


# --- Ctrl-C -------------------------------------------------------------------------------------------------


UNPREPARED = config(prefetch=False)  # a batch is loaded in its own step


class Interrupting:
    """Batches during whose n-th the user presses Ctrl-C."""

    def __init__(self, at: int, number: int) -> None:
        self.loader, self.left, self.number = Loader(split(), 4, 10), at, number

    def next(self, state):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return self.loader.next(state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on(tmp_path, number):
    finish(training(tmp_path / "whole", UNPREPARED))
    before = signal.getsignal(number)
    stopped = training(tmp_path / "run", UNPREPARED, batches=Interrupting(3, number))
    assert train(stopped) is False
    assert signal.getsignal(number) is before
    assert stopped.done_steps == 3  # the step was finished
    assert latest(tmp_path / "run" / "checkpoints").name == "step-000003"
    assert train(training(tmp_path / "run", UNPREPARED, resume=True))
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


@pytest.fixture
def interrupts():
    """Python's own handler of Ctrl-C, also where the tests themselves were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_kills(interrupts):
    with interruptible() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_all_runs_stop_together_after_the_same_step(tmp_path):
    runs = {
        "first": training(tmp_path / "first", UNPREPARED, batches=Interrupting(2, signal.SIGINT)),
        "second": training(tmp_path / "second", UNPREPARED),
    }
    assert not train_together(runs)
    for name, run in runs.items():
        assert run.done_steps == 2
        assert latest(tmp_path / name / "checkpoints").name == "step-000002"


def test_a_signal_after_the_last_step_changes_nothing(tmp_path):
    run = training(tmp_path, UNPREPARED, batches=Interrupting(6, signal.SIGINT))
    assert train(run)


def test_training_works_in_a_thread(tmp_path):
    """Where signals cannot be caught, nobody tries."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(training(tmp_path, config(steps=2)))))
    thread.start()
    thread.join()
    assert results == [True]


# --- metrics ------------------------------------------------------------------------------------------------


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for cut in range(len(text) + 1):
        path.write_text(text[:cut])
        assert read_metrics(path) == lines[: text[:cut].count("\n")]
    assert read_metrics(tmp_path / "none") == []


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val_loss": 1}\n{"step": 3}\n{"st')
    metrics = Metrics(path, after=2)
    metrics.add(step=3, loss=2.0)
    assert (
        read_metrics(path)
        == metrics.lines
        == [{"step": 1}, {"step": 2}, {"step": 2, "val_loss": 1}, {"step": 3, "loss": 2.0}]
    )


def test_metrics_on_a_full_disk(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", after=0)
    metrics.path.unlink()
    metrics.path.symlink_to("/dev/full")
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: cannot be written .*No space left.*go on with --resume"
    ):
        metrics.add(step=1)


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"length": -1}, "length must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"eval_every": -1}, "eval_every must be at least 0"),
        ({"threads": -1}, "threads must be at least 0"),
        ({"accumulate": 3}, "batch_size 4 cannot be computed in 3 equal parts"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_presets_train_by_default():
    assert TrainConfig(model=PRESETS["tiny"]).steps > 0


def test_a_device_that_is_not_there_is_named():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used: "):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="device 'cuda:99' cannot be used: "):
        choose_device("cuda:99")


def test_differences_are_told_by_their_path():
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    assert list(differences(old, {"a": {"b": 1, "c": [2]}, "d": {"e": 1}})) == [
        ("a.c", [1], [2]),
        ("d", None, {"e": 1}),
    ]
    assert list(differences(old, old)) == []
