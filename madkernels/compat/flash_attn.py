"""flash-attn 2's functions, on :func:`madkernels.attention` and :func:`madkernels.attention_step`.

    from madkernels.compat.flash_attn import flash_attn_func

Names, order of arguments, layouts and results are those of flash-attn 2.8; nothing is patched. Beyond it: it runs on the CPU
too, there with float32 and float64 as well; any head_dim, and values of another head_dim than the keys; pages of any size;
derivatives of `alibi_slopes`, and through `softmax_lse`. Not here: dropout, which is refused.

What all functions share:

- `window_size` is (left, right): keys that a query sees before and behind its own position, -1 for all. The last query
  stands at the last key, also where there are fewer queries than keys. `causal` is a right side of 0.
- A query that sees no key has `out` 0 and `softmax_lse` +infinity.
- `softcap` of 0 or below is none. `alibi_slopes`, float32, are (heads,) or (batch, heads): scores get
  -slope |i + seqlen_k - seqlen_q - j|.
- `deterministic`, `num_splits` and the longest lengths are taken and change nothing.
- Autocast casts nothing.
- With `return_attn_probs` the result is (out, softmax_lse, S_dmask), the last of no element, as it is without dropout.

And :mod:`flash_attn.bert_padding`'s `index_first_axis`, `unpad_input` and `pad_input`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import attention, attention_step
from madkernels.compat.dtypes import without_autocast
from madkernels.compat.shapes import check_shape


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, heads, head_dim) over k (batch, seqlen_k, kv_heads, head_dim) and v (batch, seqlen_k,
    kv_heads, head_dim_v).

    Returns:
        out (batch, seqlen_q, heads, head_dim_v); with `return_attn_probs` also softmax_lse (batch, heads, seqlen_q) in
        float32, and a tensor of no element.

    Raises:
        NotImplementedError: `dropout_p` is not 0.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    options = _options("flash_attn_func", dropout_p, softmax_scale, causal, window_size, softcap)
    out, lse = _attention(q, k, v, alibi_slopes, options)
    return (out, _as_theirs(lse), q.new_empty(0)) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with kv (batch, seqlen_k, 2, kv_heads, head_dim)."""
    check_shape("flash_attn_kvpacked_func: kv", kv, "batch", "seqlen", 2, "kv_heads", "head_dim")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with qkv (batch, seqlen, 3, heads, head_dim)."""
    check_shape("flash_attn_qkvpacked_func: qkv", qkv, "batch", "seqlen", 3, "heads", "head_dim")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of sequences that lie one after another.

    `alibi_slopes` of (batch, heads) and `block_table` are done sequence by sequence, and their offsets read on the host.

    Args:
        q: (total_q, heads, head_dim). What lies behind the last sequence gets `out` 0.
        k: (total_k, kv_heads, head_dim); with `block_table` (pages, page_size, kv_heads, head_dim).
        v: likewise, of head_dim_v.
        cu_seqlens_q: int32 (batch + 1,): where the queries of each sequence begin, and where the last one's end.
        cu_seqlens_k: the same of keys; with `block_table` it says the lengths.
        block_table: int32 (batch, pages of a sequence): which page has its keys 0 to page_size - 1, and so on.

    Returns:
        out (total_q, heads, head_dim_v); with `return_attn_probs` also softmax_lse (heads, total_q) in float32, and a tensor
        of no element.

    Raises:
        NotImplementedError: `dropout_p` is not 0.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    op = "flash_attn_varlen_func"
    options = _options(op, dropout_p, softmax_scale, causal, window_size, softcap)
    check_shape(f"{op}: q", q, "total", "heads", "head_dim")
    places = ("total",) if block_table is None else ("pages", "page_size")
    for name, t in (("k", k), ("v", v)):
        check_shape(f"{op}: {name}", t, *places, "kv_heads", "head_dim")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        shapes = f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        raise RuntimeError(f"{op}: cu_seqlens_q and cu_seqlens_k have shapes {shapes}; expected (batch + 1,), both")
    if block_table is None and (alibi_slopes is None or alibi_slopes.dim() == 1):
        offsets = _with_rest(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
        out, lse = _attention(q[None], k[None], v[None], alibi_slopes, options, **offsets)
    else:
        out, lse = _by_sequence(op, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, block_table, options)
    return (out[0], _as_theirs(lse)[0], q.new_empty(0)) if return_attn_probs else out[0]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with kv (total_k, 2, kv_heads, head_dim)."""
    check_shape("flash_attn_varlen_kvpacked_func: kv", kv, "total", 2, "kv_heads", "head_dim")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with qkv (total, 3, heads, head_dim)."""
    check_shape("flash_attn_varlen_qkvpacked_func: qkv", qkv, "total", 3, "heads", "head_dim")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache, which takes `k` and `v` in first, in place. No derivative.

    One query a sequence, without `cache_leftpad`, is :func:`madkernels.attention_step`. Others are one call of
    :func:`madkernels.attention` over the cache as it lies, and their lengths read on the host; with pages, `alibi_slopes` of
    (batch, heads), `cache_batch_idx` that does not ascend or a cache with gaps between its rows they are one call a
    sequence. On a GPU nobody reads the lengths where one query brings one key at most: what the cache cannot hold gives NaN.

    Args:
        q: (batch, seqlen_q, heads, head_dim). The last query stands at the last key, the new ones included.
        k_cache: (batch_of_cache, capacity, kv_heads, head_dim); with `block_table` (pages, page_size, kv_heads, head_dim).
        v_cache: likewise, of head_dim_v.
        k: (batch, seqlen_new, kv_heads, head_dim), written at positions `cache_seqlens` and up.
        v: likewise, of head_dim_v; together with `k`.
        rotary_cos: (positions, rotary_dim / 2), as many positions as the cache at least. Turns the first rotary_dim of `k`
            at positions `cache_seqlens` and up; of `q` too, if `causal` or with a window, else all at `cache_seqlens`.
        rotary_sin: likewise.
        cache_seqlens: int, or int32 (batch,): how much of the cache is filled before the call, all of it if absent.
        cache_batch_idx: int32 (batch,): which row of the cache each sequence has.
        cache_leftpad: int32 (batch,): the position at which each sequence begins; not seen before.
        block_table: int32 (batch, pages of a sequence): which page has its positions 0 to page_size - 1, and so on.
        rotary_interleaved: numbers 0 and 1 make a pair, 2 and 3, and so on; else 0 and rotary_dim / 2, and so on.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v); with `return_softmax_lse` also softmax_lse (batch, heads, seqlen_q) in
        float32.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or a sequence that the cache cannot hold.
    """
    options = _options("flash_attn_with_kvcache", 0.0, softmax_scale, causal, window_size, softcap)
    _check_kvcache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, block_table)
    table = _table(q, k_cache, cache_batch_idx, block_table)
    lengths = _lengths(q, cache_seqlens, table.shape[1] * k_cache.shape[1])
    by_step = q.shape[1] == 1 and cache_leftpad is None
    unread = q.is_cuda and by_step and (k is None or k.shape[1] == 1)
    holder = "k_cache" if block_table is None else "block_table"
    ranges = [] if unread else _ranges(holder, k_cache, k, table, lengths, cache_leftpad)
    with torch.no_grad():
        if rotary_cos is not None and rotary_sin is not None and k is not None:
            spread = options["window"] != (None, None)
            k = _rotate(k, rotary_cos, rotary_sin, lengths, True, rotary_interleaved)
            q = _rotate(q, rotary_cos, rotary_sin, lengths, spread, rotary_interleaved)
        if k is not None and v is not None and not (by_step and k.shape[1] == 1):
            _append(k_cache, k, table, lengths)
            _append(v_cache, v, table, lengths)
            lengths, k, v = lengths + k.shape[1], None, None
        if by_step:
            pages = None if cache_batch_idx is None and block_table is None else table
            out, lse = _one_query(q, k_cache, v_cache, k, v, lengths, pages, alibi_slopes, options)
        else:
            rows = table.tolist()
            one = _in_one_row(k_cache, v_cache, rows) and (alibi_slopes is None or alibi_slopes.dim() == 1)
            several = _as_one_row if one else _one_by_one
            out, lse = several(q, k_cache, v_cache, rows, ranges, alibi_slopes, options)
    return (out, _as_theirs(lse)) if return_softmax_lse else out


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of input: (rows, ...) -> (chosen, ...)."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Takes out what is padding, or neither used nor unused.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int: 1 at tokens, 0 at padding.
        unused_mask: likewise, 1 at places that are kept although they are not used.

    Returns:
        the kept rows (total, ...), their indices in the flattened batch (total,), cu_seqlens int32 (batch + 1,), the longest
        kept length, and int32 (batch,): how many tokens of each sequence `attention_mask` has.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, int(lengths.max()), attention_mask.sum(1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undoes :func:`unpad_input`: (total, ...) -> (batch, seqlen, ...), with 0 at padding."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).reshape(batch, seqlen, *hidden_states.shape[1:])


def _options(
    op: str, dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Sequence[int], softcap: float
) -> dict[str, Any]:
    if dropout_p:
        raise NotImplementedError(f"{op}: dropout_p is {dropout_p}; expected 0, there is no dropout")
    left, right = (None if side < 0 else int(side) for side in window_size)
    window = (left, 0 if causal else right)
    return {"softmax_scale": softmax_scale, "window": window, "softcap": max(softcap, 0.0)}


def _attention(
    q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, options: dict[str, Any], **offsets: Any
) -> tuple[Tensor, Tensor]:
    """The op: out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads, seqlen_q)."""
    with without_autocast(q):
        return attention(q, k, v, alibi_slopes=alibi_slopes, return_lse=True, **options, **offsets)


def _as_theirs(lse: Tensor) -> Tensor:
    """Queries that see nothing have +infinity there."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _with_rest(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int) -> dict[str, Tensor]:
    """Offsets up to the end: the queries behind the last sequence are one that sees no key, the keys one without a query."""
    q = F.pad(cu_seqlens_q, (0, 2), value=total_q)
    k = F.pad(torch.cat((cu_seqlens_k, cu_seqlens_k[-1:])), (0, 1), value=total_k)
    return {"cu_seqlens_q": q, "cu_seqlens_k": k}


def _by_sequence(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, alibi_slopes: Tensor | None,
    block_table: Tensor | None, options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What one call cannot say of packed sequences: out (1, total, heads, head_dim_v), lse (1, heads, total)."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows = None if block_table is None else block_table.tolist()
    parts = []
    for b in range(len(ends_q) - 1):
        first, end = ends_k[b : b + 2]
        if rows is None:
            keys, values = k[None, first:end], v[None, first:end]
        else:
            _check_pages(op, b, rows[b], end - first, k)
            keys, values = (_range_of(cache, rows[b], 0, end - first) for cache in (k, v))
        parts.append((q[None, ends_q[b] : ends_q[b + 1]], keys, values))
    parts.append((q[None, ends_q[-1] :], k.flatten(0, -3)[None, :0], v.flatten(0, -3)[None, :0]))  # behind the last: 0
    if alibi_slopes is not None:
        alibi_slopes = F.pad(alibi_slopes.expand(len(ends_q) - 1, q.shape[1]), (0, 0, 0, 1))
    found = _each(parts, alibi_slopes, options)
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2)


def _each(
    parts: list[tuple[Tensor, Tensor, Tensor]], alibi_slopes: Tensor | None, options: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """Attention of sequences (1, steps, heads, head_dim) one by one, with slopes (heads,) or (sequences, heads)."""
    slopes = [alibi_slopes] * len(parts) if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes
    return [_attention(*part, slope, options) for part, slope in zip(parts, slopes, strict=True)]


def _check_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, cache_seqlens: int | Tensor | None, cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """What goes wrong before an op could say it."""
    op = "flash_attn_with_kvcache"
    check_shape(f"{op}: q", q, "batch", "seqlen", "heads", "head_dim")
    places = ("batch", "capacity") if block_table is None else ("pages", "page_size")
    for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        check_shape(f"{op}: {name}_cache", cache, *places, "kv_heads", "head_dim")
        check_shape(f"{op}: {name}", t, q.shape[0], "seqlen_new", *cache.shape[2:])
    if (k is None) != (v is None):
        raise RuntimeError(f"{op}: k and v come together")
    if k is not None and v is not None and k.shape[1] != v.shape[1]:
        raise RuntimeError(f"{op}: k has {k.shape[1]} new tokens and v {v.shape[1]}; expected the same")
    if k is not None and cache_seqlens is None:
        raise RuntimeError(f"{op}: k and v are given without cache_seqlens, which says where they go")
    if (rotary_cos is None) != (rotary_sin is None):
        raise RuntimeError(f"{op}: rotary_cos and rotary_sin come together")
    if rotary_cos is not None and k is None:
        raise RuntimeError(f"{op}: rotary_cos is given without k and v, which it turns")
    if block_table is not None and cache_batch_idx is not None:
        raise RuntimeError(f"{op}: block_table and cache_batch_idx are given; expected one of them at most")
    pages = 1 if block_table is None else block_table.shape[1]
    if rotary_cos is not None and rotary_sin is not None:
        most, half = pages * k_cache.shape[1], q.shape[3] // 2
        for name, t in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            if t.dim() != 2 or t.shape != rotary_cos.shape or t.shape[0] < most or t.shape[1] > half:
                expected = f"(positions, rotary_dim / 2), both: {most} positions at least, rotary_dim {2 * half} at most"
                raise RuntimeError(f"{op}: {name} has shape {tuple(t.shape)}; expected {expected}")


def _table(q: Tensor, k_cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None) -> Tensor:
    """A table of pages for every cache: one without pages has a page a row. -> int32 (batch, pages of a sequence)."""
    op, batch = "flash_attn_with_kvcache", q.shape[0]
    if block_table is not None:
        if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch:
            found = f"{block_table.dtype} of shape {tuple(block_table.shape)}"
            raise RuntimeError(f"{op}: block_table is {found}; expected int32 ({batch}, pages of a sequence)")
        return block_table
    if cache_batch_idx is not None:
        return _per_sequence("cache_batch_idx", cache_batch_idx, batch)[:, None]
    if k_cache.shape[0] != batch:
        raise RuntimeError(f"{op}: k_cache has {k_cache.shape[0]} sequences; expected q's {batch}")
    return torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]


def _lengths(q: Tensor, cache_seqlens: int | Tensor | None, capacity: int) -> Tensor:
    """-> int32 (batch,)."""
    if not isinstance(cache_seqlens, Tensor):
        filled = capacity if cache_seqlens is None else cache_seqlens
        return torch.full((q.shape[0],), filled, dtype=torch.int32, device=q.device)
    return _per_sequence("cache_seqlens", cache_seqlens, q.shape[0])


def _per_sequence(name: str, t: Tensor, batch: int) -> Tensor:
    if t.dtype != torch.int32 or t.shape != (batch,):
        found = f"{t.dtype} of shape {tuple(t.shape)}"
        raise RuntimeError(f"flash_attn_with_kvcache: {name} is {found}; expected int32 ({batch},)")
    return t


def _ranges(
    holder: str, k_cache: Tensor, k: Tensor | None, table: Tensor, lengths: Tensor, cache_leftpad: Tensor | None
) -> list[tuple[int, int]]:
    """The positions that each sequence has in the cache once it has taken in `k`: from, and up to."""
    op, new = "flash_attn_with_kvcache", 0 if k is None else k.shape[1]
    capacity = table.shape[1] * k_cache.shape[1]
    batch = lengths.shape[0]
    starts = [0] * batch if cache_leftpad is None else _per_sequence("cache_leftpad", cache_leftpad, batch).tolist()
    ranges = []
    for b, (first, length, pages) in enumerate(zip(starts, lengths.tolist(), table.tolist(), strict=True)):
        if not 0 <= first <= length <= capacity - new:
            held = f"positions {first} to {length} and gets {new} more"
            raise RuntimeError(f"{op}: sequence {b} has {held}; {holder} holds {capacity}")
        _check_pages(op, b, pages, length + new, k_cache)
        ranges.append((first, length + new))
    return ranges


def _check_pages(op: str, b: int, pages: list[int], end: int, cache: Tensor) -> None:
    """Whether the table of a sequence has what it needs for so many positions."""
    needed = -(-end // cache.shape[1])
    if needed > len(pages):
        raise RuntimeError(f"{op}: sequence {b} has {end} positions; block_table has {len(pages)} pages for it")
    wrong = [page for page in pages[:needed] if not 0 <= page < cache.shape[0]]
    if wrong:
        raise RuntimeError(f"{op}: sequence {b} has page or row {wrong[0]} of the cache, which has {cache.shape[0]}")


def _in_one_row(k_cache: Tensor, v_cache: Tensor, rows: list[list[int]]) -> bool:
    """Whether the cache can be seen as one row in which the sequences, a page each, follow one another."""
    pages = [page for row in rows for page in row[:1]]
    in_order = all(len(row) == 1 for row in rows) and all(a < b for a, b in pairwise(pages))
    return in_order and all(cache.stride(0) == cache.shape[1] * cache.stride(1) for cache in (k_cache, v_cache))


def _as_one_row(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: list[list[int]], ranges: list[tuple[int, int]],
    alibi_slopes: Tensor | None, options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All sequences in one call: the cache as one row of documents, of which those between two sequences have no query."""
    batch, queries, capacity = q.shape[0], q.shape[1], k_cache.shape[1]
    ends_q, ends_k = [0], [0]
    for b, ((page,), (first, end)) in enumerate(zip(rows, ranges, strict=True)):
        ends_q += [b * queries, (b + 1) * queries]
        ends_k += [page * capacity + first, page * capacity + end]
    ends = torch.tensor([[*ends_q, batch * queries], [*ends_k, k_cache.shape[0] * capacity]], dtype=torch.int32)
    cu_q, cu_k = ends.to(q.device)
    row, keys, values = (t.flatten(0, 1)[None] for t in (q, k_cache, v_cache))
    out, lse = _attention(row, keys, values, alibi_slopes, options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    return out.view(batch, queries, *out.shape[2:]), lse.view(q.shape[2], batch, queries).transpose(0, 1)


def _one_by_one(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: list[list[int]], ranges: list[tuple[int, int]],
    alibi_slopes: Tensor | None, options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    parts = [
        (q[b : b + 1], _range_of(k_cache, rows[b], *ranges[b]), _range_of(v_cache, rows[b], *ranges[b]))
        for b in range(q.shape[0])
    ]
    found = _each(parts, alibi_slopes, options) or [_attention(q, k_cache[:0], v_cache[:0], None, options)]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def _range_of(cache: Tensor, pages: list[int], first: int, end: int) -> Tensor:
    """Positions of a sequence, from and up to: (1, positions, kv_heads, head_dim), a view where they are of one page."""
    needed = pages[: -(-end // cache.shape[1])]
    return (cache[needed[0]] if len(needed) == 1 else cache[needed].flatten(0, 1))[None, first:end]


def _append(cache: Tensor, new: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Writes new (batch, steps, kv_heads, head_dim) behind so many positions of each sequence."""
    positions = lengths[:, None].long() + torch.arange(new.shape[1], device=new.device)
    page_size = cache.shape[1]
    cache[table.gather(1, positions // page_size), positions % page_size] = new


def _one_query(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor, pages: Tensor | None,
    alibi_slopes: Tensor | None, options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The last position of each sequence, which sees what is before it: out (batch, 1, heads, head_dim_v) and lse."""
    left, _ = options["window"]
    out, lse = attention_step(
        q[:, 0], k_cache, v_cache, None if k is None else k[:, 0], None if v is None else v[:, 0], cache_seqlens=lengths,
        block_table=pages, window=None if left is None else left + 1, softmax_scale=options["softmax_scale"],
        softcap=options["softcap"], alibi_slopes=alibi_slopes, return_lse=True,
    )  # fmt: skip
    return out.unsqueeze(1), lse.unsqueeze(2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, spread: bool, interleaved: bool) -> Tensor:
    """Turns pairs of x (batch, steps, heads, head_dim), at positions `lengths` and up, or, not spread, all at `lengths`."""
    wide, half = torch.promote_types(x.dtype, torch.float32), cos.shape[1]
    steps = torch.arange(x.shape[1] if spread else 1, device=x.device)
    positions = lengths[:, None] + steps
    if not x.is_cuda and positions.numel() and int(positions.max()) >= cos.shape[0]:
        told = f"a token stands at position {int(positions.max())}; rotary_cos has {cos.shape[0]} positions"
        raise RuntimeError(f"flash_attn_with_kvcache: {told}")
    c, s = (t[positions].unsqueeze(2).to(wide) for t in (cos, sin))  # (batch, steps or 1, 1, half)
    shape, axis = ((half, 2), -1) if interleaved else ((2, half), -2)
    a, b = x[..., : 2 * half].to(wide).reshape(*x.shape[:3], *shape).unbind(axis)
    turned = torch.stack((a * c - b * s, a * s + b * c), axis).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)
