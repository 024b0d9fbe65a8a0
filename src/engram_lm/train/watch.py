"""What ranks say when one of them fails: all of them stop soon, with one message that names the rank and its reason.

To the others a rank's failure is a collective that breaks or times out, whatever its cause. So the ranks meet at the store
through which they found one another; under torchrun its agent keeps it, and no rank's end takes it away. A rank that fails
by an error of its own writes the verdict there. Where a collective fails and nobody has, the first rank to notice calls the
roll: a thread of every rank that lives answers, and says where the rank is if it is not waiting like the others.

    step/RANK     the step it is in
    roll          how many ranks saw a collective fail
    answer/RANK   that it waits for others, and what broke its waiting; that it finished; or the place where it is busy
    verdict       the reason why all must stop; the first one written stays
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import thread as pool
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, get_ident
from types import FrameType, TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import EngramError, TrainingError
from .ranks import Ranks

VERDICT, ROLL = "verdict", "roll"
WAITING, FINISHED = "waiting", "finished"
TORCH = Path(torch.__file__).parent
COLLECTIVES = {str(TORCH / "distributed" / name) for name in ("distributed_c10d.py", "_functional_collectives.py")}


class Watch:
    """Around what ranks do together: no rank outlives another's failure for long, and all know its reason.

    An error of the rank's own passes through, and is known to the others from then on. A collective that failed because of
    another rank raises TrainingError that names it and its reason: its error, that it is gone (killed, say), or where it
    stayed beyond the group's timeout. A rank that is stuck, or in a kernel that waits for others, cannot raise: `patience`
    seconds after the reason is known it prints it and exits with status 1.

    interval: seconds between looks at the store, two or three small requests each. patience: seconds in which a rank that
    lives answers. Entering is a collective; nothing else is, and steps cost nothing. A process alone has nobody to watch.
    """

    def __init__(self, ranks: Ranks, *, interval: float = 1.0, patience: float = 5.0) -> None:
        self.ranks, self.interval, self.patience = ranks, interval, patience
        self.step = 0
        """To be set when a step begins; the message about a rank that is gone names it."""
        self._left = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Watch:
        if self.ranks.group is None:
            return self
        # A name of this run's own: torchrun may keep its store, and its restart count too, when it starts the ranks again.
        me = uuid.uuid4().hex, f"process {os.getpid()} on {socket.gethostname()}"
        try:
            everyone = self.ranks.everyones(me)
        except RuntimeError as error:
            if not lost_contact(error):
                raise
            raise TrainingError(f"A rank ended, or did not come, before the run began ({brief(error)}).") from error
        self._names = [f"rank {rank} ({name})" for rank, (_, name) in enumerate(everyone)]
        self._store = dist.PrefixStore(f"watch/{everyone[0][0]}", _get_default_store().clone())  # type: ignore[attr-defined]
        self._watched = get_ident()
        self._thread = Thread(target=self._look_out, name="engram-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._thread is None:
            return
        try:
            if error and lost_contact(error):
                with undisturbed():
                    raise TrainingError(self._ask(brief(error))) from error
            with suppress(RuntimeError):  # of the store, which must not hide the error, nor spoil a good end
                if error:
                    self._settle(f"{self._names[self.ranks.rank]} failed: {reason(error)}")
                else:
                    self._answer(FINISHED)
        finally:
            self._left.set()
            self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _look_out(self) -> None:
        """Answer the roll; once there is a verdict, see to it that this rank ends."""
        with suppress(RuntimeError):  # of a store that is gone, and with it whoever could write to it
            noted, answered = None, False
            while not self._left.wait(self.interval):
                if self.step != noted:
                    noted = self.step
                    self._store.set(f"step/{self.ranks.rank}", str(noted))
                if verdict := self._verdict():
                    if not self._left.wait(self.patience):
                        give_up(verdict)
                elif not answered and self._store.check([ROLL]):
                    answered = True
                    # Only if it has not answered by itself meanwhile: that says more.
                    self._store.compare_set(f"answer/{self.ranks.rank}", "", place_of(self._watched) or WAITING)

    # --- the store --------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        self._store.set(f"step/{self.ranks.rank}", str(self.step))
        self._store.set(f"answer/{self.ranks.rank}", text)

    def _read(self, key: str) -> str:
        """What is written at `key`; "" where nothing is, without waiting for it."""
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _verdict(self) -> str:
        return self._read(VERDICT)

    def _settle(self, verdict: str) -> str:
        """The verdict: this one, unless there is one already."""
        return self._store.compare_set(VERDICT, "", verdict).decode()

    # --- the roll ---------------------------------------------------------------------------------------------------

    def _ask(self, failure: str) -> str:
        """Why a collective failed."""
        try:
            self._answer(f"{WAITING}: {failure}")
            if self._store.add(ROLL, 1) > 1:  # another called it; should that rank end meanwhile, this one calls again
                self._await(lambda: bool(self._verdict()), 3 * self.patience)
            return self._verdict() or self._call_roll(failure)
        except RuntimeError:
            return (
                f"{failure}, and the store where the ranks meet does not answer: the process that kept it (torchrun's or "
                "rank 0) or its machine is gone."
            )

    def _call_roll(self, failure: str) -> str:
        """Settle who is to blame, after as long as it may take them to answer and to arrive where the others wait."""
        answers: dict[int, str] = {}

        def explained() -> bool:
            answers.update(
                (rank, self._read(f"answer/{rank}")) for rank in range(self.ranks.size) if is_open(answers.get(rank))
            )
            return bool(self._verdict()) or not any(map(is_open, answers.values()))

        self._await(explained, self.patience)
        return self._settle(self._blame(answers, failure))

    def _await(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:
            time.sleep(min(0.1, self.interval))

    def _blame(self, answers: dict[int, str], failure: str) -> str:
        """What to say of ranks that gave these answers, "" if none, when a collective failed."""
        # The rank that timed out closes its connections: to the others, who may be first to call, they just broke.
        timeout = next((answer for answer in answers.values() if is_timeout(answer)), "").removeprefix(f"{WAITING}: ")
        gone = [rank for rank, answer in answers.items() if not answer]
        busy = [rank for rank, answer in answers.items() if answer and is_open(answer)]
        finished = [rank for rank, answer in answers.items() if answer == FINISHED]
        if gone:
            said = [f"{self._last_seen(rank)} and is gone without a word" for rank in gone]
            said[-1] += ": killed, out of memory, or its machine down?"
        elif busy and timeout:
            said = [f"{self._last_seen(rank)} and did not come: it was at {answers[rank]}" for rank in busy]
        elif finished:
            said = [f"{self._last_seen(rank)} and has finished, while others go on" for rank in finished]
        else:
            said = ["Ranks lost one another, though all of them live: is the network down, or are they out of step?"]
        return f"{'; '.join(said)} ({timeout or failure})"

    def _last_seen(self, rank: int) -> str:
        step = int(self._read(f"step/{rank}") or 0)
        return f"{self._names[rank]} was last seen {f'in step {step}' if step else 'before its first step'}"


def is_open(answer: str | None) -> bool:
    """Whether a rank may yet give another answer: it has given none, or is busy."""
    return not answer or not answer.startswith((WAITING, FINISHED))


def is_timeout(answer: str) -> bool:
    """Whether a rank waited for others until the group's timeout."""
    return answer.startswith(WAITING) and bool(re.search("timed out|timeout", answer, re.IGNORECASE))


def lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another rank, or the store, did not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def brief(error: BaseException) -> str:
    """torch's message about a connection without the place in torch's source and without its advice."""
    line = re.sub(r"^\[\S+\] ", "", str(error).split("\n")[0])
    return line.split(" This is typically")[0].rstrip(". ")


def reason(error: BaseException) -> str:
    """An error in a sentence; ours name their kind themselves."""
    return str(error) if isinstance(error, EngramError) else f"{type(error).__name__}: {error}".rstrip(": ")


def place_of(thread: int) -> str:
    """Where a thread is, outermost first, as `save (loop.py:215) > write (checkpoint.py:40)`; "" if it waits for others.

    While it waits for what it gave to a thread pool, where the pool is.
    """
    stacks = {number: innermost_first(frame) for number, frame in sys._current_frames().items()}
    frames = stacks.pop(thread)
    if has_frame(frames, Future.result.__code__.co_filename, "result"):
        busy = [stack for stack in stacks.values() if has_frame(stack, pool.__file__, "run")]
        return min(map(describe, busy or [frames]))  # "" comes first
    return describe(frames)


def innermost_first(frame: FrameType) -> list[FrameType]:
    """A frame and those that called it."""
    return [caller for caller, _ in traceback.walk_stack(frame)]


def has_frame(frames: list[FrameType], file: str, name: str) -> bool:
    """Whether one of the frames is a call of this function."""
    return any((frame.f_code.co_filename, frame.f_code.co_name) == (file, name) for frame in frames)


def describe(frames: list[FrameType]) -> str:
    """The last three calls outside of torch; "" if the last one is a collective."""
    files = [frame.f_code.co_filename for frame in frames]
    outside = [number for number, file in enumerate(files) if not file.startswith(f"{TORCH}{os.sep}")]
    if COLLECTIVES & set(files[: outside[0]]):
        return ""
    last = [frames[number] for number in reversed(outside[:3])]
    return " > ".join(
        f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})" for frame in last
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold off SIGTERM: torchrun sends it to all when a rank ends, before they know why."""
    try:
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def give_up(verdict: str) -> NoReturn:
    """End this process though its main thread is stuck."""
    print(f"Error: {verdict}", file=sys.stderr, flush=True)
    os._exit(1)
