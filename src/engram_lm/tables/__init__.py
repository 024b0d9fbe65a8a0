"""Where the rows live. Every tier returns the same rows; only memory and speed change."""

from .base import Fetch, Table, deduplicate
from .device import DeviceTable

__all__ = ["DeviceTable", "Fetch", "Table", "deduplicate"]
