"""What a figure must be read with: card, versions, processor, load, commit."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from engram_lm.machine import cpu_name, installed

LIBRARIES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "numba")


def describe(device: torch.device) -> dict[str, Any]:
    """Facts, for JSON."""
    return {
        "gpu": describe_gpu(device) if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gb": memory("MemTotal") / 1e9,
        "ram_available_gb": memory("MemAvailable") / 1e9,
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: installed(name) for name in LIBRARIES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def describe_gpu(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_gb": card.total_memory / 1e9,
        "l2_mb": card.L2_cache_size / 1e6,
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "others_on_it": ask("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader"),
    }


def memory(name: str) -> int:
    """Bytes, as Linux tells them; 0 elsewhere."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def commit() -> str:
    """With a plus where files differ from it."""
    here = Path(__file__).parent
    name = ask("git", "-C", str(here), "rev-parse", "--short", "HEAD")
    return name + "+" if name and ask("git", "-C", str(here), "status", "--porcelain", "-uno") else name or "unknown"


def ask(program: str, *arguments: str) -> str:
    """The first line that a program prints; nothing if it is not there or fails."""
    if shutil.which(program) is None:
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
