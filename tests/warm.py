"""Everything that processes of tests would import and load before they begin: once, in the process that they are forked from."""

import os
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch._dynamo
from tiny import EVERYTHING, config, training

import engram_lm.train.run  # noqa: F401
from engram_lm.tables import DeviceTable, HostTable, RowFormat, deduplicate, expand
from engram_lm.tables.rows import ENCODINGS

os.fsync = lambda descriptor: None  # as conftest.py has it
torch.set_num_threads(1)
for table in (kind(8, RowFormat(4, encoding)) for encoding in ENCODINGS for kind in (HostTable, DeviceTable)):
    unique, inverse = deduplicate(torch.tensor([3, 1, 3]))
    table.fetch(unique, encoded=True)
    rows = table.fetch(unique).requires_grad_()
    expand(rows, inverse).sum().backward()
    table.update(unique, rows.grad, lr=0.1)
    table.write(unique, rows)
    table.close()

run = training(Path(mkdtemp()), config(EVERYTHING, steps=1))
run.step()
run.close()
