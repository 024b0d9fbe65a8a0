"""When a rank fails, however it does, every other one stops with one message that names it and its reason."""

import multiprocessing.connection
import os
import re
import signal
import threading
import time
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engram_lm.errors import CheckpointError, TrainingError
from engram_lm.train.ranks import Ranks
from engram_lm.train.watch import Watch, brief, lost_contact, place_of, reason

PATIENCE = 1.5
TIMEOUT = timedelta(seconds=2)
CLOSED = (
    "[/ci/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:12. This is typically caused by x."
)


def outcomes(
    processes: ForkServerContext, folder: Path, world: int, faults: dict[int, str], **options: Any
) -> dict[int, str]:
    """What each rank of `world` caught or printed, and "killed" for one that was; `faults` says what befalls whom."""
    pipes = [processes.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        processes.Process(target=train, args=(pipe, folder, rank, world, faults.get(rank, ""), options), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, pipe) in zip(ranks, pipes, strict=True):
        process.start()
        pipe.close()
    ended = {process.sentinel: rank for rank, process in enumerate(ranks)}
    until = time.monotonic() + 60
    while ended:
        ready = multiprocessing.connection.wait(list(ended), until - time.monotonic())
        if not ready:
            for process in ranks:
                process.kill()
            raise AssertionError(f"ranks {sorted(ended.values())} hang")
        for sentinel in ready:
            del ended[sentinel]  # type: ignore[arg-type]
    said = {}
    for rank, (process, (pipe, _)) in enumerate(zip(ranks, pipes, strict=True)):
        process.join()
        if process.exitcode == 0:
            said[rank] = pipe.recv()
        else:
            printed = (folder / f"stderr-{rank}").read_text()
            said[rank] = "killed" if process.exitcode == -signal.SIGKILL else f"{process.exitcode}, {printed}"
    return said


def train(pipe: Any, folder: Path, rank: int, world: int, fault: str, options: dict[str, Any]) -> None:
    """One rank: steps of one collective each, and in the third its fault."""
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY, 0o600), 2)
    store = (
        tcp_store(folder, rank, world) if options.pop("tcp", False) else dist.FileStore(str(folder / "store"), world)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    group = dist.new_group(timeout=TIMEOUT)
    ranks = Ranks(rank, world, dist.group.WORLD)
    try:
        with Watch(ranks, **{"interval": 0.05, "patience": PATIENCE, **options}) as watch:
            for step in range(1, 6):
                watch.step = step
                if step == 3 and fault == "finish":
                    break
                if step == 3 and fault:
                    befall(fault, watch, folder, group)
                dist.all_reduce(torch.ones(100), group=group)
        said = "finished"
    except (TrainingError, CheckpointError) as error:
        said = str(error)
    except BaseException as error:
        said = repr(error)
    if fault == "finish":
        time.sleep(3)  # with its connections open
    pipe.send(said)
    os._exit(0)


def tcp_store(folder: Path, rank: int, world: int) -> dist.Store:
    """A store that rank 0 keeps."""
    note = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        note.with_suffix(".new").write_text(str(store.port))
        note.with_suffix(".new").rename(note)
        return store
    while not note.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(note.read_text()), world, False)


def befall(fault: str, watch: Watch, folder: Path, group: dist.ProcessGroup) -> None:
    """Let it happen to this rank."""

    def die() -> None:
        while watch._read(f"step/{watch.ranks.rank}") != "3":
            time.sleep(0.01)
        (folder / "dying").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    match fault:
        case "disk":
            raise CheckpointError("runs/x/step-3: cannot be written (disk full).")
        case "bug":
            raise KeyError("no such tensor")
        case "killed":
            die()
        case "killed in all_reduce":
            threading.Thread(target=die).start()
        case "killed in all_to_all":
            threading.Thread(target=die).start()
            dist.all_to_all_single(torch.empty(120), torch.ones(120), group=group)
        case "all_to_all":
            while not (folder / "dying").exists():
                time.sleep(0.01)
            time.sleep(0.1)
            dist.all_to_all_single(torch.empty(120), torch.ones(120), group=group)
        case "after it":
            while not (folder / "dying").exists():
                time.sleep(0.01)
            time.sleep(0.1)
        case "stuck":
            time.sleep(60)
        case "late":
            time.sleep(1)
        case "network":
            raise RuntimeError(CLOSED)
        case "after it, the roll called":
            befall("after it", watch, folder, group)
            watch._store.add("roll", 1)
            raise RuntimeError(CLOSED)
        case _:
            raise AssertionError(fault)


def one_message(said: dict[int, str], ranks: set[int]) -> str:
    """The message that all of these ranks end with, whether they raised it or were stuck and printed it."""
    messages = {said[rank].removeprefix("1, Error: ").removesuffix("\n") for rank in ranks}
    assert len(messages) == 1, said
    return messages.pop()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_run_without_failures_just_ends(processes: ForkServerContext, tmp_path: Path, world: int):
    assert outcomes(processes, tmp_path, world, {}) == dict.fromkeys(range(world), "finished")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_an_error_of_a_rank_is_the_reason_for_all(processes: ForkServerContext, tmp_path: Path, world: int):
    said = outcomes(processes, tmp_path, world, {1: "disk"})
    assert said.pop(1) == "runs/x/step-3: cannot be written (disk full)."
    assert re.fullmatch(
        r"rank 1 \(process \d+ on \S+\) failed: runs/x/step-3: cannot be written \(disk full\)\.",
        one_message(said, set(said)),
    )


def test_an_error_that_is_none_of_ours_is_named_by_its_kind(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 2, {0: "bug"})
    assert said[0] == "KeyError('no such tensor')"
    assert re.fullmatch(r"rank 0 \(.*\) failed: KeyError: 'no such tensor'", said[1])


@pytest.mark.parametrize(
    "faults",
    [
        {0: "killed"},
        {1: "killed"},
        {1: "killed in all_reduce", 2: "after it"},
        {0: "all_to_all", 1: "killed in all_to_all", 2: "all_to_all"},
        {1: "killed", 2: "killed"},
        {0: "killed", 2: "killed", 3: "killed"},
    ],
    ids=str,
)
def test_a_rank_that_is_killed_is_missed(processes: ForkServerContext, tmp_path: Path, faults: dict[int, str]):
    said = outcomes(processes, tmp_path, max(2, max(faults) + 1) + (len(faults) < 3), faults)
    killed = {rank for rank, fault in faults.items() if fault.startswith("killed")}
    assert {rank for rank, text in said.items() if text == "killed"} == killed
    message = one_message(said, said.keys() - killed)
    named = re.findall(r"rank (\d) \(process \d+ on \S+\) was last seen in step 3 and is gone without a word", message)
    assert 0 < len(named) == len(set(named))
    assert {int(rank) for rank in named} <= killed, message  # one may die when another has been missed already
    assert "Connection" in message
    assert "typically" not in message


def test_a_rank_that_is_stuck_is_named_with_its_place_and_ends_too(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 4, {0: "late", 2: "stuck"})
    assert said[2].startswith("1, Error: ")
    message = one_message(said, {0, 1, 2, 3})
    place = r"train \(test_watch.py:\d+\) > befall \(test_watch.py:\d+\)"
    assert re.match(
        rf"rank 2 \(.*\) was last seen in step 3 and did not come: it was at .*{place} \(Timed out", message
    )
    assert message.count("rank ") == 1


def test_a_stuck_rank_does_not_outlive_the_error_of_another(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 3, {0: "stuck", 1: "disk"}, patience=0.3)
    assert said[0].startswith("1, Error: ")
    assert "disk full" in one_message(said, {0, 2})


def test_when_several_fail_each_says_its_own_and_the_others_the_first(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 4, {1: "disk", 3: "bug"})
    assert "disk full" in said[1]
    assert "no such tensor" in said[3]
    assert re.match(r"rank (1 \(.*\) failed: runs|3 \(.*\) failed: KeyError)", one_message(said, {0, 2}))


def test_a_rank_that_leaves_early_is_named(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 3, {1: "finish"})
    assert said[1] == "finished"
    assert re.match(r"rank 1 \(.*\) was last seen in step 3 and has finished", one_message(said, {0, 2}))


def test_a_network_that_fails_is_no_rank_s_fault(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 2, {0: "network", 1: "network"})
    assert re.match(
        r"Ranks lost one another.*\(Connection closed by peer \[10.0.0.7\]:12\)$", one_message(said, {0, 1})
    )


def test_a_roll_goes_on_without_the_rank_that_called_it(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 3, {0: "after it, the roll called", 1: "killed"}, patience=0.7)
    assert re.match(r"rank 1 \(.*is gone without a word", one_message(said, {0, 2}))


def test_a_store_that_goes_with_rank_0_is_named(processes: ForkServerContext, tmp_path: Path):
    said = outcomes(processes, tmp_path, 3, {0: "killed"}, tcp=True)
    assert said.pop(0) == "killed"
    for text in said.values():
        assert re.match("Connection (reset|closed) by peer.* the store where the ranks meet does not answer", text)


def test_nothing_is_watched_in_a_process_alone():
    with Watch(Ranks()) as watch:
        watch.step = 1
        assert "engram-watch" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ValueError, match="its own"), Watch(Ranks()):
        raise ValueError("its own")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(CLOSED), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError("shape mismatch"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (OSError("Connection closed by peer"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_lost_contact_is_told_from_errors_of_one_s_own(error: BaseException, lost: bool):
    assert lost_contact(error) == lost


def test_messages_are_brief():
    assert brief(RuntimeError(CLOSED)) == "Connection closed by peer [10.0.0.7]:12"
    assert brief(dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited\nLast error: y")) == (
        "NCCL error in: x.cpp:1, remote process exited"
    )
    assert reason(CheckpointError("runs/x: disk full")) == "runs/x: disk full"
    assert reason(ValueError("no")) == "ValueError: no"
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_place_leaves_torch_out():
    def work() -> None:
        torch.nn.Sequential(Sleep()).forward(torch.ones(1))

    class Sleep(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            begun.set()
            done.wait(60)
            return hidden

    begun, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    try:
        assert thread.ident is not None
        assert re.fullmatch(r"forward \(test_watch.py:\d+\)( > wait \(threading.py:\d+\)){2}", place_of(thread.ident))
    finally:
        done.set()
        thread.join()
