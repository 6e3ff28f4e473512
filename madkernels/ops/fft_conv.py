"""Long depthwise convolution: the public functions, and shapes, gradients and autocast for torch."""

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

_forward = torch.ops.madkernels.fft_conv.default
_backward = torch.ops.madkernels.fft_conv_backward.default
_step = torch.ops.madkernels.fft_conv_step.default


def fft_conv(
    u: Tensor,
    filter: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution along the sequence with a filter of any length, gates and skip fused.

    With ``v = pre_gate * u`` and g the group of channel d,
    ``out[t, d] = post_gate[t, d] (skip[d] v[t, d] + sum_j filter[g, j] v[t - j, d])``: the long convolution of Hyena
    (arXiv 2302.10866). It is computed by FFT, or tap by tap where that takes less. Nothing wraps around, whatever the sizes.

    Args:
        u: (batch, seqlen, dim); float32, bfloat16, float16 or float64. A transposed view of (batch, dim, seqlen) is read in
            place.
        filter: (groups, filter_len), lag 0 first; dim / groups neighbouring channels, a whole number, share a filter. Any
            length; dtype of `u`, or float32. A transposed view of (filter_len, groups) costs no copy.
        skip: (dim,), dtype of `u`, or float32.
        pre_gate, post_gate: (batch, seqlen, dim), dtype of `u`.
        causal: if False, the filter is centred, as by `mode="same"` in SciPy: tap j has the lag j - (filter_len - 1) // 2.
        cu_seqlens: offsets of documents packed along the sequence, (num_docs + 1,) int32, from 0 to seqlen; batch must be 1.
        initial_state: the inputs v before the first, (batch, history, dim), or (num_docs, history, dim) with `cu_seqlens`;
            history up to filter_len - 1; float32 (float64 with float64). Causal only.
        return_final_state: whether to return the last filter_len - 1 inputs v of each sequence (document) too. Causal only.

    Returns:
        out (batch, seqlen, dim), dtype and layout of `u`; with `return_final_state` also the states, (batch or num_docs,
        filter_len - 1, dim), which continue the sequences as `initial_state`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.

    Differentiable in all tensors, the states included, and a second time through the reference. Arithmetic and the gradient
    of the filter are in float32 (float64 with float64). The same inputs give the same bits, whatever the number of threads.
    By FFT, a NaN or an infinity reaches all outputs of its sequence and channel, those before it too.
    """
    out, state = _forward(u, filter, skip, pre_gate, post_gate, causal, initial_state, cu_seqlens, return_final_state)
    return (out, state) if return_final_state else out


def fft_conv_step(
    state: Tensor,
    u: Tensor,
    filter: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """One step of :func:`fft_conv`, for decoding. Updates `state` in place; not differentiable.

    Exact, at filter_len multiply-adds per channel, and one read of the filter and a read and a write of the state.

    Args:
        state: the last inputs v, (batch, filter_len - 1, dim), contiguous, float32 (float64 with float64); v is shifted in.
        u, pre_gate, post_gate: (batch, dim).
        filter, skip: as in :func:`fft_conv`.

    Returns:
        out (batch, dim), dtype of `u`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    refuse_tangents("fft_conv_step", state, u, filter, skip, pre_gate, post_gate)
    with torch.no_grad():
        out: Tensor = _step(state, u, filter, skip, pre_gate, post_gate)
    return out


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


@torch.library.register_fake("madkernels::fft_conv")
def _forward_fake(
    u: Tensor, filter: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, causal: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, with_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (sequences, filter.shape[1] - 1, u.shape[2]) if with_final_state else (0,)
    return rows_like(u), u.new_empty(state, dtype=_wide(u))


@torch.library.register_fake("madkernels::fft_conv_backward")
def _backward_fake(
    dout: Tensor, dfinal_state: Tensor | None, u: Tensor, filter: Tensor, skip: Tensor | None, pre_gate: Tensor | None,
    post_gate: Tensor | None, causal: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    by_lag = filter.stride(0) == 1 and filter.stride(1) != 1
    dfilter = filter.new_empty(filter.shape[::-1]).T if by_lag else filter.new_empty(filter.shape)
    return (
        rows_like(u),
        dfilter,
        u.new_empty(0) if skip is None else skip.new_empty(skip.shape),
        u.new_empty(0) if pre_gate is None else rows_like(pre_gate),
        u.new_empty(0) if post_gate is None else rows_like(post_gate),
        u.new_empty((0,) if initial_state is None else initial_state.shape, dtype=_wide(u)),
    )


@torch.library.register_fake("madkernels::fft_conv_step")
def _step_fake(state: Tensor, u: Tensor, *parameters: Any) -> Tensor:
    return u.new_empty(u.shape)


def _by_reference(
    u: Tensor, filter: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, causal: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, with_final_state: bool | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    found = reference.fft_conv(
        u, filter, skip=skip, pre_gate=pre_gate, post_gate=post_gate, causal=causal, initial_state=initial_state,
        cu_seqlens=cu_seqlens, return_final_state=causal if with_final_state is None else with_final_state,
    )  # fmt: skip
    return (found, u.new_empty(0, dtype=_wide(u))) if isinstance(found, Tensor) else found


_DIFFERENTIABLE = ("u", "filter", "skip", "pre_gate", "post_gate", "initial_state")
register_derivatives("madkernels::fft_conv", _DIFFERENTIABLE, _by_reference)
register_autocast("madkernels::fft_conv", activations=("u", "pre_gate", "post_gate"))
register_autocast("madkernels::fft_conv_step", activations=("u", "pre_gate", "post_gate"))
_CHANNELS = {"u": 2, "filter": 0, "skip": 0, "pre_gate": 2, "post_gate": 2, "initial_state": 2}
register_vmap("madkernels::fft_conv", _CHANNELS, results=(2, 2))
keep_under_recomputation("madkernels::fft_conv")
