"""Products of groups of rows, each with the matrix of its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from madkernels import reference
from madkernels.ops.registration import (
    needs_gradient,
    register_autocast,
    register_derivatives,
    register_vmap_one_by_one,
)
from madkernels.reference.activations import GATED

_forward = torch.ops.madkernels.grouped_gemm.default


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    gather: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """Rows of x times the matrix of their group, through an activation: the product of a mixture of experts.

    For the rows r of group g, those from offsets[g] to offsets[g + 1] - 1::

        h_r = weight[g] x_r + bias[g]
        y_r = act(h_r)

    Rows of no group are 0. Differentiable in x, weight and bias, to any order (second derivatives go through the
    reference), in forward mode too. Deterministic, whatever the number of threads; a row does not depend on others.

    Args:
        x: (rows, inputs). float32, bfloat16, float16, or float64.
        weight: (groups, outputs, inputs), each as of torch.nn.Linear; dtype of `x`.
        offsets: int32 (groups + 1,), rising: where the rows of each group begin, and where those of the last end. Groups may
            be empty.
        bias: (groups, outputs), dtype of `x`.
        activation: "silu", "gelu" (by erf), "relu", "relu2" (the square of relu), or gated (Shazeer 2020, arXiv 2002.05202):
            "swiglu", "geglu", "reglu", which take the first half of h as gate and give act(gate) times the second half.
        gather: int32 (rows,): row r is x[gather[r]], of an x with any number of rows; -1 is a row of zeros.
        transpose: the weight is (groups, inputs, outputs).

    Returns:
        y (rows, outputs), or (rows, outputs / 2) of a gated activation; dtype of `x`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or offsets that fall; the message names the argument.
    """
    y: Tensor = _forward_and_keep(x, weight, offsets, bias, gather, activation, transpose, False)[0]
    return y


def _forward_and_keep(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Keeps what a backward needs where one may follow; under vmap too, where only the rule can see whether it does."""
    found: tuple[Tensor, Tensor] = _forward(*arguments[:-1], arguments[-1] or needs_gradient(*arguments))
    return found


@torch.library.register_fake("madkernels::grouped_gemm")
def _forward_fake(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, activation: str | None,
    transpose: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, outputs = (x if gather is None else gather).shape[0], weight.shape[2 if transpose else 1]
    h = x.new_empty(rows, outputs) if keep and activation else x.new_empty(0)
    return x.new_empty(rows, outputs // 2 if activation in GATED else outputs), h


@torch.library.register_fake("madkernels::grouped_gemm_backward")
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty(0 if bias is None else bias.shape)


# FLOPs of all rows, as if each were in a group: how many are is known to the values of the offsets alone.
@register_flop_formula(torch.ops.madkernels.grouped_gemm)
def _forward_flops(
    x: Sequence[int],
    weight: Sequence[int],
    offsets: Any,
    bias: Any,
    gather: Sequence[int] | None,
    *rest: Any,
    **options: Any,
) -> int:
    return 2 * (x if gather is None else gather)[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.madkernels.grouped_gemm_backward)
def _backward_flops(dy: Any, *arguments: Any, **options: Any) -> int:
    return 2 * _forward_flops(*arguments)


def _by_reference(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, activation: str | None,
    transpose: bool, keep: bool = False,
) -> Sequence[Tensor]:  # fmt: skip
    options: dict[str, Any] = {"bias": bias, "activation": activation, "gather": gather, "transpose": transpose}
    return reference.grouped_gemm(x, weight, offsets, **options), x.new_empty(0)  # its gradients need no h


register_derivatives("madkernels::grouped_gemm", ("x", "weight", "bias"), _by_reference, only_kept=("h",))
register_autocast("madkernels::grouped_gemm", activations=("x", "weight", "bias"))
register_vmap_one_by_one("madkernels::grouped_gemm", op=_forward_and_keep)
