"""Long depthwise convolution, lag by lag.

    v = pre_gate u
    out[t, d] = post_gate[t, d] (skip[d] v[t, d] + sum_j filter[g, j] v[t + ahead - j, d])

with g the group of channel d; `ahead` is 0 if causal, and (filter_len - 1) // 2 if not. What lies before a sequence is its
initial state (inputs v), or zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.reference.documents import document_bounds


def fft_conv(
    u: Tensor,  # (batch, seqlen, dim)
    filter: Tensor,  # (groups, filter_len)
    *,
    skip: Tensor | None = None,  # (dim,)
    pre_gate: Tensor | None = None,  # (batch, seqlen, dim)
    post_gate: Tensor | None = None,  # (batch, seqlen, dim)
    causal: bool = True,
    cu_seqlens: Tensor | None = None,  # (num_docs + 1,)
    initial_state: Tensor | None = None,  # (batch, history, dim), or (num_docs, history, dim) with cu_seqlens
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of :func:`madkernels.fft_conv`; computes in the widest dtype of its inputs, at least float32."""
    length = filter.shape[1]
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (begin, end) in enumerate(document_bounds(cu_seqlens)):
            out, state = fft_conv(
                u[:, begin:end], filter, skip=skip, causal=causal,
                pre_gate=None if pre_gate is None else pre_gate[:, begin:end],
                post_gate=None if post_gate is None else post_gate[:, begin:end],
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                return_final_state=True,
            )  # fmt: skip
            outs.append(out)
            states.append(state)
        packed = torch.cat(outs, dim=1) if outs else torch.zeros_like(u)
        final = torch.cat(states) if states else u.new_zeros(0, length - 1, u.shape[2], dtype=_state_dtype(u))
        return (packed, final) if return_final_state else packed

    seqlen, dim = u.shape[1:]
    dtype = torch.promote_types(_state_dtype(u), filter.dtype)
    v = u.to(dtype) if pre_gate is None else u.to(dtype) * pre_gate.to(dtype)
    history = v if initial_state is None else torch.cat([initial_state.to(dtype), v], dim=1)
    padded = F.pad(history, (0, 0, seqlen + length - 1 - history.shape[1], 0))  # length - 1 inputs before the first
    final = padded[:, seqlen:].to(_state_dtype(u))
    ahead = 0 if causal else (length - 1) // 2
    padded = F.pad(padded[:, ahead:], (0, 0, 0, ahead))
    taps = filter.to(dtype).repeat_interleave(dim // max(filter.shape[0], 1), dim=0)
    out = torch.zeros_like(v)
    for lag in range(length):
        first = length - 1 - lag
        out = out + padded[:, first : first + seqlen] * taps[:, lag]
    if skip is not None:
        out = out + v * skip.to(dtype)
    if post_gate is not None:
        out = out * post_gate.to(dtype)
    out = out.to(u.dtype)
    return (out, final) if return_final_state else out


def fft_conv_step(
    state: Tensor,  # (batch, filter_len - 1, dim), updated in place
    u: Tensor,  # (batch, dim)
    filter: Tensor,  # (groups, filter_len)
    *,
    skip: Tensor | None = None,  # (dim,)
    pre_gate: Tensor | None = None,  # (batch, dim)
    post_gate: Tensor | None = None,  # (batch, dim)
) -> Tensor:
    """The meaning of :func:`madkernels.fft_conv_step`."""
    out, final = fft_conv(
        u.unsqueeze(1), filter, skip=skip,
        pre_gate=None if pre_gate is None else pre_gate.unsqueeze(1),
        post_gate=None if post_gate is None else post_gate.unsqueeze(1),
        initial_state=state, return_final_state=True,
    )  # fmt: skip
    state.copy_(final)
    return out.squeeze(1)


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)
