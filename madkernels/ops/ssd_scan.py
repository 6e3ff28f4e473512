"""The scan of Mamba-2: the public functions, and shapes, gradients and autocast for torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from madkernels import reference
from madkernels.ops.registration import (
    keep_under_recomputation,
    refuse_tangents,
    register_autocast,
    register_derivatives,
    register_vmap_one_by_one,
)

_forward = torch.ops.madkernels.ssd_scan.default
_step = torch.ops.madkernels.ssd_scan_step.default


def ssd_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-2 (state-space duality; Dao and Gu 2024, arXiv 2405.21060), in chunks of matrix products.

    For each head h, which decays as one, of the group g::

        S[t, h]   = exp(delta[t, h] A[h]) S[t-1, h] + delta[t, h] x[t, h] B[t, g]'
        out[t, h] = S[t, h] C[t, g] + D[h] x[t, h]

    Args:
        x: (batch, seqlen, heads, head_dim); float32, bfloat16, float16, or float64.
        delta: step sizes, after bias and softplus, (batch, seqlen, heads), float32 (float64 with float64 `x`).
        A: (heads,), dtype of `delta`; negative for a stable recurrence.
        B: input projection, (batch, seqlen, groups, dstate) where groups divides heads and group g serves heads
            ``g * heads / groups`` onwards; dtype of `x`.
        C: output projection, like `B`.
        D: skip weight, (heads,) or (heads, head_dim), dtype of `delta`.
        initial_state: S before the first step, (batch, heads, head_dim, dstate), or (num_docs, ...) with `cu_seqlens`; dtype
            of `delta`. Zero if absent.
        cu_seqlens: offsets of documents packed along the sequence, (num_docs + 1,) int32, from 0 to seqlen; batch must be 1.
            No state crosses from one document to the next.
        return_final_state: whether to return the state after each sequence (document) too.

    Activations may be views of any strides. Sums and states are in the dtype of `delta`. In bfloat16 calls, what is computed
    on the way is rounded to bfloat16 before it is multiplied: on a GPU, and where the CPU multiplies pairs of bfloat16.

    Returns:
        out (batch, seqlen, heads, head_dim), dtype of `x`; with `return_final_state` also the states, as `initial_state`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.

    Differentiable in all tensors, the states included, and a second time through the reference. The same inputs give the
    same bits, whatever the number of threads.
    """
    out, state = _forward(x, delta, A, B, C, D, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def ssd_scan_step(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """One step of :func:`ssd_scan`, for decoding. Updates `state` in place; not differentiable.

    Args:
        state: S of the step before, (batch, heads, head_dim, dstate), contiguous, dtype of `delta`; becomes S of this step.
        x: (batch, heads, head_dim).
        delta: (batch, heads).
        A, D: as in :func:`ssd_scan`.
        B: (batch, groups, dstate); likewise `C`.

    Returns:
        out (batch, heads, head_dim), dtype of `x`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    refuse_tangents("ssd_scan_step", state, x, delta, A, B, C, D)
    with torch.no_grad():
        out: Tensor = _step(state, x, delta, A, B, C, D)
    return out


@torch.library.register_fake("madkernels::ssd_scan")
def _forward_fake(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), A.new_empty(sequences, x.shape[2], x.shape[3], B.shape[3])


@torch.library.register_fake("madkernels::ssd_scan_backward")
def _backward_fake(
    dout: Tensor, dfinal_state: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        x.new_empty(x.shape),
        A.new_empty(delta.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty((0,) if D is None else D.shape),
        A.new_empty((0,) if initial_state is None else initial_state.shape),
    )


@torch.library.register_fake("madkernels::ssd_scan_step")
def _step_fake(state: Tensor, x: Tensor, *parameters: Any) -> Tensor:
    return x.new_empty(x.shape)


# As the recurrence is stated: 2 for what a step adds to a state, 2 for what is read of it.
@register_flop_formula(torch.ops.madkernels.ssd_scan)
def _forward_flops(x: Sequence[int], delta: Any, A: Any, B: Sequence[int], *rest: Any, **options: Any) -> int:
    batch, seqlen, heads, head_dim = x
    return 4 * batch * seqlen * heads * head_dim * B[3]


@register_flop_formula(torch.ops.madkernels.ssd_scan_backward)
def _backward_flops(dout: Any, dfinal_state: Any, *arguments: Any, **options: Any) -> int:
    return 2 * _forward_flops(*arguments)


def _by_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Sequence[Tensor]:  # fmt: skip
    options: dict[str, Any] = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_final_state": True}
    out, state = reference.ssd_scan(x, delta, A, B, C, D, **options)
    return out, state


register_derivatives("madkernels::ssd_scan", ("x", "delta", "A", "B", "C", "D", "initial_state"), _by_reference)
register_autocast("madkernels::ssd_scan", activations=("x", "B", "C"))
register_autocast("madkernels::ssd_scan_step", activations=("x", "B", "C"))
register_vmap_one_by_one("madkernels::ssd_scan")
keep_under_recomputation("madkernels::ssd_scan")
