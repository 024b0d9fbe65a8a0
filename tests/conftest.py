"""One thread, no network, caches of their own, GPU kernels interpreted; hypothesis without deadlines, for the machine may be busy."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folded vocabularies are cached here, not in the user's home."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGRAM_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """No waiting for the disk: it guards against power cuts, and tests do not have those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def processes(own_cache: Path) -> ForkServerContext:
    """Starts processes that have torch imported already, in milliseconds, and that may be killed."""
    context = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).parent)  # where `warm` is: the server does not look where pytest does
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    context.set_forkserver_preload(["warm", "pytest", "hypothesis"])
    return context
