"""Short causal depthwise convolution: the public functions, and shapes, gradients and autocast for torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madkernels import reference
from madkernels.ops.registration import (
    keep_under_recomputation,
    refuse_tangents,
    register_autocast,
    register_derivatives,
    register_vmap,
    rows_like,
)

_forward = torch.ops.madkernels.causal_conv.default
_backward = torch.ops.madkernels.causal_conv_backward.default
_step = torch.ops.madkernels.causal_conv_step.default


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution along the sequence, with an activation.

    ``out[t, d] = activation(bias[d] + sum_j weight[d, j] x[t - (width - 1) + j, d])``, as in the short convolutions of H3
    and Mamba (arXiv 2212.14052, 2312.00752). `weight` is ``torch.nn.Conv1d(dim, dim, width, groups=dim).weight[:, 0]``.

    Args:
        x: (batch, seqlen, dim); float32, bfloat16, float16 or float64. A transposed view of (batch, dim, seqlen) is read in
            place.
        weight: (dim, width), any width from 1; dtype of `x`, or float32.
        bias: (dim,), dtype of `weight`.
        activation: None or "silu".
        initial_state: the inputs before the first, (batch, width - 1, dim), or (num_docs, width - 1, dim) with `cu_seqlens`;
            dtype of `x`. Zero if absent.
        cu_seqlens: offsets of documents packed along the sequence, (num_docs + 1,) int32, from 0 to seqlen; batch must be 1.
        return_final_state: whether to return the last width - 1 inputs of each sequence (document) too.

    Returns:
        out (batch, seqlen, dim), dtype and layout of `x`; with `return_final_state` also the states, as `initial_state`.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.

    Differentiable in all tensors, the states included, and a second time through the reference. The same inputs give the
    same bits, whatever the number of threads.
    """
    out, state = _forward(x, weight, bias, _is_silu(activation), initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def causal_conv_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """One step of :func:`causal_conv`, for decoding. Updates `state` in place; not differentiable.

    Args:
        state: the last inputs, (batch, width - 1, dim), contiguous, dtype of `x`; `x` is shifted in.
        x: (batch, dim).
        weight, bias, activation: as in :func:`causal_conv`.

    Returns:
        out (batch, dim), dtype of `x`.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    refuse_tangents("causal_conv_step", state, x, weight, bias)
    with torch.no_grad():
        out: Tensor = _step(state, x, weight, bias, _is_silu(activation))
    return out


def _is_silu(activation: str | None) -> bool:
    if activation not in (None, "silu"):
        raise ValueError(f'activation is {activation!r}; it takes None or "silu"')
    return activation == "silu"


@torch.library.register_fake("madkernels::causal_conv")
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return rows_like(x), x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])


@torch.library.register_fake("madkernels::causal_conv_backward")
def _backward_fake(
    dout: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        rows_like(x),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty((0,) if initial_state is None else initial_state.shape),
    )


@torch.library.register_fake("madkernels::causal_conv_step")
def _step_fake(state: Tensor, x: Tensor, *parameters: Any) -> Tensor:
    return x.new_empty(x.shape)


def _by_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Sequence[Tensor]:
    activation = "silu" if silu else None
    options: dict[str, Any] = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_final_state": True}
    return tuple(reference.causal_conv(x, weight, bias, activation=activation, **options))


_DIFFERENTIABLE = ("x", "weight", "bias", "initial_state")
register_derivatives("madkernels::causal_conv", _DIFFERENTIABLE, _by_reference)
register_autocast("madkernels::causal_conv", activations=("x", "initial_state"))
register_autocast("madkernels::causal_conv_step", activations=("x",))
register_vmap("madkernels::causal_conv", {"x": 2, "weight": 0, "bias": 0, "initial_state": 2}, results=(2, 2))
keep_under_recomputation("madkernels::causal_conv")
