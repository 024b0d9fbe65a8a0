"""Where ranks find one another: a store in which nothing is left of an earlier start.

torchrun's agent keeps one store for all starts of a run. After a restart a rank may read from it what another wrote before
the failure, the address of a process that is gone say (pytorch/pytorch#135712), and its count of restarts may differ from
machine to machine. So the ranks agree on a name for this start, and all that they write is under it.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import TrainingError


def meet(timeout: float) -> tuple[dist.Store, int, int]:
    """The store of this start, for init_process_group; this process's rank, and how many there are, as torchrun says.

    Raises TrainingError when some have not come after `timeout` seconds.
    """
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    return dist.PrefixStore(start_name(store, rank, size, timeout), store), rank, size


def start_name(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name that ranks 0 to `size` - 1 agree on, and that no earlier call gave.

    Rank 0 answers what the others call, at a key that only this call knows: its answer to an old call is never read.
    """
    if rank:
        mine = uuid.uuid4().hex
        store.set(f"call/{rank}", mine)
        try:
            store.wait([f"answer/{mine}"], timedelta(seconds=timeout))
        except dist.DistError:
            raise TrainingError(f"rank {rank}: rank 0 did not come within {timeout:g} s.") from None
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/came/{rank}", "")
        return name

    name = f"start/{uuid.uuid4().hex}"
    missing, until = set(range(1, size)), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"{name}/came/{other}"]):
                missing.remove(other)
            elif store.check([f"call/{other}"]):
                store.set(f"answer/{store.get(f'call/{other}').decode()}", name)
        if missing and time.monotonic() > until:
            raise TrainingError(f"rank 0: ranks {sorted(missing)} did not come within {timeout:g} s.")
        time.sleep(0.01)
    return name
