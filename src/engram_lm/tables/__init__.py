"""Where the rows live. Every tier returns the same rows; only memory and speed change."""

from .base import Fetch, Table
from .dedup import deduplicate
from .device import DeviceTable
from .expand import expand
from .host import HostTable
from .rows import RowFormat
from .tiers import DiskTable, TableConfig, build_table

__all__ = [
    "DeviceTable",
    "DiskTable",
    "Fetch",
    "HostTable",
    "RowFormat",
    "Table",
    "TableConfig",
    "build_table",
    "deduplicate",
    "expand",
]
