"""Checkpoints are whole or absent, and whatever is done to one on disk is noticed."""

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from tiny import copy, exit_code, killed_at

from engram_lm.errors import CheckpointError
from engram_lm.train import checkpoint as checkpoints
from engram_lm.train.checkpoint import Checkpoint, claim, latest, save, write_whole

PARTS = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)},
    "table": {"rows": torch.eye(3)},
}
FACTS = {"config": {"dim": 3, "name": "Größe"}, "loader": {"epoch": 1, "index": 4}}


def saved(directory: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        save(directory, step, PARTS, FACTS, keep)
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_whole(path: Path) -> None:
    opened = Checkpoint(path)
    assert opened.facts == {"step": int(path.name[-6:]), **FACTS}
    for part, tensors in PARTS.items():
        found = opened.part(part)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_is_saved_comes_back(tmp_path):
    final = save(tmp_path, 7, PARTS, FACTS)
    assert final == tmp_path / "step-000007" == latest(tmp_path)
    assert_whole(final)
    assert names(final) == ["facts.json", "manifest.json", "model.safetensors", "table.safetensors"]


def test_strided_and_trained_tensors_are_saved_as_they_are(tmp_path):
    wide = torch.arange(12.0, requires_grad=True).view(3, 4)
    final = save(tmp_path, 1, {"model": {"turned": wide.T, "part": wide[:, 1:3]}}, {})
    part = Checkpoint(final).part("model")
    assert torch.equal(part["turned"], wide.T)
    assert torch.equal(part["part"], wide[:, 1:3])
    assert not part["turned"].requires_grad


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        saved(tmp_path, step, keep=2)
        assert latest(tmp_path) == tmp_path / f"step-{step:06d}"
    assert names(tmp_path) == ["step-000006", "step-000008"]


def test_steps_are_compared_as_numbers(tmp_path):
    saved(tmp_path, 999_999, 1_000_000)
    assert latest(tmp_path) == tmp_path / "step-1000000"
    saved(tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["step-1000001"]


def test_nothing_is_the_latest_of_nothing(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    saved(tmp_path, 2)
    copy(tmp_path / "step-000002", tmp_path / "step-000002.bak")
    copy(tmp_path / "step-000002", tmp_path / "step-last")
    (tmp_path / "step-000009").mkdir()  # without a manifest it was never finished
    assert latest(tmp_path) == tmp_path / "step-000002"
    saved(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-000002.bak", "step-000004", "step-000009", "step-last"]


def test_leftovers_of_a_kill_are_ignored_and_cleared_away(tmp_path):
    saved(tmp_path, 2)
    copy(tmp_path / "step-000002", tmp_path / "step-000004.partial")
    copy(tmp_path / "step-000002", tmp_path / "step-000001.old.partial")
    assert latest(tmp_path) == tmp_path / "step-000002"
    saved(tmp_path, 6)
    assert names(tmp_path) == ["step-000002", "step-000006"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    saved(tmp_path, 2)
    (tmp_path / "step-000002" / "model.safetensors").write_bytes(b"")
    saved(tmp_path, 2)
    assert_whole(tmp_path / "step-000002")
    assert names(tmp_path) == ["step-000002"]


def test_killed_at_any_moment_of_a_save_every_checkpoint_is_whole(tmp_path, processes):
    """The newest is the old or the new one, and the next save clears away what is left."""
    newest = set()
    for number in range(1, 200):
        directory = tmp_path / str(number)
        saved(directory, 2, 4)
        code = exit_code(processes, killed_at, number, save, directory, 6, PARTS, FACTS, 1)
        assert code in (0, -signal.SIGKILL)
        for path in checkpoints.checkpoints(directory):
            assert_whole(path)
        newest.add(latest(directory).name)
        saved(directory, 8, keep=1)
        assert names(directory) == ["step-000008"]
        if code == 0:
            break
    assert number > 20
    assert newest == {"step-000004", "step-000006"}


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut leaves a whole checkpoint, too: all is synced, then renamed, then that is synced."""
    done, rename = [], Path.rename

    def fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", lambda *paths: done.append("rename") or rename(*paths))
    saved(tmp_path, 2)
    files = ["facts.json", "manifest.json", "model.safetensors", "step-000002.partial", "table.safetensors"]
    assert sorted(done[:5]) == files
    assert done[5:] == ["rename", tmp_path.name]


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_a_flipped_byte_anywhere_is_refused(tmp_path, flip):
    newest = saved(tmp_path, 2, 4) / "step-000004"
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            with pytest.raises(CheckpointError) as raised:
                Checkpoint(newest)
            message = str(raised.value)
            assert message.startswith(str(newest))
            assert f"Remove {newest} to go on from step-000002." in message
            assert path.name in message or path.name == "manifest.json"  # whose damage may show in any file
        path.write_bytes(content)
    assert_whole(newest)


@pytest.mark.parametrize("name", ["facts.json", "manifest.json", "model.safetensors", "table.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "missing", "directory"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    newest = saved(tmp_path, 2, 4) / "step-000004"
    path = newest / name
    content = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": content[:-1], "empty": b"", "longer": content + b"\0"}[damage])
    with pytest.raises(CheckpointError, match=rf"{name}: .*go on from step-000002\."):
        Checkpoint(newest)
    assert_whole(tmp_path / "step-000002")


@pytest.mark.parametrize(
    "manifest", ["", "null", "[]", "{}", '{"facts.json": 3}', '{"facts.json": [1]}', "3", "\ud800"]
)
def test_a_garbage_manifest_is_refused(tmp_path, manifest):
    only = saved(tmp_path, 2) / "step-000002"
    (only / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"step-000002.*There is no other checkpoint\."):
        Checkpoint(only)


def test_the_manifest_cannot_point_outside_of_its_own_files(tmp_path):
    only = saved(tmp_path, 2) / "step-000002"
    manifest = json.loads((only / "manifest.json").read_text())
    manifest["../elsewhere"] = "0" * 64
    (only / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="elsewhere: its checksum is no file"):
        Checkpoint(only)


def test_advice_compares_numbers_too(tmp_path):
    saved(tmp_path, 999_999, 1_000_000)
    (tmp_path / "step-1000000" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"go on from step-999999\."):
        Checkpoint(tmp_path / "step-1000000")


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Returns a function after whose call the n-th file operation of a save finds the disk full."""

    def fill(after: int) -> None:
        count = 0

        def counted(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > after:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*args, **kwargs)

            return call

        monkeypatch.setattr(checkpoints, "save_file", counted(checkpoints.save_file))
        monkeypatch.setattr(checkpoints, "sync", counted(checkpoints.sync))
        monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
        monkeypatch.setattr(Path, "mkdir", counted(Path.mkdir))

    return fill


@pytest.mark.parametrize("after", range(10))
def test_a_full_disk_loses_nothing(tmp_path, full_disk, monkeypatch, after):
    saved(tmp_path, 2)
    full_disk(after)
    with pytest.raises(
        CheckpointError, match=r"step-000004: cannot be written .*No space left.*step-000002, is intact"
    ):
        saved(tmp_path, 4)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000002"]
    assert_whole(tmp_path / "step-000002")
    assert_whole(saved(tmp_path, 4) / "step-000004")


def test_a_full_disk_at_the_first_checkpoint(tmp_path, full_disk):
    full_disk(1)
    with pytest.raises(CheckpointError, match=r"No space left.*There is no earlier checkpoint\."):
        saved(tmp_path, 2)


def limited(directory: str, room: int) -> None:
    """Save a checkpoint that does not fit, in a process that may write `room` bytes a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        save(Path(directory), 4, {"model": {"big": torch.ones(1 << 16)}}, FACTS)
    except CheckpointError as error:
        raise SystemExit(0 if "step-000002, is intact" in str(error) else 2) from None
    raise SystemExit(1)


@pytest.mark.parametrize("room", [10, 4096, 200_000])
def test_a_file_that_the_system_cuts_short(tmp_path, processes, room):
    saved(tmp_path, 2)
    assert exit_code(processes, limited, str(tmp_path), room) == 0
    assert names(tmp_path) == ["step-000002"]
    assert_whole(tmp_path / "step-000002")


def test_text_is_replaced_whole_or_not_at_all(tmp_path, full_disk):
    path = tmp_path / "config.json"
    write_whole(path, "old")
    full_disk(1)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be written .*before is intact"):
        write_whole(path, "new")
    assert path.read_text() == "old"


# --- who holds a directory ----------------------------------------------------------------------------------


def hold(directory: str, held) -> None:
    """Claim a directory and keep it until killed."""
    lock = claim(Path(directory))
    held.set()
    signal.pause()
    lock.close()


def test_a_directory_is_held_until_its_process_ends_however_it_ends(tmp_path, processes):
    held = processes.Event()
    process = processes.Process(target=hold, args=(str(tmp_path), held))
    process.start()
    assert held.wait(60)
    for _ in range(2):  # being refused does not disturb the holder
        with pytest.raises(CheckpointError, match=f"is in use by process {process.pid}: two runs would overwrite"):
            claim(tmp_path)
    process.kill()
    process.join()
    claim(tmp_path).close()


def test_a_directory_is_held_against_its_own_process_too(tmp_path):
    with (
        claim(tmp_path / "deep" / "run"),
        pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"),
    ):
        claim(tmp_path / "deep" / "run")
    claim(tmp_path / "deep" / "run").close()


def test_a_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/run cannot hold a run"):
        claim(tmp_path / "file" / "run")
