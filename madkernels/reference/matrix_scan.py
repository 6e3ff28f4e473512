"""The scan of matrix states, step by step: gated linear attention, RWKV, the delta rule.

For each head, with the state S of shape (key_dim, value_dim):

    S'     = diag(exp(log_decay[t])) S[t-1]
    u[t]   = v[t], or with beta: beta[t] (v[t] - k[t]' S')
    S[t]   = S' + k[t] u[t]'
    out[t] = q[t]' S[t], or with a bonus: q[t]' (S[t-1] + diag(bonus) k[t] u[t]')
"""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels.reference.documents import document_bounds


def matrix_scan(
    q: Tensor,  # (batch, seqlen, groups, key_dim)
    k: Tensor,  # like q
    v: Tensor,  # (batch, seqlen, heads, value_dim)
    log_decay: Tensor | None = None,  # (batch, seqlen, heads, key_dim or 1)
    beta: Tensor | None = None,  # (batch, seqlen, heads)
    bonus: Tensor | None = None,  # (heads, key_dim)
    *,
    initial_state: Tensor | None = None,  # (batch, heads, key_dim, value_dim), or (num_docs, ...) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (num_docs + 1,)
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of :func:`madkernels.matrix_scan`; computes in the widest dtype of its inputs, at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    for given in (log_decay, beta, bonus, initial_state):
        wide = wide if given is None else torch.promote_types(wide, given.dtype)
    shape = (v.shape[2], q.shape[3], v.shape[3])
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (begin, end) in enumerate(document_bounds(cu_seqlens)):
            rows = slice(begin, end)
            decays, rates = (None if t is None else t[:, rows] for t in (log_decay, beta))
            before = None if initial_state is None else initial_state[i : i + 1]
            out, state = matrix_scan(
                q[:, rows], k[:, rows], v[:, rows], decays, rates, bonus, initial_state=before, return_final_state=True
            )
            outs.append(out)
            states.append(state)
        packed = torch.cat(outs, dim=1) if outs else torch.zeros_like(v)
        none = v.new_zeros(0, *shape, dtype=wide)
        return (packed, torch.cat(states) if states else none) if return_final_state else packed

    share = v.shape[2] // q.shape[2]
    queries, keys = (t.to(wide).repeat_interleave(share, dim=2) for t in (q, k))  # (batch, seqlen, heads, key_dim)
    values = v.to(wide)
    S = values.new_zeros(v.shape[0], *shape) if initial_state is None else initial_state.to(wide)
    ys = []
    for t in range(q.shape[1]):
        before, key = S, keys[:, t].unsqueeze(-1)
        if log_decay is not None:
            S = log_decay[:, t].to(wide).exp().unsqueeze(-1) * S
        u = values[:, t].unsqueeze(-2)  # (batch, heads, 1, value_dim)
        if beta is not None:
            u = beta[:, t].to(wide)[..., None, None] * (u - (S * key).sum(-2, keepdim=True))
        S = S + key * u
        read = S if bonus is None else before + bonus.to(wide).unsqueeze(-1) * key * u
        ys.append((queries[:, t].unsqueeze(-1) * read).sum(-2))
    y = torch.stack(ys, dim=1) if ys else values  # empty as well
    out = y.to(v.dtype)
    return (out, S) if return_final_state else out


def matrix_scan_step(
    state: Tensor,  # (batch, heads, key_dim, value_dim), updated in place
    q: Tensor,  # (batch, groups, key_dim)
    k: Tensor,  # like q
    v: Tensor,  # (batch, heads, value_dim)
    log_decay: Tensor | None = None,  # (batch, heads, key_dim or 1)
    beta: Tensor | None = None,  # (batch, heads)
    bonus: Tensor | None = None,  # (heads, key_dim)
) -> Tensor:
    """The meaning of :func:`madkernels.matrix_scan_step`."""
    q, k, v, log_decay, beta = (t if t is None else t.unsqueeze(1) for t in (q, k, v, log_decay, beta))  # type: ignore[assignment]
    out, final = matrix_scan(q, k, v, log_decay, beta, bonus, initial_state=state, return_final_state=True)
    state.copy_(final)
    assert isinstance(out, Tensor)
    return out.squeeze(1)
