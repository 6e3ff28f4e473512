"""Softmax attention with everything that language models ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from madkernels import reference
from madkernels.ops.registration import (
    keep_under_recomputation,
    refuse_tangents,
    register_autocast,
    register_derivatives,
    register_vmap,
)

_attention = torch.ops.madkernels.attention.default
_step = torch.ops.madkernels.attention_step.default
Window = int | tuple[int | None, int | None] | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: Window = ..., softmax_scale: float | None = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., sink: Tensor | None = ..., bias: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: Window = ..., softmax_scale: float | None = ...,
    softcap: float = ..., alibi_slopes: Tensor | None = ..., sink: Tensor | None = ..., bias: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, without the scores in memory (FlashAttention: Dao et al. 2022, arXiv 2205.14135).

    For query i and the keys j that it sees::

        score[i, j] = cap(softmax_scale q_i k_j) - slope |i - j| + bias[i, j]
        out_i = sum_j softmax_j(score[i, j]) v_j

    The last query stands at the last key, also where there are fewer queries than keys: so `causal` with a cache of keys is
    right. A query that sees no key has `out` 0 and `lse` -infinity. Differentiable, to any order (second derivatives go
    through the reference, whose memory is quadratic), in forward mode too. Deterministic, whatever the number of threads.

    Args:
        q: queries (batch, queries, heads, head_dim). float32, bfloat16, float16, or float64.
        k: keys (batch, keys, kv_heads, head_dim), dtype of `q`. `heads` is a multiple of `kv_heads` (GQA, MQA): query head h
            reads key head h // (heads // kv_heads).
        v: values (batch, keys, kv_heads, head_dim_v), dtype of `q`.
        causal: a query sees no key behind its own position.
        window: how far a query sees: (left, right), so many keys before and behind its own position, None for all; or one
            number w, short for (w - 1, w - 1): with `causal`, its own position and the w - 1 before it.
        softmax_scale: factor of the products; head_dim ** -0.5 if absent.
        softcap: cap(s) = softcap tanh(s / softcap), as in Gemma 2; 0 for none.
        alibi_slopes: (heads,) or (batch, heads), float32 (float64 with float64). Press et al. 2022, arXiv 2108.12409.
        sink: (heads,): a score of its own for every query, which takes its share of softmax and has value 0.
        bias: added to scores; dtype of `q`, of a shape that expands to (batch, heads, queries, keys). Its gradient is of
            that full size before it is summed.
        cu_seqlens_q: int32 (num_docs + 1,): where each of the documents that are packed along the one batch row begins, and
            where the last ends. Documents do not see each other.
        cu_seqlens_k: the same of keys, as many documents; `cu_seqlens_q` if absent.
        return_lse: also return the logarithm of the sum of e^score.

    Returns:
        out (batch, queries, heads, head_dim_v), dtype of `q`; with `return_lse` also lse (batch, heads, queries), float32
        (float64 with float64), the sink included.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
        ValueError: a window below 1, or cu_seqlens_k without cu_seqlens_q.
    """
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k is given without cu_seqlens_q")
    left, right = _sides("attention", window)
    if q.dim() == k.dim() == 4:  # else it is refused below
        batch, queries, heads, _ = q.shape
        bias = _expand("attention", "bias", bias, (batch, heads, queries, k.shape[1]))
        alibi_slopes = _expand("attention", "alibi_slopes", alibi_slopes, (batch, heads))
        sink = _expand("attention", "sink", sink, (heads,))
    out, lse = _attention(
        q, k, v, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        causal, left, right, softmax_scale, softcap,
    )  # fmt: skip
    if sink is not None:
        out, lse = _with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


@overload
def attention_step(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, cache_seqlens: Tensor,
    block_table: Tensor | None = ..., window: int | None = ..., softmax_scale: float | None = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ..., sink: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention_step(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, cache_seqlens: Tensor,
    block_table: Tensor | None = ..., window: int | None = ..., softmax_scale: float | None = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ..., sink: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One token of decoding: its key and value go into the cache, in place, and its query sees what is there.

    Sequences may be of different lengths. Position t of a sequence lies in slot t % capacity, so a cache that is as long as
    the window is a ring that never fills. The caller adds 1 to `cache_seqlens`. No derivative, of any kind.

    On a GPU nobody waits for `cache_seqlens` and `block_table`: a sequence that the cache cannot hold, or whose page does
    not exist, gets NaN there, where it is an error on the CPU; nothing is read or written out of bounds.

    Args:
        q: (batch, heads, head_dim). float32, bfloat16, float16, or float64.
        k_cache: keys (batch, capacity, kv_heads, head_dim), dtype of `q`; with `block_table` (pages, page_size, kv_heads,
            head_dim), of all sequences. Dense along head_dim; updated in place.
        v_cache: values, in the same way; their head_dim may differ.
        k: the key of the new token (batch, kv_heads, head_dim). If absent, the cache has it already.
        v: its value (batch, kv_heads, head_dim_v). Together with `k`.
        cache_seqlens: int32 (batch,): how many tokens each sequence has in the cache before the call.
        block_table: int32 (batch, pages of a sequence): which page has its slots 0 to page_size - 1, and so on.
        window: the query sees its own position and the window - 1 before it. All, if absent.
        softmax_scale, softcap, alibi_slopes, sink: as of :func:`attention`.
        return_lse: also return the logarithm of the sum of e^score.

    Returns:
        out (batch, heads, head_dim_v), dtype of `q`; with `return_lse` also lse (batch, heads), float32 (float64 with
        float64). A query that sees nothing has out 0 and lse -infinity.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or a sequence that the cache cannot hold; the message names
            the argument.
        ValueError: a window below 1.
    """
    refuse_tangents("attention_step", q, k_cache, v_cache, k, v, sink)
    left, _ = _sides("attention_step", window)
    with torch.no_grad():
        if q.dim() == 3:  # else it is refused below
            alibi_slopes = _expand("attention_step", "alibi_slopes", alibi_slopes, tuple(q.shape[:2]))
            sink = _expand("attention_step", "sink", sink, (q.shape[1],))
        out, lse = _step(q, k_cache, v_cache, k, v, cache_seqlens, block_table, alibi_slopes, left, softmax_scale, softcap)
        if sink is not None:
            out, lse = (t.squeeze(i + 1) for i, t in enumerate(_with_sink(out.unsqueeze(1), lse.unsqueeze(2), sink)))
    return (out, lse) if return_lse else out


def _sides(op: str, window: Window) -> tuple[int | None, int | None]:
    """How many keys a query sees before and behind its own position."""
    if window is None:
        return None, None
    if isinstance(window, tuple):
        return window
    if window < 1:
        raise ValueError(f"{op}: window is {window}; expected 1 at least, or (left, right)")
    return window - 1, window - 1


def _expand(op: str, name: str, t: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if t is None:
        return None
    try:
        return t.expand(shape)
    except RuntimeError:
        raise RuntimeError(f"{op}: {name} has shape {tuple(t.shape)}; expected one that expands to {shape}") from None


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax with one more score: the weights of the others shrink by sigmoid(lse - sink)."""
    wide = sink.to(lse.dtype).unsqueeze(-1)
    share = torch.sigmoid(lse - wide).transpose(1, 2).unsqueeze(-1)
    return (out * share).to(out.dtype), torch.logaddexp(lse, wide)


@torch.library.register_fake("madkernels::attention")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(batch, heads, queries, dtype=wide)


@torch.library.register_fake("madkernels::attention_backward")
def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0 if bias is None else bias.shape),
        q.new_empty(0 if alibi_slopes is None else alibi_slopes.shape, dtype=wide),
    )


@torch.library.register_fake("madkernels::attention_step")
def _step_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], v_cache.shape[3]), q.new_empty(*q.shape[:2], dtype=wide)


# FLOPs as torch counts those of its own attention: what masks spare is not taken off.
@register_flop_formula(torch.ops.madkernels.attention)
def _forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **options: Any) -> int:
    batch, queries, heads, head_dim = q
    return 2 * batch * heads * queries * k[1] * (head_dim + v[3])


@register_flop_formula(torch.ops.madkernels.attention_backward)
def _backward_flops(
    dout: Sequence[int], dlse: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **options: Any
) -> int:
    batch, queries, heads, head_dim = q
    return 2 * batch * heads * queries * k[1] * (3 * head_dim + 2 * v[3])


def _by_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, left: int | None, right: int | None, softmax_scale: float | None,
    softcap: float | None,
) -> Sequence[Tensor]:  # fmt: skip
    options: dict[str, Any] = {"causal": causal, "window": (left, right), "softmax_scale": softmax_scale}
    documents = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    options |= {"softcap": softcap or 0.0, "alibi_slopes": alibi_slopes, "bias": bias, "return_lse": True}
    return tuple(reference.attention(q, k, v, **options, **documents))


register_derivatives("madkernels::attention", ("q", "k", "v", "bias", "alibi_slopes"), _by_reference)
register_autocast("madkernels::attention", activations=("q", "k", "v", "bias"))
register_vmap("madkernels::attention", {"q": 2, "k": 2, "v": 2, "bias": 1, "alibi_slopes": 1}, results=(2, 1))
keep_under_recomputation("madkernels::attention")
