"""Where the ops of a test run: on the CPU, or by the CUDA kernels, on an emulator or on a GPU.

The emulator's library has the ops under a name of its own, `torch.ops.madkernels_emulated`. While a test runs on it, they
stand in for the CPU kernels, so that all that lies above (autograd, fakes, autocast) is the same.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

NAMES = ("cpu", "emulated", "cuda")
OPS = (
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_step",
    "causal_conv",
    "causal_conv_backward",
    "causal_conv_step",
    "fft_conv",
    "fft_conv_backward",
    "fft_conv_step",
)
ROOT = Path(__file__).resolve().parent.parent
SANITIZE = os.environ.get("MADKERNELS_SANITIZE", "OFF")
BUILD = ROOT / "build" / ("emulator" if SANITIZE == "OFF" else "emulator-sanitize")

_current = "cpu"


def device() -> torch.device:
    """Where the tensors of the running test belong."""
    return torch.device("cuda" if _current == "cuda" else "cpu")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Runs the ops on a backend for a while."""
    global _current
    _current = name
    try:
        if name == "emulated":
            with emulated_ops():
                yield
        else:
            yield
    finally:
        _current = "cpu"


def build(target: str) -> Path:
    """Builds a target of csrc/emulator -> the folder it is in."""
    cmake = [sys.executable, "-m", "cmake"]
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    options = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=beside)}"]
    options += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMADKERNELS_SANITIZE={SANITIZE}"]
    options += ["-DMADKERNELS_EMULATOR=ON", "-DMADKERNELS_CUDA=off"]
    commands = ([*cmake, f"-S{ROOT}", f"-B{BUILD}", *options], [*cmake, "--build", str(BUILD), "--target", target])
    for command in commands:
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not for the compiler
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return BUILD


@cache
def emulator() -> ctypes.CDLL:
    """The library of the emulated ops, built where it is not."""
    [library] = build("emulated_ops").rglob("emulated_ops.so")
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def set_seed(seed: int) -> None:
    """Chooses the order in which the emulator runs its threads."""
    emulator().madkernels_emulator_set_seed(ctypes.c_uint64(seed))


def set_multiprocessors(count: int) -> None:
    """Chooses the size of the emulated GPU, by which kernels decide how to split their work."""
    emulator().madkernels_emulator_set_multiprocessors(ctypes.c_int(count))


@contextmanager
def shared_memory(size: int) -> Iterator[None]:
    """Gives blocks of the emulated GPU so many bytes of shared memory, for a while."""
    emulator().madkernels_emulator_set_most_shared_bytes(size)
    try:
        yield
    finally:
        emulator().madkernels_emulator_set_most_shared_bytes(227 << 10)


@contextmanager
def without_barrier(file: str, line: int) -> Iterator[None]:
    """Makes the emulator pass over the barrier at a line of a file of csrc."""
    skip = emulator().madkernels_emulator_skip_barrier
    skip(file.encode(), line)
    try:
        yield
    finally:
        skip(b"", 0)


@contextmanager
def emulated_ops() -> Iterator[None]:
    emulator()
    library = torch.library.Library("madkernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for op in OPS:
            library.impl(op, getattr(torch.ops.madkernels_emulated, op).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
