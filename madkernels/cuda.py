"""The CUDA part of the extension: loaded where torch has CUDA; where it cannot be, why not, and what to do."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any, NoReturn

import torch

BUILD = "MADKERNELS_CUDA=on pip install --no-build-isolation ."
NAMESPACE = "madkernels::"
_refused: set[str] = set()  # the ops whose kernel for CUDA is a refusal


@cache
def load() -> tuple[ModuleType | None, str]:
    """The CUDA part, or None and why there is none. Never raises: the CPU's part works without it."""
    if torch.version.cuda is None:
        return None, "this torch was built without CUDA: install one with CUDA, then madkernels next to it"
    if importlib.util.find_spec("madkernels._C_cuda") is None:
        return (
            None,
            f"madkernels was built without CUDA: rebuild it where nvcc is found, in the folder of the sources: {BUILD}",
        )
    try:
        return importlib.import_module("madkernels._C_cuda"), ""
    except Exception as error:
        return None, f"madkernels' CUDA part does not load: {error}. Rebuild it against this torch: {BUILD}"


def ops_with_kernels() -> frozenset[str]:
    """The ops that have CUDA kernels, as `op`, decoding steps and backwards included."""
    load()
    found = {name for name in _ops() if torch._C._dispatch_has_kernel_for_dispatch_key(NAMESPACE + name, "CUDA")}
    return frozenset(found - _refused)


def refuse_where_there_are_none() -> None:
    """Makes every op without a CUDA kernel say why, when it is called with CUDA tensors."""
    for name in _ops() - ops_with_kernels():
        torch.library.impl(NAMESPACE + name, "CUDA")(_Refusal(name))
        _refused.add(name)


def why_not(op: str) -> str:
    """What to say of an op without a CUDA kernel."""
    return f"{op} has no CUDA kernel here: {load()[1] or 'it has none yet'}. On the CPU it runs: move its tensors there"


class _Refusal:
    """Takes the place of a CUDA kernel."""

    def __init__(self, op: str):
        self.op = op

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(why_not(self.op))


def _ops() -> frozenset[str]:
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name.removeprefix(NAMESPACE) for name in names if name.startswith(NAMESPACE))
