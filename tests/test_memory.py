"""What runs do with memory that they free."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import platform, resource, sys
import torch
from madkernels.runs.memory import give_back_memory, keep_freed_memory

keep_freed_memory()

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(16 << 18)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(20)  # until the heap has found its size
print(faults(10))
give_back_memory()
print(faults(1))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_freed_tensor_is_not_fetched_again(by_hand: bool) -> None:
    """Where each goes back to the system, as by default, ten tensors of 16 MiB are 40,960 pages, or 80 large ones."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if by_hand:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # then the environment counts
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    kept, fetched = map(int, done.stdout.split())
    assert kept >= 80 if by_hand else kept < 20
    assert fetched >= 8
