"""Which tier a table lives in: chosen by configuration, the same rows in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..errors import ConfigError
from ..kernels import on_gpu
from .base import Table
from .cached import CachedStore
from .device import DeviceTable
from .disk import FileStore
from .file import TableFile
from .host import HostTable
from .pinned import PinnedTable
from .rows import Encoding, RowFormat
from .saved import require
from .stored import StoredTable


@dataclass(frozen=True)
class TableConfig:
    """Where a memory's rows live and how they are encoded. The tier changes memory and speed, never a bit of the rows."""

    tier: Literal["auto", "device", "host", "disk"] = "auto"
    """device: memory of the device that computes; host: RAM, which a GPU reads over the bus while it computes; disk: a file, with hot
    rows in RAM. auto: device on a GPU, host on a CPU."""
    encoding: Encoding = "fp32"
    """Of a row; all but fp32 are trained with stochastic rounding."""
    std: float = 0.0
    """Spread of rows that were never written; 0: they are zero."""
    seed: int = 0
    """Of those rows and of stochastic rounding."""
    file: str = ""
    """Table file of tier disk. Default: table.safetensors in the run directory."""
    memory: float = 1.0
    """GB of RAM in which tier disk keeps hot rows."""
    journal: float = 4.0
    """GB that the journal of tier disk grows to before it is applied to the file."""
    device_memory: float = 0.0
    """GB of a GPU's memory in which tier host keeps copies of the rows that the text reads most."""
    asynchronous: bool = False
    """Do not refresh rows that were fetched ahead and then updated: NOT exact, rows may miss their last update."""

    def __post_init__(self) -> None:
        for name in ("memory", "journal", "device_memory"):
            if getattr(self, name) < 0:
                raise ConfigError(f"table.{name} is at least 0 GB, got {getattr(self, name)}.")
        if self.file and self.tier != "disk":
            raise ConfigError(f"table.file {self.file!r} was given with tier {self.tier!r}: only tier disk reads it.")

    def tier_on(self, device: torch.device) -> Literal["device", "host", "disk"]:
        """The tier, where `auto` leaves it to the device that computes."""
        return self.tier if self.tier != "auto" else "device" if device.type == "cuda" else "host"

    def form(self, dim: int, first: int = 0) -> RowFormat:
        """The format of rows of width `dim` that are trained. first: the number of row 0 in the whole table."""
        return RowFormat(dim, self.encoding, std=self.std, seed=self.seed, first=first)


def build_table(
    config: TableConfig,
    num_rows: int,
    dim: int,
    *,
    digest: str,
    directory: Path,
    device: torch.device | str = "cpu",
    write: bool = True,
    first: int = 0,
) -> Table:
    """A table of the configured tier: empty in memory; on disk the file, created as a sparse one unless it is there.

    Raises MismatchError when the file belongs to another plan or holds rows of another format, ConfigError for hot rows where no
    table keeps them.
    """
    form, device = config.form(dim, first), torch.device(device)
    tier = config.tier_on(device)
    if config.device_memory and not (tier == "host" and on_gpu(device)):
        raise ConfigError(
            f"table.device_memory {config.device_memory:g} was given for tier {tier} on device {device}: only tier host on a GPU keeps "
            "hot rows there, and it would have been ignored."
        )
    if tier == "device":
        return DeviceTable(num_rows, form, device)
    if tier == "host":
        return host_table(num_rows, form, device, asynchronous=config.asynchronous)
    path = Path(config.file) if config.file else directory / "table.safetensors"
    if write and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        TableFile.create(path, num_rows, form, digest=digest).close()
    return DiskTable(
        path,
        form=form,
        num_rows=num_rows,
        digest=digest,
        write=write,
        memory=int(config.memory * 1e9),
        journal=int(config.journal * 1e9),
        device=device,
        asynchronous=config.asynchronous,
    )


def host_table(
    num_rows: int, form: RowFormat, device: torch.device, *, asynchronous: bool = False
) -> PinnedTable | HostTable:
    """Rows in RAM: a GPU reads them itself, if it has the kernels."""
    if on_gpu(device):
        return PinnedTable(num_rows, form, device)
    return HostTable(num_rows, form, device, asynchronous=asynchronous)


class DiskTable(StoredTable):
    """A table file, with hot rows in `memory` bytes of RAM.

    form, num_rows, digest: what the file must hold; None for whatever it does. write: train it, in place, through a journal of at
    most about `journal` bytes. Raises MismatchError when the file is another table's.
    """

    def __init__(
        self,
        path: Path,
        *,
        form: RowFormat | None = None,
        num_rows: int | None = None,
        digest: str | None = None,
        write: bool = False,
        memory: int = 1 << 30,
        journal: int = 4 << 30,
        reads: Literal["direct", "map"] = "direct",
        device: torch.device | str = "cpu",
        asynchronous: bool = False,
    ) -> None:
        file = TableFile.open(path, write=write, digest=digest)
        try:
            if form is not None:
                require(file, form, num_rows or file.num_rows)
            store = FileStore(file, journal_limit=journal, reads=reads)
        except BaseException:
            file.close()
            raise
        rows = min(memory // CachedStore.bytes_per_row(file.form), file.num_rows)
        super().__init__(CachedStore(store, rows) if rows else store, device, asynchronous=asynchronous)
        self.digest, self.clock, self.place = file.digest, store.clock, path
