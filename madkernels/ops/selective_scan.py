"""Selective scan (S6): the public functions, and shapes, gradients and autocast for torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madkernels import _C, reference
from madkernels.ops.registration import (
    Axis,
    keep_under_recomputation,
    needs_gradient,
    refuse_tangents,
    register_autocast,
    register_derivatives,
    register_vmap,
    rows_like,
)

_forward = torch.ops.madkernels.selective_scan.default
_backward = torch.ops.madkernels.selective_scan_backward.default
_step = torch.ops.madkernels.selective_scan_step.default

CHUNK = _C.SCAN_CHUNK


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan, the recurrence of Mamba (Gu and Dao 2023, arXiv 2312.00752).

    With ``delta' = delta + delta_bias`` (through softplus if `delta_softplus`), for each channel d and state n::

        h[t, d, n] = exp(delta'[t, d] A[d, n]) h[t-1, d, n] + delta'[t, d] B[t, n] u[t, d]
        out[t, d]  = (sum_n C[t, n] h[t, d, n] + D[d] u[t, d]) silu(z[t, d])

    Args:
        u: (batch, seqlen, dim); float32, bfloat16, float16, or float64.
        delta: step sizes, (batch, seqlen, dim), dtype of `u`.
        A: (dim, dstate), float32 (float64 with float64 `u`); negative for a stable recurrence.
        B: input projection, (batch, seqlen, dstate), or (batch, seqlen, groups, dstate) where groups divides dim and
            group g serves channels ``g * dim / groups`` onwards; dtype of `u`.
        C: output projection, like `B`.
        D: skip weight, (dim,), dtype of `A`.
        z: gate, (batch, seqlen, dim), dtype of `u`.
        delta_bias: (dim,), dtype of `A`.
        delta_softplus: whether softplus is applied to the biased `delta`.
        initial_state: h before the first step, (batch, dim, dstate), or (num_docs, dim, dstate) with `cu_seqlens`; dtype of
            `A`. Zero if absent.
        cu_seqlens: offsets of documents packed along the sequence, (num_docs + 1,) int32, from 0 to seqlen; batch must be 1.
            No state crosses from one document to the next.
        return_final_state: whether to return the state after each sequence (document) too.

    Any of the activations may be a view whose last or second-last axis is dense, such as a transposed (batch, dim, seqlen)
    tensor: it is read in place. Arithmetic and states are in the dtype of `A`.

    Returns:
        out (batch, seqlen, dim), dtype and layout of `u`; with `return_final_state` also the states, as `initial_state`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.

    Differentiable in all tensors, the states included, and a second time through the reference. The same inputs give the
    same bits, whatever the number of threads.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    save = needs_gradient(*tensors, initial_state)
    out, state, _ = _forward(*tensors, delta_softplus, initial_state, cu_seqlens, save)
    return (out, state) if return_final_state else out


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """One step of :func:`selective_scan`, for decoding. Updates `state` in place; not differentiable.

    Args:
        state: h of the step before, (batch, dim, dstate), contiguous, dtype of `A`; becomes h of this step.
        u: (batch, dim); likewise `delta` and `z`.
        B: (batch, dstate) or (batch, groups, dstate); likewise `C`.
        A, D, delta_bias, delta_softplus: as in :func:`selective_scan`.

    Returns:
        out (batch, dim), dtype of `u`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    refuse_tangents("selective_scan_step", state, u, delta, A, B, C, D, z, delta_bias)
    with torch.no_grad():
        out: Tensor = _step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return out


def _forward_and_save(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """For vmap, under which the public function cannot see whether a gradient will be asked for."""
    found: tuple[Tensor, Tensor, Tensor] = _forward(*arguments[:-1], arguments[-1] or needs_gradient(*arguments))
    return found


@torch.library.register_fake("madkernels::selective_scan")
def _forward_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, seqlen, dim = u.shape
    dstate = A.shape[1]
    if cu_seqlens is None:
        sequences, slots = batch, batch * ((seqlen + CHUNK - 1) // CHUNK)
    else:
        sequences = cu_seqlens.shape[0] - 1
        slots = seqlen // CHUNK + sequences
    checkpoints = (slots, dstate, dim) if save_checkpoints else (0,)
    return rows_like(u), A.new_empty(sequences, dim, dstate), A.new_empty(checkpoints)


@torch.library.register_fake("madkernels::selective_scan_backward")
def _backward_fake(
    dout: Tensor, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, checkpoints: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        rows_like(u),
        rows_like(delta),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty((0,) if D is None else D.shape),
        u.new_empty(0) if z is None else rows_like(z),
        A.new_empty((0,) if delta_bias is None else delta_bias.shape),
        A.new_empty((0,) if initial_state is None else initial_state.shape),
    )


@torch.library.register_fake("madkernels::selective_scan_step")
def _step_fake(state: Tensor, u: Tensor, *parameters: Any) -> Tensor:
    return u.new_empty(u.shape)


def _by_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    save_checkpoints: bool = False,
) -> Sequence[Tensor]:  # fmt: skip
    options: dict[str, Any] = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_final_state": True}
    out, state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **options)
    return out, state, A.new_empty(0)  # no checkpoints: its gradients are torch's own


_DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
register_derivatives("madkernels::selective_scan", _DIFFERENTIABLE, _by_reference)
register_autocast("madkernels::selective_scan", activations=("u", "delta", "B", "C", "z"))
register_autocast("madkernels::selective_scan_step", activations=("u", "delta", "B", "C", "z"))
_CHANNELS: dict[str, Axis] = {
    "u": 2, "delta": 2, "A": 0, "D": 0, "z": 2, "delta_bias": 0, "initial_state": 1,
    "B": (2, 4), "C": (2, 4),  # groups of channels, if they have the axis
}  # fmt: skip
register_vmap("madkernels::selective_scan", _CHANNELS, results=(2, 1, 2), op=_forward_and_save)
keep_under_recomputation("madkernels::selective_scan")
