"""Functions run by several processes of one gloo group, without fixed ports and without leftovers."""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    processes: ForkServerContext, world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120
) -> list[Any]:
    """What `work(*arguments)`, a function of a module, returns in each of `world` ranks, in their order.

    Raises RuntimeError with the traceback of the first rank that fails, or that ends or stays without an answer; all others
    are killed then.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [processes.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            processes.Process(target=_rank, args=(pipe, Path(folder) / "store", rank, world, work, arguments))
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process, (_, pipe) in zip(ranks, pipes, strict=True):
            process.start()
            pipe.close()
        waiting = {pipe: rank for rank, (pipe, _) in enumerate(pipes)}
        results: list[Any] = [None] * world
        until = time.monotonic() + timeout
        try:
            while waiting:
                ready = multiprocessing.connection.wait(list(waiting), max(0.0, until - time.monotonic()))
                if not ready:
                    raise RuntimeError(f"ranks {sorted(waiting.values())} did not answer within {timeout} s")
                for pipe in ready:
                    rank = waiting.pop(pipe)  # type: ignore[call-overload]
                    try:
                        good, result = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                    except EOFError:
                        raise RuntimeError(f"rank {rank} ended without an answer") from None
                    if not good:
                        raise RuntimeError(f"rank {rank}:\n{result}")
                    results[rank] = result
        except BaseException:
            for process in ranks:
                process.kill()
            raise
        finally:
            for process, (pipe, _) in zip(ranks, pipes, strict=True):
                process.join()
                pipe.close()
        return results


def _rank(pipe: Any, store: Path, rank: int, world: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    file_store = dist.FileStore(str(store), world)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        answer = True, work(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    if answer[0]:
        dist.barrier()  # or a rank that leaves early would break what others are still doing
    dist.destroy_process_group()
