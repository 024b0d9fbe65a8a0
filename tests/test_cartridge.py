"""Cartridges: the same logits after a save and a mount on any tier, and errors where there is anything wrong with them."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from hf_tiny import ENGRAM, HASH, enliven, tiny_batch, tiny_memory, tiny_model, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from engram_lm.cli import cartridge as commands
from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.hf import cartridge
from engram_lm.hf.attach import Memory, attach, mounted, using
from engram_lm.hf.cartridge import mount, push_to_hub, read, save, unmount, verify
from engram_lm.hf.manifest import FILES, tokenizer_digest
from engram_lm.hf.training import RowwiseAdamW
from engram_lm.memory import EngramConfig
from engram_lm.tables import DiskTable, TableConfig
from engram_lm.tables.copied import copy_table
from engram_lm.tables.file import TableFile
from engram_lm.tables.rows import RowFormat

TOKENS = tiny_batch()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def frozen_model() -> PreTrainedModel:
    """One whose own weights do not train."""
    return tiny_model().requires_grad_(False)


def train(model: PreTrainedModel, steps: int = 2) -> None:
    """A few updates of rows and projections."""
    optimizer = RowwiseAdamW(model, lr=1e-2, table_lr=0.1)
    model.train()
    for step in range(steps):
        batch = tiny_batch(seed=step)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def tier(name: str, **options: Any) -> TableConfig:
    return TableConfig(name, memory=options.pop("memory", 1e-4), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A cartridge, and the logits of the model that it was saved from."""
    model = tiny_model()
    tiny_memory(model)
    directory = tmp_path_factory.mktemp("cartridges") / "facts"
    return save(model, directory, tiny_tokenizer(), card={"license": "mit", "tags": ["people"]}), logits(model)


@pytest.fixture
def copy(saved: tuple[Path, Tensor], tmp_path: Path) -> Path:
    """A cartridge to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


# --- the same memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "device", "host", "disk"])
def test_mounted_anywhere_it_gives_the_same_logits_and_leaves_no_trace(saved: tuple[Path, Tensor], name: str):
    directory, expected = saved
    model = tiny_model()
    before, state, generator = logits(model), set(model.state_dict()), torch.get_rng_state()
    memory = mount(model, directory, tokenizer=tiny_tokenizer(), table=tier(name))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, before)
    assert list(mounted(model)) == [memory.name] == ["facts"]
    assert isinstance(memory.lookup.table, DiskTable) == (name == "disk")
    unmount(model, "facts")
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == state


CONFIGS = st.fixed_dictionaries(
    {
        "orders": st.sampled_from([(2,), (2, 3), (1, 2, 4)]),
        "heads": st.integers(1, 3),
        "layers": st.sampled_from([(0,), (3,), (1, 2), (2, 0)]),
        "encoding": st.sampled_from(["fp32", "bf16", "int8", "fp8_e8m0"]),
        "conv_kernel": st.sampled_from([0, 3]),
        "gate": st.sampled_from(["plain", "signed_sqrt", "copysign_sqrt"]),
        "bias": st.booleans(),
        "std": st.sampled_from([0.0, 0.5]),
        "serving": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "scheme": st.sampled_from(["engram", "ple", "capacity_1"]),
        "tiers": st.permutations(["device", "host", "disk"]),
    }
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=CONFIGS, seed=st.integers(0, 99))
def test_any_memory_comes_back_on_any_tier(drawn: dict[str, Any], seed: int, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("any")
    given_tier, first, second = drawn["tiers"]
    hash = HashConfig(drawn["orders"], drawn["heads"], 61, drawn["layers"], pad_id=1, seed=seed, scheme=drawn["scheme"])
    engram = EngramConfig(32, gate=drawn["gate"], bias=drawn["bias"], conv_kernel=drawn["conv_kernel"])
    table = tier(given_tier, encoding=drawn["encoding"], std=drawn["std"], seed=seed)
    model = frozen_model().to(drawn["dtype"])
    memory = attach(model, engram, tiny_tokenizer(), hash=hash, table=table, directory=root, name="any", seed=seed)
    train(model)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    memory.to(drawn["dtype"])
    expected = logits(model)
    exact = not drawn["std"] or drawn["encoding"] == "fp32"  # else rows that were never written are rounded for serving
    directory = save(model, root / "any", tiny_tokenizer(), serving=drawn["serving"] and exact)
    assert torch.equal(logits(model), expected)
    unmount(model)
    for name in (first, second):
        fresh = tiny_model().to(drawn["dtype"])
        mount(fresh, directory, tokenizer=tiny_tokenizer(), table=tier(name))
        assert torch.equal(logits(fresh), expected)
        unmount(fresh)
    verify(directory)


def test_several_at_once_each_switched_by_name(tmp_path: Path):
    alone = {}
    for seed, name in enumerate(("cities", "people")):
        model = tiny_model()
        tiny_memory(model, seed=seed)
        save(model, tmp_path / name, tiny_tokenizer())
        alone[name] = logits(model)
    model = tiny_model()
    before = logits(model)
    for name in alone:
        mount(model, tmp_path / name, table=tier("disk"))
    mount(model, tmp_path / "people", name="again", table=tier("disk"))
    for name, expected in [*alone.items(), ("again", alone["people"])]:
        with using(model, name):
            assert torch.equal(logits(model), expected)
    with using(model):
        assert torch.equal(logits(model), before)
    both = logits(model)
    unmount(model, "again")
    assert not torch.equal(logits(model), both)
    unmount(model)
    assert torch.equal(logits(model), before)


def test_a_name_is_refused_before_any_rows_are_read(saved: tuple[Path, Tensor], tmp_path: Path):
    model = tiny_model()
    mount(model, saved[0])
    target = tmp_path / "rows.safetensors"
    with pytest.raises(ConfigError, match="'facts' is there already"):
        mount(model, saved[0], trainable=True, table=tier("disk", file=str(target)))
    assert not target.exists()


def test_the_memory_is_named_where_there_are_several(tmp_path: Path):
    model = tiny_model()
    with pytest.raises(ConfigError, match="memories \\(none\\)"):
        save(model, tmp_path / "one", tiny_tokenizer())
    for name in ("one", "two"):
        tiny_memory(model, name=name)
    with pytest.raises(ConfigError, match="one, two: name one"):
        save(model, tmp_path / "one", tiny_tokenizer())
    with pytest.raises(ConfigError, match="none is called 'three'"):
        save(model, tmp_path / "one", tiny_tokenizer(), name="three")
    assert not (tmp_path / "one").exists()


def test_rows_in_another_encoding_are_rounded_and_half_the_size(tmp_path: Path):
    model = tiny_model()
    memory = tiny_memory(model, replace(ENGRAM, row_dim=32))
    save(model, tmp_path / "full", tiny_tokenizer())
    save(model, tmp_path / "small", tiny_tokenizer(), encoding="int8", serving=True)
    sizes = [(tmp_path / name / "table.safetensors").stat().st_size for name in ("full", "small")]
    assert sizes[1] < 0.5 * sizes[0]
    fresh = tiny_model()
    small = mount(fresh, tmp_path / "small")
    ids = torch.arange(memory.lookup.table.num_rows)
    error = (small.lookup.table.fetch(ids) - memory.lookup.table.fetch(ids)).abs().max()
    assert 0 < error < 4.5 / 127  # half a step of the largest of 32 normal numbers
    assert read(tmp_path / "small").encoding == "int8"


# --- tables on disk -------------------------------------------------------------------------------------------------


def test_the_newest_rows_of_a_table_on_disk_are_saved_and_its_run_goes_on(tmp_path: Path):
    model = frozen_model()
    attach(model, ENGRAM, tiny_tokenizer(), hash=HASH, table=tier("disk", file=str(tmp_path / "rows")))
    table = mounted(model)["memory"].lookup.table
    every = torch.arange(table.num_rows)
    train(model)
    table.save(tmp_path)  # a checkpoint of the run
    clock, rows = table.clock, table.fetch(every)
    train(model)
    expected = logits(model)
    directory = save(model, tmp_path / "facts", tiny_tokenizer())
    fresh = tiny_model()
    assert mount(fresh, directory).lookup.table.clock == table.clock == 2 * clock
    assert torch.equal(logits(fresh), expected)
    table.load(tmp_path, clock)
    assert torch.equal(table.fetch(every), rows)
    assert not torch.equal(logits(model), expected)
    unmount(model)


def test_a_table_that_cannot_be_read_as_a_whole_is_refused(tmp_path: Path):
    class Elsewhere:
        form = RowFormat(4)
        digest, clock = "", 0

    with pytest.raises(ConfigError, match="a Elsewhere cannot be copied"):
        copy_table(Elsewhere(), tmp_path / "rows")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_damaged_rows_are_not_made_into_a_sound_cartridge(tmp_path: Path):
    model = tiny_model()
    memory = tiny_memory(model, table=tier("disk", file=str(tmp_path / "rows")))
    table = memory.lookup.table
    table.save(tmp_path)
    table.store.inner.compact()  # type: ignore[attr-defined]
    flip(tmp_path / "rows", 20_000)
    with pytest.raises(DataError, match="does not match its checksum"):
        save(model, tmp_path / "facts", tiny_tokenizer())
    assert {path.name for path in tmp_path.iterdir()} <= {"rows", "rows.journal", "table.txt"}
    unmount(model)


def test_a_hundred_million_rows_take_no_memory(tmp_path: Path):
    hash = HashConfig((2, 3), 8, 6_400_000, (1,), pad_id=1)
    model = frozen_model()
    attach(model, ENGRAM, tiny_tokenizer(), hash=hash, table=tier("disk"), directory=tmp_path)
    train(model, steps=1)
    expected = logits(model)
    directory = save(model, tmp_path / "large", tiny_tokenizer())
    unmount(model)
    facts = read(directory)
    assert facts.rows > 100_000_000
    assert 0 < facts.rows_written < 10_000
    status = (directory / "table.safetensors").stat()
    assert status.st_size > 2e9
    assert 512 * status.st_blocks < 2e7
    fresh = tiny_model()
    memory = mount(fresh, directory, table=tier("disk", memory=1e-3))
    assert torch.equal(logits(fresh), expected)
    assert memory.lookup.table.resident < 5e6  # the cache, and a byte for each block of 64 rows
    unmount(fresh)


# --- going on -------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_mounted_cartridge_does_not_train(saved: tuple[Path, Tensor]):
    directory, expected = saved
    model = frozen_model()
    mount(model, directory)
    with pytest.raises(ConfigError, match="nothing would change"):
        RowwiseAdamW(model)
    model.lm_head.weight.requires_grad_(True)
    train(model)
    fresh = tiny_model()
    fresh.lm_head.load_state_dict(model.lm_head.state_dict())
    mount(fresh, directory)
    assert torch.equal(logits(model), logits(fresh))
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["device", "host", "disk"])
def test_training_goes_on_as_if_it_had_never_been_saved(name: str, tmp_path: Path):
    model = frozen_model()
    table = TableConfig("device", "bf16")  # rounded stochastically: the clock counts
    attach(model, ENGRAM, tiny_tokenizer(), hash=HASH, table=table)
    train(model)
    directory = save(model, tmp_path / "facts", tiny_tokenizer())
    saved_logits, before = logits(model), contents(directory)
    fresh = frozen_model()
    file = str(tmp_path / "copied") if name == "disk" else ""
    memory = mount(fresh, directory, trainable=True, table=tier(name, file=file))
    train(model)
    train(fresh)
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.equal(logits(fresh), saved_logits)
    assert memory.lookup.table.clock == 4
    assert contents(directory) == before
    save(fresh, directory, tiny_tokenizer())
    unmount(fresh)
    again = tiny_model()
    mount(again, directory)
    assert torch.equal(logits(again), logits(model))


def test_what_cannot_be_trained_says_so(saved: tuple[Path, Tensor], tmp_path: Path):
    with pytest.raises(ConfigError, match="would change the cartridge itself"):
        mount(tiny_model(), saved[0], trainable=True, table=tier("disk"))
    with pytest.raises(ConfigError, match="would have been ignored"):
        mount(tiny_model(), saved[0], table=tier("disk", file=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="rows have 'fp32'"):
        mount(tiny_model(), saved[0], table=TableConfig(encoding="int8"))
    model = tiny_model()
    mount(model, saved[0])
    save(model, tmp_path / "serving", tiny_tokenizer(), serving=True)
    with pytest.raises(ConfigError, match="saved for serving"):
        mount(tiny_model(), tmp_path / "serving", trainable=True)


# --- what does not belong together ----------------------------------------------------------------------------------


def test_another_model_is_refused(saved: tuple[Path, Tensor]):
    directory, _ = saved
    for model, message in (
        (tiny_model(seed=1), "would have misled"),
        (tiny_model("qwen2"), "would have misled"),
        (tiny_model(vocab_size=401), "differ in vocab_size"),
        (tiny_model(num_hidden_layers=5), "differ in layers"),
        (tiny_model(hidden_size=48), "differ in hidden_size"),
    ):
        with pytest.raises(MismatchError, match=message):
            mount(model, directory)
        assert mounted(model) == {}
        assert not hasattr(model.model, "engram")
    other = tiny_model(seed=1)
    assert mount(other, directory, strict=False).name == "facts"
    with pytest.raises(MismatchError, match="differ in layers"):
        mount(tiny_model(num_hidden_layers=5), directory, strict=False)
    assert mount(tiny_model().to(torch.bfloat16), directory).name == "facts"  # the same weights


def retokenized(**changes: Any) -> Tokenizer:
    said = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    said["model"]["merges"] = said["model"]["merges"][: changes.pop("merges", None)]
    return Tokenizer.from_str(json.dumps(said | changes))


def test_another_tokenizer_is_refused(saved: tuple[Path, Tensor], tmp_path: Path):
    directory, _ = saved
    model = tiny_model()
    with pytest.raises(MismatchError, match="other tokens would have addressed"):
        mount(model, directory, tokenizer=retokenized(merges=50))
    with pytest.raises(TypeError, match="fast tokenizer"):
        mount(model, directory, tokenizer="a name")
    tiny_memory(model)
    other = tiny_tokenizer().train_new_from_iterator(["quite another text, other words"], 380, show_progress=False)
    with pytest.raises(MismatchError, match="not the one that the memory 'memory' was attached with"):
        save(model, tmp_path / "facts", other)


def test_what_a_call_sets_does_not_make_another_tokenizer(saved: tuple[Path, Tensor], tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer(["one text", "and a longer one"], padding=True, truncation=True, max_length=4)
    mount(tiny_model(), saved[0], tokenizer=tokenizer)
    assert tokenizer_digest(tokenizer) != tokenizer_digest(retokenized(merges=50))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_adapters_inside_of_a_memory_are_not_lost_silently(tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    tiny_memory(model, name="one")
    inside = peft.get_peft_model(model, peft.LoraConfig(target_modules=["project", "q_proj"]))
    with pytest.raises(MismatchError, match="adapters in it would have been lost"):
        save(inside, tmp_path / "facts", tiny_tokenizer())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_on_a_model_with_adapters_it_is_mounted_and_saved_as_on_any(saved: tuple[Path, Tensor], tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    mount(model, saved[0])
    assert torch.equal(logits(model), saved[1])
    save(model, tmp_path / "again", tiny_tokenizer())
    fresh = tiny_model()
    mount(fresh, tmp_path / "again")
    assert torch.equal(logits(fresh), saved[1])


# --- faults ---------------------------------------------------------------------------------------------------------


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


CHECKED = FILES[:4]


@pytest.mark.parametrize("name", CHECKED)
def test_a_file_that_is_missing_or_cut_is_refused(copy: Path, name: str):
    data = (copy / name).read_bytes()
    for cut in (len(data) - 2, len(data) // 2, 0):
        (copy / name).write_bytes(data[:cut])
        for use in (verify, lambda path: mount(tiny_model(), path, table=tier("disk"))):
            with pytest.raises(DataError, match=name):
                use(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=name):
        mount(tiny_model(), copy)


@pytest.mark.parametrize("name", CHECKED)
def test_any_flipped_bit_is_found_or_harmless(copy: Path, saved: tuple[Path, Tensor], name: str):
    path = copy / name
    sound = path.read_bytes()
    model, found = tiny_model(), 0
    places = np.random.default_rng(0).integers(len(sound), size=24).tolist()
    for place in [0, 9, len(sound) - 1, *places]:
        flip(path, place)
        try:
            mount(model, copy)
        except (DataError, MismatchError):
            found += 1
        else:
            assert torch.equal(logits(model), saved[1])  # white space, or the like
            unmount(model)
        path.write_bytes(sound)
    assert found >= (25 if name.endswith("safetensors") else 18)


def test_rows_that_are_read_in_place_are_verified_on_request(copy: Path):
    flip(copy / "table.safetensors", -100)
    model = tiny_model()
    mount(model, copy, table=tier("disk"))
    unmount(model)
    with pytest.raises(DataError, match="1 of 29 blocks are damaged"):
        verify(copy)


@pytest.mark.parametrize("name", ["device", "host", "disk"])
def test_rows_that_a_copy_allocated_and_never_wrote_are_missed(copy: Path, name: str):
    path = copy / "table.safetensors"
    with TableFile.open(path) as file:
        start = file.rows_offset
    size = path.stat().st_size
    os.truncate(path, start)
    os.truncate(path, size)
    with pytest.raises(DataError, match="29 blocks of rows are holes"):
        mount(tiny_model(), copy, table=tier(name))


def test_files_of_different_cartridges_are_told_apart(copy: Path, tmp_path: Path):
    model = tiny_model()
    tiny_memory(model, seed=1)
    other = save(model, tmp_path / "other", tiny_tokenizer())
    for name in ("model.safetensors", "table.safetensors"):
        mixed = Path(shutil.copytree(copy, tmp_path / f"mixed-{name}"))
        shutil.copy(other / name, mixed)
        with pytest.raises(DataError, match="of another cartridge"):
            mount(tiny_model(), mixed, table=tier("disk"))


def test_a_cartridge_whose_own_table_was_trained_is_refused(copy: Path):
    table = DiskTable(copy / "table.safetensors", write=True)
    table.update(torch.tensor([3]), torch.ones(1, table.dim), 1.0)
    table.save(copy)
    table.close()
    with pytest.raises(DataError, match="no longer those that were saved"):
        mount(tiny_model(), copy, table=tier("disk"))


def test_a_newer_format_and_what_is_no_cartridge_are_named(copy: Path, tmp_path: Path):
    path = copy / "cartridge.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"format": "engram-cartridge/2", "engram_lm": "9.9"}))
    with pytest.raises(MismatchError, match=r"engram-cartridge/2.*written by engram-lm 9\.9"):
        mount(tiny_model(), copy)
    for text in ("[]", "{}", '{"format": "engram-table/1"}'):
        path.write_text(text)
        with pytest.raises(DataError, match="does not say that it is a cartridge"):
            mount(tiny_model(), copy)
    with pytest.raises(DataError, match=r"no cartridge, for there is no cartridge\.json"):
        mount(tiny_model(), tmp_path)
    with pytest.raises(DataError, match="no cartridge"):
        mount(tiny_model(), tmp_path / "nowhere")


# --- writing --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def failing(patch: pytest.MonkeyPatch, at: int, error: BaseException) -> Iterator[list[str]]:
    """Raise at the `at`-th write or rename of a save; the list is of those that were tried."""
    tried: list[str] = []

    def watched(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            tried.append(f"{name} {next((a for a in arguments if isinstance(a, Path)), '')}")
            if len(tried) == at:
                raise error
            return real(*arguments, **options)

        patch.setattr(owner, name, wrapper)

    with patch.context():
        watched(cartridge.safetensors.torch, "save_file")
        watched(os, "pwrite")
        watched(Path, "write_text")
        watched(Path, "rename")
        watched(cartridge, "sync")
        yield tried


def attempts(model: PreTrainedModel, directory: Path) -> int:
    """Writes, renames and so on of a save that replaces a cartridge."""
    save(model, directory, tiny_tokenizer())
    with pytest.MonkeyPatch.context() as patch, failing(patch, -1, Killed()) as tried:
        save(model, directory, tiny_tokenizer())
    kinds = " ".join(tried)
    assert all(word in kinds for word in ("save_file", "pwrite", "write_text", "rename", "sync"))
    return len(tried)


def test_a_full_disk_leaves_what_was_there(copy: Path, saved: tuple[Path, Tensor]):
    model = tiny_model()
    enliven(mount(model, saved[0]), seed=5)
    rounds, before = attempts(model, copy.with_name("scratch")), contents(copy)
    for at in range(1, rounds + 1):
        full = OSError(errno.ENOSPC, "No space left on device")
        with (
            pytest.MonkeyPatch.context() as patch,
            failing(patch, at, full),
            pytest.raises(CheckpointError, match=r"copy: .*No space left"),
        ):
            save(model, copy, tiny_tokenizer())
        assert contents(copy) == before
        assert {path.name for path in copy.parent.iterdir()} == {"copy", "scratch"}


def test_killed_at_any_moment_it_is_whole_or_absent(saved: tuple[Path, Tensor], tmp_path: Path):
    model = tiny_model()
    enliven(mount(model, saved[0]), seed=5)
    new, directory = logits(model), tmp_path / "facts"
    shutil.copytree(saved[0], directory)
    rounds = attempts(model, tmp_path / "scratch")
    seen = set()
    for at in range(1, rounds + 1):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(saved[0], directory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cartridge.shutil, "rmtree", lambda *arguments, **options: None)  # nobody cleans up
            with failing(patch, at, Killed()), pytest.raises(Killed):
                save(model, directory, tiny_tokenizer())
        fresh = tiny_model()
        if directory.exists():
            mount(fresh, directory)
            there = logits(fresh)
            assert torch.equal(there, new) or torch.equal(there, saved[1])
            seen.add("new" if torch.equal(there, new) else "old")
        else:
            with pytest.raises(DataError, match=r"facts\.old: rename that"):
                mount(fresh, directory)
            verify(tmp_path / "facts.old")
            seen.add("absent")
        shutil.rmtree(tmp_path / "facts.partial", ignore_errors=True)
        shutil.rmtree(tmp_path / "facts.old", ignore_errors=True)
    assert seen == {"absent", "new", "old"}


def test_what_a_killed_save_left_is_cleared_by_the_next(copy: Path, saved: tuple[Path, Tensor]):
    model = tiny_model()
    mount(model, saved[0])
    copy.rename(copy.with_name("copy.old"))
    shutil.copytree(saved[0], copy.with_name("copy.partial"))
    save(model, copy, tiny_tokenizer())
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_other_files_are_never_lost(copy: Path, saved: tuple[Path, Tensor], tmp_path: Path):
    model = tiny_model()
    mount(model, saved[0])
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which would have been lost"):
        save(model, copy, tiny_tokenizer())
    assert (copy / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    verify(save(model, tmp_path / "empty", tiny_tokenizer()))
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(CheckpointError, match="no cartridge can be written"):
        save(model, tmp_path / "file", tiny_tokenizer())


# --- what it says of itself -----------------------------------------------------------------------------------------


def test_facts_and_card(saved: tuple[Path, Tensor]):
    from huggingface_hub import ModelCard

    facts = read(saved[0])
    table = TableFile.open(saved[0] / "table.safetensors")
    assert (facts.rows, facts.encoding, facts.trainable) == (table.num_rows, "fp32", True)
    assert facts.rows_written == facts.rows
    assert facts.addresses == table.digest
    assert (facts.model.model_type, facts.model.architecture, facts.model.layers) == ("llama", "LlamaModel", 4)
    table.close()
    card = ModelCard.load(saved[0] / "README.md")
    assert card.data.to_dict() == {
        "library_name": "engram-lm",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["engram", "conditional-memory", "people"],
    }
    assert facts.addresses in card.text


@pytest.mark.parametrize(("name", "known"), [("owner/base", True), ("gpt2", True), ("/home/me/base", False)])
def test_the_base_is_named_unless_it_is_a_path(name: str, known: bool, tmp_path: Path):
    model = tiny_model()
    model.name_or_path = name
    tiny_memory(model, live=False)
    directory = save(model, tmp_path / "facts", tiny_tokenizer())
    assert read(directory).model.name == (name if known else "")
    card = (directory / "README.md").read_text()
    assert (f"base_model: {name}" in card) == known
    assert read(directory).rows_written == 0
    if not known:
        assert not any("/home/me" in (directory / file).read_text() for file in ("cartridge.json", "README.md"))


def test_commands(saved: tuple[Path, Tensor], copy: Path, capsys: pytest.CaptureFixture[str]):
    console = Console(width=200)
    assert commands.Cartridge(commands.Inspect(saved[0])).run(console) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("LlamaModel", "n-grams of 2, 3 tokens", "fp32, with accumulators"))
    assert commands.Cartridge(commands.Verify(saved[0])).run(console) == 0
    assert "intact" in capsys.readouterr().out
    flip(copy / "table.safetensors", -100)
    with pytest.raises(DataError, match="damaged"):
        commands.Cartridge(commands.Verify(copy)).run(console)


def test_a_memory_that_is_mounted_is_one_like_any_other(saved: tuple[Path, Tensor]):
    model = tiny_model()
    memory = mount(model, saved[0], name="mine")
    assert isinstance(memory, Memory)
    with torch.no_grad():
        greedy = {"max_new_tokens": 6, "do_sample": False}
        fresh = tiny_model()
        assert not torch.equal(model.generate(TOKENS, **greedy), fresh.generate(TOKENS, **greedy))
    assert next(iter(memory.parameters())).device == model.device


# --- the Hub --------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push and a download ask for: repositories in memory, a commit a revision."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # noqa: RUF012  name -> revision -> files
    objects: dict[str, bytes] = {}  # noqa: RUF012  large files by SHA-256
    requests: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self, body: Any = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        for pattern, respond in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return respond(self, *found.groups(), data)
        return self.answer({"error": f"no {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, data: bytes) -> None:
        asked = json.loads(data)
        self.requests.append(("create", asked))
        name = f"{asked['organization']}/{asked['name']}"
        self.repositories.setdefault(name, {"main": {}})
        self.answer({"url": f"http://{self.headers['Host']}/{name}"})

    def branch(self, name: str, revision: str, data: bytes) -> None:
        self.repositories[name].setdefault(revision, {})
        self.answer({})

    def preupload(self, name: str, revision: str, data: bytes) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("rs") else "regular", "shouldIgnore": False}
            for f in json.loads(data)["files"]
        ]
        self.answer({"files": files}, 200 if name in self.repositories else 404)

    def batch(self, name: str, data: bytes) -> None:
        where = f"http://{self.headers['Host']}/objects/"
        objects = [o | {"actions": {"upload": {"href": where + o["oid"]}}} for o in json.loads(data)["objects"]]
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str, data: bytes) -> None:
        self.objects[oid] = data
        self.answer({})

    def commit(self, name: str, revision: str, data: bytes) -> None:
        files = self.repositories[name][revision]
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.requests.append(("commit", value))
            else:
                large = line["key"] == "lfsFile"
                files[value["path"]] = self.objects[value["oid"]] if large else base64.b64decode(value["content"])
        self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/x", "commitOid": commit_of(files)})

    def files_of(self, name: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.repositories.get(name, {})
        return revisions.get(revision) or next((f for f in revisions.values() if commit_of(f) == revision), None)

    def info(self, name: str, revision: str, data: bytes) -> None:
        files = self.files_of(name, revision)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self.answer({"id": name, "sha": commit_of(files), "siblings": [{"rfilename": path} for path in files]})

    def tree(self, name: str, revision: str, data: bytes) -> None:
        files = self.files_of(name, revision) or {}
        self.answer([{"type": "file", "path": p, "size": len(f), "oid": etag(f)} for p, f in files.items()])

    def resolve(self, name: str, revision: str, path: str, data: bytes) -> None:
        files = self.files_of(name, revision) or {}
        self.answer(files[path], ETag=f'"{etag(files[path])}"', X_Repo_Commit=revision)


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


NAME = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", Hub.create),
    ("POST /api/validate-yaml", lambda hub, data: hub.answer({})),
    (f"POST /api/models/{NAME}/branch/(.+)", Hub.branch),
    (f"POST /api/models/{NAME}/preupload/(.+)", Hub.preupload),
    (f"POST /api/models/{NAME}/commit/(.+)", Hub.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT /objects/(.+)", Hub.put),
    (f"GET /api/models/{NAME}/revision/(.+)", Hub.info),
    (f"GET /api/models/{NAME}/tree/([^/]+)", Hub.tree),
    (f"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A Hub on this machine, which the client takes for the real one."""
    from huggingface_hub import constants

    Hub.repositories, Hub.objects, Hub.requests = {}, {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    try:
        yield Hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_pushed_to_the_hub_and_mounted_from_there(saved: tuple[Path, Tensor], hub: type[Hub], tmp_path: Path):
    directory, expected = saved
    url = push_to_hub(directory, "me/facts", private=True, token="hf_x", commit_message="first")
    assert url.endswith("/me/facts")
    assert hub.repositories["me/facts"]["main"] == contents(directory)
    assert [kind for kind, _ in hub.requests] == ["create", "commit"]
    assert hub.requests[0][1]["visibility"] == "private"
    assert hub.requests[1][1]["summary"] == "first"
    for name in ("host", "disk"):
        model = tiny_model()
        memory = mount(model, "me/facts", tokenizer=tiny_tokenizer(), table=tier(name), cache_dir=tmp_path)
        assert memory.name == "facts"
        assert torch.equal(logits(model), expected)
        unmount(model)


def test_a_revision_is_a_branch(saved: tuple[Path, Tensor], hub: type[Hub], tmp_path: Path):
    push_to_hub(saved[0], "me/facts", revision="second")
    assert hub.repositories["me/facts"]["main"] == {}
    model = tiny_model()
    mount(model, "me/facts", revision="second", cache_dir=tmp_path)
    assert torch.equal(logits(model), saved[1])


def test_without_a_network_the_cache_serves(
    saved: tuple[Path, Tensor], hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    push_to_hub(saved[0], "me/facts")
    with pytest.raises(DataError, match="me/facts: there is no such directory, and the Hub did not give"):
        mount(tiny_model(), "me/facts", cache_dir=tmp_path, local_files_only=True)
    mount(tiny_model(), "me/facts", cache_dir=tmp_path)
    hub.repositories.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for only in (True, False):
        model = tiny_model()
        mount(model, "me/facts", cache_dir=tmp_path, local_files_only=only)
        assert torch.equal(logits(model), saved[1])


def test_what_the_hub_does_not_have_or_has_damaged(copy: Path, hub: type[Hub], tmp_path: Path):
    with pytest.raises(DataError, match="me/nothing: there is no such directory"):
        mount(tiny_model(), "me/nothing", cache_dir=tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        mount(tiny_model(), "no/such/name", cache_dir=tmp_path)
    push_to_hub(copy, "me/facts")
    files = hub.repositories["me/facts"]["main"]
    files["model.safetensors"] = files["model.safetensors"][:-4] + bytes(4)
    with pytest.raises(DataError, match=r"model\.safetensors: truncated, altered"):
        mount(tiny_model(), "me/facts", cache_dir=tmp_path)
    del files["table.safetensors"]
    with pytest.raises(DataError, match=r"there is no table\.safetensors"):
        mount(tiny_model(), "me/facts", cache_dir=tmp_path)


def test_what_is_damaged_is_not_pushed(copy: Path, hub: type[Hub], saved: tuple[Path, Tensor]):
    flip(copy / "table.safetensors", -100)
    with pytest.raises(DataError, match="damaged"):
        push_to_hub(copy, "me/facts")
    assert hub.requests == []
    with pytest.raises(CheckpointError, match="cannot be uploaded to me/facts/extra"):
        push_to_hub(saved[0], "me/facts/extra")
    printed = Console(width=200, record=True)
    assert commands.Cartridge(commands.Push(saved[0], "me/facts")).run(printed) == 0
    assert "/me/facts" in printed.export_text()
