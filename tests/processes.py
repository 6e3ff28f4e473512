"""Commands that tests call, in one process or in several."""

from __future__ import annotations

import os
import subprocess
import sys


def starter(processes: int) -> list[str]:
    """What a script's arguments, or -m and a module's, come behind."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(several if processes > 1 else [])]


def call(arguments: list[str]) -> str:
    """What it prints, when it has ended well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    found = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout
