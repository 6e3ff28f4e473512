"""Softmax attention, all scores of a document at once.

    score[i, j] = cap(scale q_i k_j) - slope |i - j| + bias[i, j],    cap(s) = softcap tanh(s / softcap)
    out_i = sum_j softmax_j(score[i, j]) v_j,    lse_i = log sum_j e^score[i, j]

over the keys j that query i sees; the last query stands at the last key. A query that sees none has out 0 and lse -infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels.reference.documents import document_bounds

Window = int | tuple[int | None, int | None] | None


def attention(
    q: Tensor,  # (batch, queries, heads, head_dim)
    k: Tensor,  # (batch, keys, kv_heads, head_dim)
    v: Tensor,  # (batch, keys, kv_heads, head_dim_v)
    *,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,  # (heads,) or (batch, heads)
    sink: Tensor | None = None,  # (heads,)
    bias: Tensor | None = None,  # expands to (batch, heads, queries, keys)
    cu_seqlens_q: Tensor | None = None,  # (num_docs + 1,)
    cu_seqlens_k: Tensor | None = None,  # (num_docs + 1,); if absent, as cu_seqlens_q
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of :func:`madkernels.attention`; computes in the widest dtype of its inputs, at least float32."""
    left, right = window if isinstance(window, tuple) else (None, None) if window is None else (window - 1, window - 1)
    batch, queries, heads, head_dim = q.shape
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads)
    bias = None if bias is None else bias.expand(batch, heads, queries, k.shape[1])
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    right = 0 if causal else right
    bounds_q, bounds_k = [(0, queries)], [(0, k.shape[1])]
    if cu_seqlens_q is not None:
        bounds_q = document_bounds(cu_seqlens_q)
        bounds_k = bounds_q if cu_seqlens_k is None else document_bounds(cu_seqlens_k)
    found = []
    for (a, b), (c, d) in zip(bounds_q, bounds_k, strict=True):
        part = None if bias is None else bias[:, :, a:b, c:d]
        found.append(attend(q[:, a:b], k[:, c:d], v[:, c:d], part, slopes, left, right, scale, softcap))
    found = found or [attend(q, k, v, bias, slopes, left, right, scale, softcap)]  # no document, of no step
    out, lse = torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2)
    if sink is not None:
        sink = sink.to(lse.dtype)[:, None]
        out = (out * torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1)).to(out.dtype)
        lse = torch.logaddexp(lse, sink)
    return (out, lse) if return_lse else out


def attention_step(
    q: Tensor,  # (batch, heads, head_dim)
    k_cache: Tensor,  # (batch, capacity, kv_heads, head_dim), or (pages, page_size, kv_heads, head_dim); updated in place
    v_cache: Tensor,
    k: Tensor | None = None,  # (batch, kv_heads, head_dim)
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,  # (batch,)
    block_table: Tensor | None = None,  # (batch, pages of a sequence)
    window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of :func:`madkernels.attention_step`: each sequence's keys in order, and :func:`attention` over them."""
    page_size = k_cache.shape[1]
    outs, lses = [], []
    for b, length in enumerate(cache_seqlens.tolist()):
        pages = [b] if block_table is None else block_table[b].tolist()
        end = length + (k is not None)
        positions = range(0 if window is None else max(0, end - window), end)
        slots = [t % (len(pages) * page_size) for t in positions]
        rows = [pages[slot // page_size] for slot in slots], [slot % page_size for slot in slots]
        if k is not None and v is not None:
            k_cache[rows[0][-1], rows[1][-1]], v_cache[rows[0][-1], rows[1][-1]] = k[b], v[b]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b : b + 1]
        out, lse = attention(
            q[b, None, None], k_cache[rows][None], v_cache[rows][None], softmax_scale=softmax_scale, softcap=softcap,
            alibi_slopes=slopes, sink=sink, return_lse=True,
        )  # fmt: skip
        outs.append(out[0, 0])
        lses.append(lse[0, :, 0])
    found = (torch.stack(outs), torch.stack(lses))
    return found if return_lse else found[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, left: int | None, right: int | None,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One document, without a sink: out and lse."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q_heads = q.transpose(1, 2).to(wide)
    k_heads, v_heads = (t.repeat_interleave(group, 2).transpose(1, 2).to(wide) for t in (k, v))
    scores = q_heads @ k_heads.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, :, None, None].to(wide) * behind.abs()
    if bias is not None:
        scores = scores + bias.to(wide)
    if left is not None:
        scores = scores.masked_fill(behind > left, -torch.inf)
    if right is not None:
        scores = scores.masked_fill(behind < -right, -torch.inf)
    some = (scores != -torch.inf).any(-1, keepdim=True)
    scores = scores.masked_fill(~some, 0)  # where a query sees nothing, no gradient goes through
    out = torch.softmax(scores, -1).masked_fill(~some, 0) @ v_heads
    lse = torch.logsumexp(scores, -1).masked_fill(~some.squeeze(-1), -torch.inf)
    return out.transpose(1, 2).to(q.dtype), lse
