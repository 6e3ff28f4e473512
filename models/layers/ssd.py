"""The scan of Mamba-2: by the op where there is a kernel for the device, elsewhere by the recurrence in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels import ssd_scan, ssd_scan_step
from madkernels.models.layers.base import document_of, wide
from madkernels.models.layers.recurrence import linear_recurrence, without_autocast

DEVICES = {"cpu", "meta"}  # where the ops are used


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`madkernels.ssd_scan`, whose arguments these are: out, and the states after each sequence (document)."""
    if x.device.type in DEVICES:
        found = ssd_scan(x, delta, A, B, C, D, initial_state=state, cu_seqlens=cu_seqlens, return_final_state=True)
        assert isinstance(found, tuple)
        return found
    return by_recurrence(x, delta, A, B, C, D, state, cu_seqlens)


def by_recurrence(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of torch's products, in chunks, on any device. Packed documents begin without a state."""
    keys, queries = (t if t.shape[2] == 1 else t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    document = ends = None
    if cu_seqlens is not None:
        document, ends = document_of(cu_seqlens, x.shape[1]), cu_seqlens[1:]
    steps, past = delta.unsqueeze(-1), None if state is None else state.mT
    y, after = linear_recurrence(queries, keys, steps * x, A[:, None] * steps, past, document=document, ends=ends)
    if D is not None:
        y = y + D.view(len(A), -1) * x
    return y.to(x.dtype), after.mT


@without_autocast
def attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``y[t] = sum over s <= t of (q[t] k[s]) v[s]``, a scan that forgets nothing, in float32 at least.

    Args:
        q, k: (batch, seqlen, heads, key_dim).
        v: (batch, seqlen, heads, value_dim).
        state: (batch, heads, key_dim, value_dim), or None.
        cu_seqlens: of packed documents; then no state.

    Returns:
        y like v, and the states after each sequence (document), as `state`.
    """
    q, k, v = (wide(t) for t in (q, k, v))
    steps, rates = v.new_ones(1, 1, 1).expand(v.shape[:3]), v.new_zeros(v.shape[2])
    y, after = scan(v, steps, rates, k, q, None, None if state is None else state.mT, cu_seqlens)
    return y, after.mT


def step(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`madkernels.ssd_scan_step` on a copy of the state: out (batch, heads, head_dim), and the state after it. No
    gradient."""
    if x.device.type not in DEVICES:
        x, delta, B, C = (t.unsqueeze(1) for t in (x, delta, B, C))
        y, after = scan(x, delta, A, B, C, D, state)
        return y.squeeze(1), after
    after = state.clone(memory_format=torch.contiguous_format)
    return ssd_scan_step(after, x, delta, A, B, C, D), after
