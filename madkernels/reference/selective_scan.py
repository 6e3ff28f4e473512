"""Selective scan (S6; Gu and Dao 2023, arXiv 2312.00752, section 3), step by step.

For each channel d and state n, with delta' = softplus(delta + delta_bias) where asked for:

    h[t, d, n] = exp(delta'[t, d] A[d, n]) h[t-1, d, n] + delta'[t, d] B[t, n] u[t, d]
    y[t, d]    = sum_n C[t, n] h[t, d, n] + D[d] u[t, d]
    out[t, d]  = y[t, d] silu(z[t, d])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.reference.activations import silu
from madkernels.reference.documents import document_bounds


def selective_scan(
    u: Tensor,  # (batch, seqlen, dim)
    delta: Tensor,  # (batch, seqlen, dim)
    A: Tensor,  # (dim, dstate)
    B: Tensor,  # (batch, seqlen, dstate) or (batch, seqlen, groups, dstate)
    C: Tensor,  # like B
    D: Tensor | None = None,  # (dim,)
    z: Tensor | None = None,  # (batch, seqlen, dim)
    delta_bias: Tensor | None = None,  # (dim,)
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,  # (batch, dim, dstate), or (num_docs, dim, dstate) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (num_docs + 1,)
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of :func:`madkernels.selective_scan`; computes in the widest dtype of its inputs, at least float32."""
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (begin, end) in enumerate(document_bounds(cu_seqlens)):
            document = slice(begin, end)
            out, state = selective_scan(
                u[:, document], delta[:, document], A, B[:, document], C[:, document], D,
                z if z is None else z[:, document], delta_bias, delta_softplus,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                return_final_state=True,
            )  # fmt: skip
            outs.append(out)
            states.append(state)
        packed = torch.cat(outs, dim=1) if outs else torch.zeros_like(u)
        final = torch.cat(states) if states else u.new_zeros((0, *A.shape), dtype=A.dtype)
        return (packed, final) if return_final_state else packed

    batch, seqlen, dim = u.shape
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    x, step, decay = u.to(dtype), _step_size(delta.to(dtype), delta_bias, delta_softplus), A.to(dtype)
    Bx, Cx = (_per_channel(t.to(dtype), dim) for t in (B, C))
    h = x.new_zeros(batch, *A.shape) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(seqlen):
        h = torch.exp(step[:, t, :, None] * decay) * h + (step[:, t] * x[:, t]).unsqueeze(-1) * Bx[:, t]
        ys.append((h * Cx[:, t]).sum(-1))
    y = torch.stack(ys, dim=1) if ys else x  # empty as well
    out = _skip_and_gate(y, x, D, z).to(u.dtype)
    return (out, h) if return_final_state else out


def selective_scan_step(
    state: Tensor,  # (batch, dim, dstate), updated in place
    u: Tensor,  # (batch, dim)
    delta: Tensor,  # (batch, dim)
    A: Tensor,  # (dim, dstate)
    B: Tensor,  # (batch, dstate) or (batch, groups, dstate)
    C: Tensor,  # like B
    D: Tensor | None = None,  # (dim,)
    z: Tensor | None = None,  # (batch, dim)
    delta_bias: Tensor | None = None,  # (dim,)
    delta_softplus: bool = False,
) -> Tensor:
    """The meaning of :func:`madkernels.selective_scan_step`."""
    out, final = selective_scan(
        u.unsqueeze(1), delta.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), D,
        None if z is None else z.unsqueeze(1), delta_bias, delta_softplus,
        initial_state=state, return_final_state=True,
    )  # fmt: skip
    state.copy_(final)
    return out.squeeze(1)


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        delta = delta + bias
    return F.softplus(delta) if softplus else delta


def _per_channel(projection: Tensor, dim: int) -> Tensor:
    """B or C with a state vector for each channel: (batch, seqlen, dim or 1, dstate)."""
    if projection.dim() == 3:
        return projection.unsqueeze(2)
    return projection.repeat_interleave(dim // projection.shape[2], dim=2)


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + u * D
    return y if z is None else y * silu(z.to(y.dtype))
