"""The scripts of docs/examples run as they are, and end with a result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs/examples"
TOLD = {  # what the last lines say
    "own_layer.py": r"^gated swiglu gated swiglu: selective-copying \d.*MAD score of these tasks \d",
    "scaling_law.py": r"^mamba: 18 runs, E 1\.01, alpha 0\.53, beta 0\.46, a 0\.46 ",
    "text.py": r"^Chapter 7\. .",
}


def test_every_example_is_run() -> None:
    assert sorted(TOLD) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", TOLD)
def test_an_example_ends_with_its_result(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(TOLD[name], done.stdout, re.MULTILINE), done.stdout
    assert not list(tmp_path.iterdir())
