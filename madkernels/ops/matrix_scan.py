"""Scans of matrix states: the public functions, and shapes, gradients and autocast for torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from madkernels import _C, reference
from madkernels.ops.registration import (
    keep_under_recomputation,
    needs_gradient,
    refuse_tangents,
    register_autocast,
    register_derivatives,
    register_vmap_one_by_one,
)

_forward = torch.ops.madkernels.matrix_scan.default
_step = torch.ops.madkernels.matrix_scan_step.default

CHUNK = _C.MATRIX_CHUNK


def matrix_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of layers whose state is a matrix in each head: gated linear attention (Yang et al. 2023, arXiv 2312.06635),
    RWKV (Peng et al. 2024, arXiv 2404.05892) and the delta rule (Yang et al. 2024, arXiv 2406.06484 and 2412.06464).

    For each head::

        S'     = diag(exp(log_decay[t])) S[t-1]
        u[t]   = v[t]                with beta, the delta rule: beta[t] (v[t] - k[t]' S')
        S[t]   = S' + k[t] u[t]'
        out[t] = q[t]' S[t]          with a bonus: q[t]' (S[t-1] + diag(bonus) k[t] u[t]')

    Args:
        q: what reads the state, (batch, seqlen, groups, key_dim) where groups divides the heads and group g serves heads
            ``g * heads / groups`` onwards; float32, bfloat16, float16, or float64.
        k: keys, like `q`.
        v: values, (batch, seqlen, heads, value_dim), dtype of `q`.
        log_decay: at most 0, (batch, seqlen, heads, key_dim), or 1 for key_dim where a head decays as one; float32 (float64
            with float64 `q`). At -inf what came before is forgotten. Nothing decays if absent.
        beta: rates of the delta rule, (batch, seqlen, heads), dtype of `log_decay`; keys of norm at most 1 with rates up to
            2 keep it stable.
        bonus: of the step itself, (heads, key_dim), dtype of `log_decay`.
        initial_state: S before the first step, (batch, heads, key_dim, value_dim), or (num_docs, ...) with `cu_seqlens`;
            dtype of `log_decay`. Zero if absent.
        cu_seqlens: offsets of documents packed along the sequence, (num_docs + 1,) int32, from 0 to seqlen; batch must be 1.
            No state crosses from one document to the next.
        return_final_state: whether to return the state after each sequence (document) too.

    Tensors may be views of any strides. Arithmetic and states are in float32 (float64 with float64 `q`).

    Returns:
        out (batch, seqlen, heads, value_dim), dtype of `q`; with `return_final_state` also the states, as `initial_state`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.

    Differentiable in all tensors, the states included, and a second time through the reference. The same inputs give the
    same bits, whatever the number of threads. On the CPU alone.
    """
    tensors = (q, k, v, log_decay, beta, bonus, initial_state)
    out, state, _ = _forward(*tensors, cu_seqlens, needs_gradient(*tensors))
    return (out, state) if return_final_state else out


def matrix_scan_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
) -> Tensor:
    """One step of :func:`matrix_scan`, for decoding. Updates `state` in place; not differentiable.

    Args:
        state: S of the step before, (batch, heads, key_dim, value_dim), contiguous, float32 (float64 with float64 `q`);
            becomes S of this step.
        q: (batch, groups, key_dim); likewise `k`.
        v: (batch, heads, value_dim).
        log_decay: (batch, heads, key_dim or 1).
        beta: (batch, heads).
        bonus: as in :func:`matrix_scan`.

    Returns:
        out (batch, heads, value_dim), dtype of `q`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    refuse_tangents("matrix_scan_step", state, q, k, v, log_decay, beta, bonus)
    with torch.no_grad():
        out: Tensor = _step(state, q, k, v, log_decay, beta, bonus)
    return out


def _forward_and_save(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """For vmap, under which the public function cannot see whether a gradient will be asked for."""
    found: tuple[Tensor, Tensor, Tensor] = _forward(*arguments[:-1], arguments[-1] or needs_gradient(*arguments))
    return found


def _states(q: Tensor, *shape: int) -> Tensor:
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _like(argument: Tensor | None, q: Tensor) -> Tensor:
    """The gradient of an argument that is wide, empty where that is absent."""
    return _states(q, *((0,) if argument is None else argument.shape))


@torch.library.register_fake("madkernels::matrix_scan")
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, bonus: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, seqlen, heads, value_dim = v.shape
    if cu_seqlens is None:
        sequences, slots = batch, batch * ((seqlen + CHUNK - 1) // CHUNK)
    else:
        sequences = cu_seqlens.shape[0] - 1
        slots = seqlen // CHUNK + sequences
    checkpoints = (slots, heads, value_dim, q.shape[3]) if save_checkpoints else (0,)
    return v.new_empty(v.shape), _states(q, sequences, heads, q.shape[3], value_dim), _states(q, *checkpoints)


@torch.library.register_fake("madkernels::matrix_scan_backward")
def _backward_fake(
    dout: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    beta: Tensor | None, bonus: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    activations, wide = (q, k, v), (log_decay, beta, bonus, initial_state)
    return (*(t.new_empty(t.shape) for t in activations), *(_like(t, q) for t in wide))


@torch.library.register_fake("madkernels::matrix_scan_step")
def _step_fake(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return v.new_empty(v.shape)


# As the recurrence is stated: 2 for what a step adds to a state, 2 for what is read of it, 2 for what the delta rule reads.
@register_flop_formula(torch.ops.madkernels.matrix_scan)
def _forward_flops(q: Sequence[int], k: Any, v: Sequence[int], log_decay: Any, beta: Any, *rest: Any, **options: Any) -> int:
    batch, seqlen, heads, value_dim = v
    return (4 if beta is None else 6) * batch * seqlen * heads * q[3] * value_dim


@register_flop_formula(torch.ops.madkernels.matrix_scan_backward)
def _backward_flops(dout: Any, dfinal_state: Any, *arguments: Any, **options: Any) -> int:
    return 2 * _forward_flops(*arguments)


def _by_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, bonus: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, save_checkpoints: bool = False,
) -> Sequence[Tensor]:  # fmt: skip
    options: dict[str, Any] = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_final_state": True}
    out, state = reference.matrix_scan(q, k, v, log_decay, beta, bonus, **options)
    return out, state, state.new_empty(0)  # no checkpoints: its gradients are torch's own


_DIFFERENTIABLE = ("q", "k", "v", "log_decay", "beta", "bonus", "initial_state")
register_derivatives("madkernels::matrix_scan", _DIFFERENTIABLE, _by_reference)
register_autocast("madkernels::matrix_scan", activations=("q", "k", "v"))
register_autocast("madkernels::matrix_scan_step", activations=("q", "k", "v"))
register_vmap_one_by_one("madkernels::matrix_scan", op=_forward_and_save)
keep_under_recomputation("madkernels::matrix_scan")
