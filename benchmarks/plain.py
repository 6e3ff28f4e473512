"""The layers on plain torch: its own attention, and in the place of each op the best that torch has or its reference."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import madkernels
from madkernels import OPS, reference
from madkernels.benchmarks.fft_conv import torch_fft
from madkernels.benchmarks.selective_scan import chunked_from, whole
from madkernels.models.layers import linear


def plain_scan(
    u: Tensor, delta: Tensor, A: Tensor, *rest: Any, initial_state: Tensor | None = None, cu_seqlens: None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """selective_scan in chunks; its reference's backward takes time with the square of the length."""
    state = u.new_zeros(u.shape[0], *A.shape, dtype=A.dtype) if initial_state is None else initial_state

    def recurrence(steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        nonlocal state
        y, after = chunked_from(state.transpose(1, 2), steps, x, A, B, C)
        state = after.transpose(1, 2)
        return y

    y = whole(recurrence)(u, delta, A, *rest)
    return (y, state) if return_final_state else y


def plain_fft_conv(
    u: Tensor, filter: Tensor, *, skip: Tensor | None = None, pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None, initial_state: Tensor | None = None, cu_seqlens: None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """fft_conv by torch.fft, causal; its reference takes a step for each lag."""
    (seqlen, dim), kept = u.shape[1:], filter.shape[1] - 1
    v = u if pre_gate is None else u * pre_gate
    past = v if initial_state is None else torch.cat([initial_state.to(v.dtype), v], 1)
    y = torch_fft(past, filter.repeat_interleave(dim // filter.shape[0], 0))[:, past.shape[1] - seqlen :]
    y = y if skip is None else y + v * skip.to(v.dtype)
    y = y if post_gate is None else y * post_gate
    if not return_final_state:
        return y
    padded = F.pad(past, (0, 0, max(kept - past.shape[1], 0), 0))
    return y, padded[:, padded.shape[1] - kept :].to(torch.promote_types(u.dtype, torch.float32))


# Outside of graphs: one would hold every step of a scan, and torch.compile makes no code for complex numbers.
_OWN = {"selective_scan": plain_scan, "fft_conv": plain_fft_conv}
_disable: Any = torch.compiler.disable  # it has no types
PLAIN: dict[str, Callable[..., Any]] = {name: _disable(function) for name, function in _OWN.items()}
# Not RoutingPlan, which is the reference's own.
FUNCTIONS = [n for names in OPS.values() for n in names if getattr(madkernels, n) is not getattr(reference, n)]


def modules_with_ops() -> list[ModuleType]:
    """The modules of layers that take an op."""
    modules = [module for name, module in sys.modules.items() if name.startswith("madkernels.models.layers.")]
    return [module for module in modules if any(_is_op(module, name) for name in FUNCTIONS)]


def _is_op(module: ModuleType, name: str) -> bool:
    return callable(getattr(module, name, None)) and getattr(module, name) is getattr(madkernels, name)


def has_ops(layer: nn.Module) -> bool:
    """Whether a layer takes an op, itself or in a part of it."""
    names = {module.__name__ for module in modules_with_ops()}
    return any(kind.__module__ in names for part in layer.modules() for kind in type(part).__mro__)


@contextmanager
def plain_ops() -> Iterator[None]:
    """Layers take no op: where they choose by the device, they find it on none."""
    changes: list[tuple[ModuleType, str, Any]] = [(linear, "LEAST", sys.maxsize)]  # their products are torch's
    for module in modules_with_ops():
        changes += [(module, n, PLAIN.get(n) or getattr(reference, n)) for n in FUNCTIONS if _is_op(module, n)]
        if hasattr(module, "DEVICES"):
            changes.append((module, "DEVICES", frozenset[str]()))
    kept = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its layers on plain torch."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with plain_ops():
            return function(*args, **kwargs)

    return call
