"""Under torchrun: a rank is killed or hangs, the other says so, and all start again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engram_lm.errors import EngramError
from engram_lm.train.meeting import meet
from engram_lm.train.ranks import Ranks
from engram_lm.train.watch import Watch

torch.set_num_threads(1)
fault, attempt = sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"]
store, rank, size = meet(30)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
group = dist.new_group(timeout=timedelta(seconds=2))
ranks = Ranks(rank, size, dist.group.WORLD)
try:
    with Watch(ranks, interval=0.05, patience=2) as watch:
        for watch.step in range(1, 4):
            if attempt == "0" and watch.step == 2 and ranks.rank == 1:
                time.sleep(0.5)
                match fault:
                    case "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "hang":
                        time.sleep(60)
            dist.all_reduce(torch.ones(10), group=group)
except EngramError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(1)
Path(f"done-{attempt}-{ranks.rank}").touch()
os._exit(0)  # a thread of gloo that frees a tensor while the interpreter ends would abort
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kill", r"rank 1 \(process \d+ on \S+\) was last seen in step 2 and is gone without a word: killed"),
        (
            "hang",
            r"rank 1 \(process \d+ on \S+\) was last seen in step 2 and did not come: .*<module> \(script.py:29\)",
        ),
    ],
)
def test_torchrun_restarts_ranks_that_know_why(tmp_path: Path, fault: str, message: str):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 script.py"
    done = subprocess.run(
        [sys.executable, *torchrun.split(), fault], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-1-0", "done-1-1"}
    assert re.search(f"^Error: {message}", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
