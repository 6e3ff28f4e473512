"""The scan of Mamba-2 (state-space duality; Dao and Gu 2024, arXiv 2405.21060), step by step.

For each head h of group g, with the state S of shape (head_dim, dstate):

    S[t, h]   = exp(delta[t, h] A[h]) S[t-1, h] + delta[t, h] x[t, h] B[t, g]'
    out[t, h] = S[t, h] C[t, g] + D[h] x[t, h]
"""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels.reference.documents import document_bounds


def ssd_scan(
    x: Tensor,  # (batch, seqlen, heads, head_dim)
    delta: Tensor,  # (batch, seqlen, heads)
    A: Tensor,  # (heads,)
    B: Tensor,  # (batch, seqlen, groups, dstate)
    C: Tensor,  # like B
    D: Tensor | None = None,  # (heads,) or (heads, head_dim)
    *,
    initial_state: Tensor | None = None,  # (batch, heads, head_dim, dstate), or (num_docs, ...) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (num_docs + 1,)
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of :func:`madkernels.ssd_scan`; computes in the widest dtype of its inputs, at least float32."""
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (begin, end) in enumerate(document_bounds(cu_seqlens)):
            rows = slice(begin, end)
            before = None if initial_state is None else initial_state[i : i + 1]
            out, state = ssd_scan(
                x[:, rows], delta[:, rows], A, B[:, rows], C[:, rows], D, initial_state=before, return_final_state=True
            )
            outs.append(out)
            states.append(state)
        packed = torch.cat(outs, dim=1) if outs else torch.zeros_like(x)
        none = A.new_zeros(0, *x.shape[2:], B.shape[3])
        return (packed, torch.cat(states) if states else none) if return_final_state else packed

    wide = torch.promote_types(torch.promote_types(x.dtype, A.dtype), torch.float32)
    steps, inputs = delta.to(wide), x.to(wide)
    share = x.shape[2] // B.shape[2]
    keys, queries = (t.to(wide).repeat_interleave(share, dim=2) for t in (B, C))  # (batch, seqlen, heads, dstate)
    S = inputs.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if initial_state is None else initial_state.to(wide)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(steps[:, t] * A.to(wide))[..., None, None]
        S = decay * S + (steps[:, t, :, None] * inputs[:, t]).unsqueeze(-1) * keys[:, t].unsqueeze(-2)
        ys.append((S * queries[:, t].unsqueeze(-2)).sum(-1))
    y = torch.stack(ys, dim=1) if ys else inputs  # empty as well
    if D is not None:
        y = y + (D if D.dim() == 2 else D.unsqueeze(1)) * inputs
    out = y.to(x.dtype)
    return (out, S) if return_final_state else out


def ssd_scan_step(
    state: Tensor,  # (batch, heads, head_dim, dstate), updated in place
    x: Tensor,  # (batch, heads, head_dim)
    delta: Tensor,  # (batch, heads)
    A: Tensor,  # (heads,)
    B: Tensor,  # (batch, groups, dstate)
    C: Tensor,  # like B
    D: Tensor | None = None,  # (heads,) or (heads, head_dim)
) -> Tensor:
    """The meaning of :func:`madkernels.ssd_scan_step`."""
    x, delta, B, C = (t.unsqueeze(1) for t in (x, delta, B, C))
    out, final = ssd_scan(x, delta, A, B, C, D, initial_state=state, return_final_state=True)
    state.copy_(final)
    return out.squeeze(1)
