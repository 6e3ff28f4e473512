"""Where the ops of a test run: on the CPU, or by the CUDA kernels, on the simulator or on a GPU.

The simulator's library has the ops under a name of its own, `torch.ops.madkernels_simulated`. While a test runs on it, they
stand in for the CPU kernels, so that all that lies above (autograd, fakes, autocast) is the same.
"""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import native
import torch

import madkernels

NAMES = ("cpu", "ptx", "cuda")
ROOT = native.ROOT
SCHEDULES = ("order", "reverse", "warps", "lanes")
MULTIPROCESSORS, SHARED_BYTES = 4, 227 << 10

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
        if name == "ptx":
            with simulated_ops():
                yield
        else:
            yield
    finally:
        _current = "cpu"


@cache
def core() -> ctypes.CDLL:
    """The simulator without kernels, built where it is not: csrc/simulator/control.h says what it answers."""
    [library] = native.build("simulator").rglob("libsimulator.so")
    found = ctypes.CDLL(str(library))
    for name in ("kernels", "launched", "barriers", "instructions", "run"):
        getattr(found, f"simulator_{name}").restype = ctypes.c_char_p
    found.simulator_steps.restype = ctypes.c_int64
    return found


@cache
def simulator() -> ctypes.CDLL:
    """The simulator with the ops' kernels."""
    import madkernels.ops  # noqa: F401  (registers them; not before TRITON_INTERPRET is set, since it loads Triton)

    [library] = native.build("simulated_ops").rglob("simulated_ops.so")
    torch.ops.load_library(str(library))
    assert registered_names("madkernels_simulated") == names_on_gpus()  # others would pass, on the CPU
    core().simulator_set_races(1)
    return core()


def set_schedule(name: str, seed: int = 0) -> None:
    """Chooses the order in which the simulator runs warps and lanes."""
    simulator().simulator_set_schedule(SCHEDULES.index(name), ctypes.c_uint64(seed))


def set_multiprocessors(count: int) -> None:
    """Chooses the size of the simulated GPU, by which kernels decide how to split their work."""
    simulator().simulator_set_multiprocessors(count)


@contextmanager
def without_races() -> Iterator[None]:
    """Looks for no races for a while."""
    simulator().simulator_set_races(0)
    try:
        yield
    finally:
        simulator().simulator_set_races(1)


@contextmanager
def shared_memory(size: int) -> Iterator[None]:
    """Gives blocks of the simulated GPU so many bytes of shared memory, for a while."""
    simulator().simulator_set_shared_bytes(size)
    try:
        yield
    finally:
        simulator().simulator_set_shared_bytes(SHARED_BYTES)


def launched() -> list[str]:
    """The kernels launched since this was last asked, by their mangled names."""
    return simulator().simulator_launched().decode().split()


def kernels() -> list[str]:
    """All of the ops' kernels, by their mangled names, once one was launched."""
    return simulator().simulator_kernels().decode().split()


def barriers(kernel: str) -> dict[int, str]:
    """The barriers of a kernel, of blocks and of warps: where each stands in source and PTX."""
    lines = simulator().simulator_barriers(kernel.encode()).decode().splitlines()
    return {int(number): place for number, _, place in (line.partition(" ") for line in lines)}


@contextmanager
def without_barrier(kernel: str, number: int) -> Iterator[None]:
    """Leaves a barrier out for a while."""
    simulator().simulator_leave_out(kernel.encode(), number)
    try:
        yield
    finally:
        simulator().simulator_leave_out(kernel.encode(), -1)


def of_one_call(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, whose kernels may touch no tensors but those of the call."""

    @functools.wraps(op)
    def call(*arguments: Any) -> Any:
        simulator().simulator_forget_memory()
        return op(*arguments)

    return call


def registered_names(library: str) -> set[str]:
    """Of the ops of a library that have kernels for tensors of the CPU, backwards and steps included."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{library}::")]
    found = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    return {name.removeprefix(f"{library}::") for name in found}


def names_on_gpus() -> set[str]:
    """Of the ops that are registered, those that have CUDA kernels among the sources."""
    on_cpus_alone = set(madkernels.OPS) - set(native.ops_on_gpus())
    return {name for name in registered_names("madkernels") if re.sub("_(backward|step)$", "", name) not in on_cpus_alone}


@contextmanager
def simulated_ops() -> Iterator[None]:
    simulator()
    library = torch.library.Library("madkernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name in registered_names("madkernels_simulated"):
            op = getattr(torch.ops.madkernels_simulated, name).default
            library.impl(name, of_one_call(op), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
