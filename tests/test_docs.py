"""The Python in README and docs runs as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/index.md", "docs/tables.md", "docs/retrofit.md", "docs/evaluate.md", "docs/scaling.md")
PRETRAINED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a small one takes its place
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


EXAMPLE = pytest.param((ROOT / "examples/memory_by_hand.py").read_text(), id="examples/memory_by_hand.py")


@pytest.mark.parametrize("block", [*BLOCKS, EXAMPLE])
def test_python_block_runs(block, tmp_path):
    script = tmp_path / "block.py"
    if PRETRAINED in block:
        from hf_tiny import tiny_model, tiny_tokenizer

        tiny_model("llama").save_pretrained(tmp_path / "tiny")
        tiny_tokenizer().save_pretrained(tmp_path / "tiny")
        block = block.replace(PRETRAINED, str(tmp_path / "tiny"))
    script.write_text(block)
    environment = {**os.environ, "ENGRAM_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*PAGES, "docs/format.md", "docs/results.md", "docs/log.md", "CONTRIBUTING.md"])
def test_links_within_the_repository_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"
