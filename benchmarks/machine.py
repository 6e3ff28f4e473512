"""The machine a benchmark ran on: what it is, and the rates that bound every op on it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from madkernels import _C, __version__


def load_average() -> float | None:
    """Of the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def busy() -> str | None:
    """A warning where others use the cores, so that times are too long; None where they do not, or it is not known."""
    load, cores = load_average(), os.cpu_count() or 1
    if load is None or load < cores / 2:
        return None
    return f"the load is {load:.2f} on {cores} cores: others use them, and times come out too long"


def describe() -> dict[str, str]:
    """Machine, versions, commit and date: what a figure needs beside it to be read later."""
    load = load_average()
    return {
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "instruction_set": _C.cpu_isa(),
        "last_level_cache": f"{last_level_cache() >> 20} MiB",
        "load_before": "unknown" if load is None else f"{load:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "madkernels": __version__,
        "compiler": _C.build_info()["compiler"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The name the CPU gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the largest cache a core sees; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [32 << 20]
    files = list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if files:
        sizes = [int(text[:-1]) * units[text[-1]] for text in (file.read_text().strip() for file in files)]
    return max(sizes)


def memory_bytes() -> int:
    """Of the machine, whoever uses them."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def commit() -> str:
    """The commit of the checkout this file is in, "-dirty" if tracked files differ; empty if it is in none."""
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=False)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip() if tracked.returncode == 0 else ""


class Rates:
    """The rates of the machine, measured again and again between the timings, so that they share the machine's ups and
    downs.

    A copy reads and writes buffers that together are twice the last-level cache. `multiplied`: the dtypes whose products
    are timed.
    """

    def __init__(self, multiplied: Sequence[str] = ()) -> None:
        self.multiply: dict[str, list[float]] = {name: [] for name in multiplied}  # operations per second, all threads
        self.exp2: list[float] = []  # float32 evaluations per second, all threads
        self.copy: list[float] = []  # bytes read and written per second
        self.states: list[dict[str, Any]] = []  # of a GPU, at each measurement
        self._source = torch.ones(last_level_cache(), dtype=torch.uint8)
        self._target = torch.empty_like(self._source)
        self._target.copy_(self._source)  # its pages are there from now on

    def measure(self) -> None:
        """Adds one measurement of each."""
        begin = time.perf_counter()
        self._target.copy_(self._source)
        self.copy.append(2 * self._source.nbytes / (time.perf_counter() - begin))
        # OpenMP's threads spin for a while after their work, and would take a fifth of the next figure.
        time.sleep(0.02)
        threads = torch.get_num_threads()
        self.exp2.append(_C.exp2_rate(threads))
        for name, found in self.multiply.items():
            found.append(_C.multiply_rate(name, threads))
