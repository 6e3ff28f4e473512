"""A matrix product for each group of consecutive rows, on torch's grouped product, without the host knowing the groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 16  # bytes that rows are a multiple of, where torch's product is used


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[g - 1] to ends[g] of x times the transpose of weight[g].

    Args:
        x: (rows, inputs).
        weight: (groups, outputs, inputs), in x's dtype.
        ends: (groups,) int32, rising to the number of rows; a group may be empty.

    Returns:
        (rows, outputs).
    """
    y: Tensor = _GroupedLinear.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    return y


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        matrices = weight.mT
        return _rows_op(x, matrices, ends) if _is_opaque(x, *matrices.shape[1:]) else _rows(x, matrices, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, ends = ctx.saved_tensors
        return (
            grouped_linear(dy, weight.mT, ends) if ctx.needs_input_grad[0] else None,
            _GroupedOuter.apply(dy, x, ends) if ctx.needs_input_grad[1] else None,  # type: ignore[no-untyped-call]
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        x, weight, ends = _batched(info.batch_size, in_dims, args)
        y = grouped_linear(x.flatten(0, 1), weight.flatten(0, 1), _one_after_another(ends, x.shape[1]))
        return y.view(*x.shape[:2], -1), 0


class _GroupedOuter(torch.autograd.Function):
    """(groups, outputs, inputs): of each group's rows dy' x, the gradient of a weight."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        return _outer_op(dy, x, ends) if _is_opaque(x, x.shape[1], dy.shape[1]) else _outer(dy, x, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dweight,) = grad_outputs
        dy, x, ends = ctx.saved_tensors
        return grouped_linear(x, dweight, ends), grouped_linear(dy, dweight.mT, ends), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        dy, x, ends = _batched(info.batch_size, in_dims, args)
        joined = _one_after_another(ends, x.shape[1])
        dweight = _GroupedOuter.apply(dy.flatten(0, 1), x.flatten(0, 1), joined)  # type: ignore[no-untyped-call]
        return dweight.view(*ends.shape, *dweight.shape[1:]), 0


def _rows(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows of x times the (groups, inputs, outputs) matrix of their group."""
    if _fits(x, *matrices.shape[1:]):
        return F.grouped_mm(x.contiguous(), matrices, offs=ends)
    return torch.cat([part @ matrix for part, matrix in zip(_split(x, ends), matrices, strict=True)])


def _outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """For each group the (outputs, inputs) matrix dy' x over its rows."""
    if _fits(x, x.shape[1], dy.shape[1]):
        return F.grouped_mm(dy.contiguous().mT, x.contiguous(), offs=ends)
    parts = zip(*(_split(t, ends) for t in (dy, x)), strict=True)
    return torch.stack([a.mT @ b for a, b in parts])


# What a graph cannot see into: the loop needs the groups on the host, and torch.compile takes the grouped product in
# bfloat16 alone.
_rows_op = torch.library.custom_op("madkernels::grouped_rows", _rows, mutates_args=())
_outer_op = torch.library.custom_op("madkernels::grouped_outer", _outer, mutates_args=())


@_rows_op.register_fake
def _rows_fake(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@_outer_op.register_fake
def _outer_fake(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _is_opaque(x: Tensor, *widths: int) -> bool:
    return torch.compiler.is_compiling() and not (x.dtype == torch.bfloat16 and _fits(x, *widths))


def _fits(x: Tensor, *widths: int) -> bool:
    """Whether torch's grouped product takes rows of these widths; float64 and odd widths it does not."""
    aligned = all(width * x.element_size() % _ALIGNMENT == 0 for width in widths)
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and aligned and x.shape[0] > 0


def _split(x: Tensor, ends: Tensor) -> list[Tensor]:
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return list(torch.split(x, counts))


def _batched(size: int, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Each with the mapped axis first."""
    pairs = zip(tensors, dims, strict=True)
    return [t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs]


def _one_after_another(ends: Tensor, rows: int) -> Tensor:
    """The ends of (maps, groups) when the rows of all maps follow one another."""
    starts = torch.arange(len(ends), device=ends.device, dtype=ends.dtype) * rows
    return (ends + starts[:, None]).flatten()
