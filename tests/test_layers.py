"""Lower rooms never import higher ones, nor their neighbours; light imports stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engram_lm

SOURCE = Path(engram_lm.__file__).parent
FLOORS = (
    {"__init__"},
    {"errors"},
    {"config", "kernels", "machine", "statistics"},
    {"tokens", "hashing", "memory", "tables"},
    {"model"},
    {"train", "generate"},
    {"evaluate", "analysis", "bench", "hf", "longcontext"},
    {"study", "report"},
    {"quickstart"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(source: str, path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it: `engram_lm.train.loop`, `torch.nn`."""
    package = ("engram_lm", *path.relative_to(SOURCE).parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms(source: str, path: Path) -> set[str]:
    """Rooms of the house that a file imports from; names of the package itself belong to `__init__`."""
    ours = {name.split(".")[1] for name in imported(source, path) if name.startswith("engram_lm.")}
    return {name if name in FLOOR else "__init__" for name in ours}


def offences(source: str, path: Path) -> set[str]:
    """Rooms that a file must not import from."""
    mine = room_of(path)
    return {room for room in rooms(source, path) if room != mine and FLOOR[room] >= FLOOR[mine]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path):
    assert room_of(path) in FLOOR, "a new room needs a floor"
    assert offences(path.read_text(encoding="utf-8"), path) == set()


@pytest.mark.parametrize(
    ("file", "source", "offence"),
    [
        ("model/lm.py", "from ..train.loop import TrainConfig", {"train"}),
        ("model/lm.py", "def f():\n    from .. import generate, errors", {"generate"}),
        ("hashing.py", "from .tokens import SENTINEL", {"tokens"}),
        ("hashing.py", "import engram_lm.tables.base", {"tables"}),
        ("evaluate/loss.py", "from ..analysis import report", {"analysis"}),
        ("evaluate/loss.py", "from .manifest import recall\nfrom ..train import loop", set()),
        ("train/loop.py", "from .. import __version__\nfrom ..config import load", set()),
        ("config.py", "from engram_lm.cli import main", {"cli"}),
    ],
)
def test_the_rule_sees_every_way_to_import(file: str, source: str, offence: set[str]):
    assert offences(source, SOURCE / file) == offence


def test_only_plots_import_matplotlib():
    users = {
        path.relative_to(SOURCE).parent.as_posix()
        for path in FILES
        for name in imported(path.read_text(encoding="utf-8"), path)
        if name.split(".")[0] == "matplotlib"
    }
    assert users == {"report/plots"}


def test_the_package_is_light():
    heavy = ["torch", "numpy", "matplotlib", "tokenizers", "numba", "transformers"]
    code = f"import sys, engram_lm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
