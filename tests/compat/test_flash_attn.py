"""flash-attn's functions against a composition of our own, which follows their documentation, masks made by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check, relative_rms
from torch import Tensor

from madkernels.compat import flash_attn
from madkernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    index_first_axis,
    pad_input,
    unpad_input,
)

SLACK = {torch.float32: 1e-6, torch.bfloat16: 0.0, torch.float64: 1e-13}
FLOATS = [torch.float32, torch.bfloat16]


def attend(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, *, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence: q (seqlen_q, heads, head_dim), k and v (seqlen_k, kv_heads, ...) -> out, and lse (heads, seqlen_q)."""
    (seqlen_q, heads, head_dim), (seqlen_k, kv_heads, _) = q.shape, k.shape
    reads = [h * kv_heads // heads for h in range(heads)]
    scores = torch.einsum("ihd,jhd->hij", q, k[:, reads]) * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    away = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)[None]  # behind the query
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[:, None, None] * away.abs()
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if window_size[0] >= 0:
        seen &= away <= window_size[0]
    if window_size[1] >= 0:
        seen &= away >= -window_size[1]
    if causal:
        seen &= away >= 0
    none = scores.new_full((heads, seqlen_q, 1), -1e30)
    top = torch.cat((scores.detach().masked_fill(~seen, -1e30), none), -1).amax(-1, keepdim=True)
    weights = (scores - top).masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    blind = ~seen.any(-1)
    out = torch.einsum("hij,jhd->ihd", (weights / total.masked_fill(blind[:, None], 1)).to(v.dtype), v[:, reads])
    lse = (top + total.masked_fill(blind[:, None], 1).log()).squeeze(-1)
    return out, lse.masked_fill(blind, torch.inf)


def marked(out: Tensor, lse: Tensor, rest: Any = None) -> tuple[Tensor, Tensor]:
    """Results that can be compared: +infinity, and only that, becomes a number."""
    return out, lse.masked_fill(lse == torch.inf, 7)


def by_batch(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    slopes = [None] * len(q) if alibi_slopes is None else alibi_slopes.expand(len(q), -1)
    found = [attend(*qkvs, **options) for qkvs in zip(q, k, v, slopes, strict=True)]
    return marked(torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found]))


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def slopes_of(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 0.3


def check_against(function: Callable[..., Any], plain: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> None:
    dtype = next(iter(inputs.values())).dtype
    theirs = lambda **given: marked(*function(**given, return_attn_probs=True))  # noqa: E731
    check(theirs, plain, inputs, slack=SLACK[dtype], **options)


# ---- whole sequences


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "kv_heads", "head_dim", "options"),
    [
        (1, 239, 6, 6, 64, {}),
        (1, 239, 6, 2, 59, {"causal": True, "alibi_slopes": slopes_of(2, 6)}),
        (3, 799, 6, 1, 128, {"causal": True}),
        (799, 3, 6, 3, 40, {"causal": True, "softcap": 15.0}),
        (799, 3, 2, 2, 111, {"window_size": (7, 2), "alibi_slopes": slopes_of(2)}),
        (113, 203, 6, 3, 111, {"causal": True, "window_size": (31, -1)}),
        (113, 203, 6, 6, 64, {"window_size": (-1, 17), "softcap": 3.0}),
        (128, 217, 6, 1, 59, {"window_size": (40, 25), "alibi_slopes": slopes_of(2, 6)}),
        (128, 217, 4, 2, 128, {"softmax_scale": 0.3, "alibi_slopes": slopes_of(4)}),
        (203, 113, 6, 2, 40, {"window_size": (0, 0)}),
        (203, 113, 6, 2, 40, {"causal": True, "window_size": (9, 9), "softcap": -1.0}),
    ],
)
def test_whole_sequences(
    seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, head_dim: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Results and gradients, within twice the error of the composition in the same dtype."""
    shapes = (2, seqlen_q, heads, head_dim), (2, seqlen_k, kv_heads, head_dim), (2, seqlen_k, kv_heads, head_dim)
    check_against(flash_attn_func, by_batch, dict(zip("qkv", drawn(*shapes, dtype=dtype), strict=True)), **options)


def test_long_sequences() -> None:
    q, k, v = drawn((1, 1024, 2, 64), (1, 1023, 1, 64), (1, 1023, 1, 64))
    check_against(flash_attn_func, by_batch, {"q": q, "k": k, "v": v}, causal=True)


def test_float64_and_values_of_another_head_dim() -> None:
    q, k, v = drawn((2, 9, 4, 24), (2, 14, 2, 24), (2, 14, 2, 13), dtype=torch.float64)
    check_against(flash_attn_func, by_batch, {"q": q, "k": k, "v": v}, window_size=(3, 2))


def test_packed_tensors_have_gradients_of_their_own_shape() -> None:
    qkv, kv = drawn((2, 33, 3, 4, 16), (2, 33, 2, 2, 16))
    options = {"causal": True, "softcap": 4.0}
    check_against(flash_attn_qkvpacked_func, lambda qkv, **o: by_batch(*qkv.unbind(2), **o), {"qkv": qkv}, **options)
    inputs = {"q": qkv[:, :, 0], "kv": kv}
    check_against(flash_attn_kvpacked_func, lambda q, kv, **o: by_batch(q, *kv.unbind(2), **o), inputs, **options)


def test_slopes_get_a_gradient() -> None:
    q, k, v = drawn((2, 19, 4, 8), (2, 23, 4, 8), (2, 23, 4, 8))
    check_against(flash_attn_func, by_batch, {"q": q, "k": k, "v": v, "alibi_slopes": slopes_of(2, 4)}, causal=True)


def test_what_comes_beside_the_output() -> None:
    q, k, v = drawn((1, 5, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8), dtype=torch.bfloat16)
    alone = flash_attn_func(q, k, v, 0.0, None, True)
    out, lse, weights = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(alone, out)
    assert lse.dtype == torch.float32
    assert lse[0, :, :3].eq(torch.inf).all()
    assert lse[0, :, 3:].isfinite().all()
    assert out[0, :3].eq(0).all()
    assert weights.numel() == 0


# ---- packed sequences


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


LENGTHS_Q, LENGTHS_K = [40, 0, 1, 17, 9], [31, 5, 60, 0, 9]


def by_sequence(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed sequences, and behind them rows that belong to none."""
    slopes = [None] * len(lengths_q) if alibi_slopes is None else alibi_slopes.expand(len(lengths_q), -1)
    out, lse = [], []
    at_q = at_k = 0
    for n_q, n_k, slope in zip(lengths_q, lengths_k, slopes, strict=True):
        parts = q[at_q : at_q + n_q], k[at_k : at_k + n_k], v[at_k : at_k + n_k]
        for found, part in zip((out, lse), attend(*parts, slope, **options), strict=True):
            found.append(part)
        at_q, at_k = at_q + n_q, at_k + n_k
    out.append(q.new_zeros(len(q) - at_q, q.shape[1], v.shape[2]))
    lse.append(torch.full((q.shape[1], len(q) - at_q), torch.inf, dtype=lse[0].dtype))
    return marked(torch.cat(out), torch.cat(lse, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("behind", [0, 13])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 8.0},
        {"window_size": (6, 3), "alibi_slopes": slopes_of(6)},
        {"causal": True, "alibi_slopes": slopes_of(5, 6)},
    ],
)
def test_packed_sequences(options: dict[str, Any], behind: int, dtype: torch.dtype) -> None:
    """Empty ones among them, and rows behind the last, which see nothing and get no gradient."""
    total_q, total_k = sum(LENGTHS_Q) + behind, sum(LENGTHS_K) + behind
    q, k, v = drawn((total_q, 6, 59), (total_k, 2, 59), (total_k, 2, 59), dtype=dtype)
    lengths = (offsets(LENGTHS_Q), offsets(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    check_against(
        lambda q, k, v, **given: flash_attn_varlen_func(q, k, v, *lengths, **given),
        lambda q, k, v, **given: by_sequence(q, k, v, LENGTHS_Q, LENGTHS_K, **given),
        {"q": q, "k": k, "v": v},
        **options,
    )


def test_packed_tensors_of_packed_sequences() -> None:
    qkv, kv = drawn((67, 3, 4, 16), (67, 2, 2, 16))
    ends = offsets(LENGTHS_Q)
    check_against(
        lambda qkv, **given: flash_attn_varlen_qkvpacked_func(qkv, ends, 40, **given),
        lambda qkv, **given: by_sequence(*qkv.unbind(1), LENGTHS_Q, LENGTHS_Q, **given),
        {"qkv": qkv},
        causal=True,
    )
    check_against(
        lambda q, kv, **given: flash_attn_varlen_kvpacked_func(q, kv, ends, ends, 40, 40, **given),
        lambda q, kv, **given: by_sequence(q, *kv.unbind(1), LENGTHS_Q, LENGTHS_Q, **given),
        {"q": qkv[:, 0], "kv": kv},
        causal=True,
    )


def test_packed_queries_over_keys_in_pages() -> None:
    q, k, v = drawn((67, 6, 40), (105, 2, 40), (105, 2, 24))
    k_pages, v_pages, table = pages_of(k, v, LENGTHS_K, page_size=16)
    check_against(
        lambda q, k, v, **given: flash_attn_varlen_func(
            q, k, v, offsets(LENGTHS_Q), offsets(LENGTHS_K), 40, 60, block_table=table, **given
        ),
        lambda q, k, v, **given: by_sequence(q, *unpaged(k, v, table, LENGTHS_K), LENGTHS_Q, LENGTHS_K, **given),
        {"q": q, "k": k_pages, "v": v_pages},
        causal=True,
    )


def pages_of(k: Tensor, v: Tensor, lengths: list[int], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed keys and values in pages of any order, NaN where nothing is; tables are -1 behind their end."""
    most = -(-max(lengths) // page_size)
    order = torch.randperm(len(lengths) * most, generator=torch.Generator().manual_seed(1))
    table = order.view(len(lengths), most).int()
    pages = [torch.full((len(order), page_size, *t.shape[1:]), torch.nan) for t in (k, v)]
    for b, (start, length) in enumerate(zip(offsets(lengths).tolist(), lengths, strict=False)):
        for j in range(length):
            for t, cache in ((k, pages[0]), (v, pages[1])):
                cache[table[b, j // page_size], j % page_size] = t[start + j]
        table[b, -(-length // page_size) :] = -1
    return pages[0], pages[1], table


def unpaged(k: Tensor, v: Tensor, table: Tensor, lengths: list[int]) -> list[Tensor]:
    rows = [(table[b, j // k.shape[1]], j % k.shape[1]) for b, length in enumerate(lengths) for j in range(length)]
    return [torch.stack([cache[row] for row in rows]) for cache in (k, v)]


# ---- caches


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool) -> Tensor:
    """Rotary embedding of x (steps, heads, head_dim), as a product of complex numbers."""
    half = cos.shape[1]
    head = x[..., : 2 * half]
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).mT
    by = torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    found = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * by)
    found = found.flatten(-2) if interleaved else found.mT.flatten(-2)
    return torch.cat((found.to(x.dtype), x[..., 2 * half :]), -1)


ROTARY = [None, (16, True), (32, False)]  # rotary_dim, interleaved
CACHES = ["rows", "chosen rows", "padded", "pages"]
MASKS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False, "softcap": 5.0},
    {"window_size": (11, 0), "alibi_slopes": slopes_of(3, 6)},
    {"window_size": (30, 4), "softmax_scale": 0.2},
    {"causal": True, "alibi_slopes": slopes_of(6)},
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", MASKS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("queries", "new", "rotary"),
    [(1, 0, None), (1, 1, (16, True)), (1, 3, None), (5, 0, None), (5, 5, (32, False)), (5, 2, (16, True)), (2, 5, None)],
)
def test_caches(
    queries: int, new: int, rotary: tuple[int, bool] | None, cache: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """One query and several, with new keys and without; the cache holds them afterwards, and else what it held."""
    batch, heads, kv_heads, head_dim, capacity, page_size = 3, 6, 2, 40, 96, 32
    lengths = [0 if new else 1, 37, capacity - max(new, queries if rotary else 0)]
    firsts = [0, 12, 5] if cache == "padded" else [0, 0, 0]
    rows = {"chosen rows": [4, 0, 3], "pages": [4, 0, 3]}.get(cache, [0, 1, 2])
    q, k, v = drawn((batch, queries, heads, head_dim), (batch, new, kv_heads, head_dim), (batch, new, kv_heads, head_dim))
    caches = drawn((5, capacity, kv_heads, head_dim), (5, capacity, kv_heads, head_dim), dtype=dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    given: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    if cache == "padded":
        given["cache_leftpad"] = torch.tensor(firsts, dtype=torch.int32)
    if cache == "chosen rows":
        given["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    taken = [t[: batch if cache in ("rows", "padded") else 5].clone() for t in caches]
    if cache == "pages":  # row r is pages 3 r to 3 r + 2, but for two that change places
        order = torch.arange(15)
        order[[2, 13]] = order[[13, 2]]
        taken = [t.view(15, page_size, kv_heads, head_dim)[order].clone() for t in taken]
        given["block_table"] = order.view(5, 3)[rows].int()
    if new:
        given |= {"k": k, "v": v}
    if rotary is not None:
        angle = torch.rand(capacity + 3, rotary[0] // 2, generator=torch.Generator().manual_seed(2)) * 7
        given |= {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype), "rotary_interleaved": rotary[1]}
    out, lse = flash_attn_with_kvcache(q, *taken, **given, **options, return_softmax_lse=True)

    local = options.get("causal", False) or "window_size" in options
    found = {torch.float64: [], dtype: []}
    slopes = options.get("alibi_slopes", [None] * batch)
    rest = {name: value for name, value in options.items() if name != "alibi_slopes"}
    if isinstance(slopes, Tensor):
        slopes = slopes.expand(batch, heads)
    for b, (row, first, length) in enumerate(zip(rows, firsts, lengths, strict=True)):
        q_b, k_b = q[b], k[b]
        if rotary is not None:
            cos_sin = given["rotary_cos"], given["rotary_sin"]
            q_b = turned(q_b, *cos_sin, [length + (i if local else 0) for i in range(queries)], rotary[1])
            k_b = turned(k_b, *cos_sin, [length + i for i in range(new)], rotary[1])
        caches[0][row, length : length + new] = k_b
        caches[1][row, length : length + new] = v[b]
        parts = q_b, *(t[row, first : length + new] for t in caches)
        for kind, results in found.items():
            results.append(attend(*(t.to(kind) for t in parts), slopes[b], **rest))
    if cache == "pages":
        taken = [t[torch.argsort(order)].view(5, capacity, kv_heads, head_dim) for t in taken]
    precise = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(taken[0], caches[0][: len(taken[0])], rtol=precise, atol=precise if rotary else 0)
    assert torch.equal(taken[1], caches[1][: len(taken[1])])
    exact, plain = (marked(*(torch.stack(ts) for ts in zip(*found[kind], strict=True))) for kind in found)
    for value, told, rough in zip(marked(out, lse), exact, plain, strict=True):
        assert value.shape == told.shape
        assert relative_rms(value, told) <= 2 * relative_rms(rough, told) + SLACK[dtype]


def test_a_cache_of_one_length_and_a_full_one() -> None:
    q, k_cache, v_cache = drawn((2, 4, 4, 16), (2, 20, 2, 16), (2, 20, 2, 16))
    for lengths, filled in ((13, 13), (None, 20)):
        out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, causal=True)
        told, _ = by_batch(q, k_cache[:, :filled], v_cache[:, :filled], causal=True)
        torch.testing.assert_close(out, told)


def test_decoding_token_by_token_is_causal_attention() -> None:
    q, k, v = drawn((2, 12, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    whole = flash_attn_func(q, k, v, causal=True, window_size=(5, 0))
    caches = torch.full((2, 2, 12, 2, 16), torch.nan)
    for t in range(12):
        new = (part[:, t : t + 1] for part in (k, v))
        out = flash_attn_with_kvcache(q[:, t : t + 1], *caches, *new, cache_seqlens=t, causal=True, window_size=(5, 0))
        torch.testing.assert_close(out, whole[:, t : t + 1])
    assert torch.equal(caches, torch.stack((k, v)))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("change", ["", "rows that ascend", "rows in any order", "slopes of sequences", "gaps between rows"])
def test_several_queries_or_padding_are_one_call_where_they_can_be(
    change: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what lies between the sequences is not seen: it is NaN."""
    calls: list[tuple[int, ...]] = []
    op = flash_attn.attention

    def counted(q: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(tuple(q.shape))
        return op(q, *args, **options)

    monkeypatch.setattr(flash_attn, "attention", counted)
    rows = {"rows that ascend": [0, 2, 4], "rows in any order": [4, 0, 2]}.get(change, [0, 1, 2])
    firsts, lengths, entries = [3, 0, 19], [17, 20, 19], 5 if "rows" in change.split() else 3
    q, held_k, held_v = drawn((3, queries, 4, 16), (3, 20, 2, 16), (3, 20, 2, 16))
    caches = torch.full((2, entries, 24 if "gaps" in change else 20, 2, 16), torch.nan)[:, :, :20]
    for b, row in enumerate(rows):
        for cache, held in zip(caches, (held_k, held_v), strict=True):
            cache[row, firsts[b] : lengths[b]] = held[b, firsts[b] : lengths[b]]
    padding = dict(zip(("cache_leftpad", "cache_seqlens"), torch.tensor([firsts, lengths], dtype=torch.int32), strict=True))
    options: dict[str, Any] = {"causal": True, "window_size": (9, 0), "alibi_slopes": slopes_of(4)}
    if change == "slopes of sequences":
        options["alibi_slopes"] = slopes_of(3, 4)
    if entries == 5:
        padding["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(q, *caches, **padding, **options, return_softmax_lse=True)
    alone = change in ("", "rows that ascend")
    assert calls == ([(1, 3 * queries, 4, 16)] if alone else [(1, queries, 4, 16)] * 3)
    for b, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        slopes = options["alibi_slopes"].expand(3, 4)[b]
        part = (held[b, first:length] for held in (held_k, held_v))
        told, told_lse = attend(q[b], *part, slopes, causal=True, window_size=(9, 0))
        torch.testing.assert_close(out[b], told)
        torch.testing.assert_close(lse[b], told_lse)


def test_autocast_is_ignored() -> None:
    q, k, v = drawn((2, 5, 4, 16), (2, 5, 2, 16), (2, 5, 2, 16))
    ends, slopes = offsets([4, 6]), slopes_of(2, 4)

    def found() -> list[Tensor]:
        packed = [t.flatten(0, 1) for t in (q, k, v)]
        results = [flash_attn_func(q, k, v, causal=True), flash_attn_varlen_func(*packed, ends, ends, 6, 6)]
        results += [flash_attn_varlen_func(*packed, ends, ends, 6, 6, alibi_slopes=slopes)]
        return results + [flash_attn_with_kvcache(q[:, :n], k, v, cache_seqlens=4, causal=True) for n in (1, 3)]

    alone = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, found(), alone))


def test_tensors_without_memory() -> None:
    q = torch.zeros(2, 5, 4, 16, device="meta")
    out, lse, _ = flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
    assert (out.shape, lse.shape, out.device.type) == (q.shape, (2, 4, 5), "meta")


@pytest.mark.parametrize("queries", [1, 3])
def test_no_sequence(queries: int) -> None:
    q, k, cache = torch.zeros(0, queries, 4, 8), torch.zeros(0, 2, 2, 8), torch.zeros(0, 9, 2, 8)
    options = {"cache_seqlens": 3, "alibi_slopes": slopes_of(4), "return_softmax_lse": True}
    out, lse = flash_attn_with_kvcache(q, cache, cache, k, k, **options)
    assert (out.shape, lse.shape) == ((0, queries, 4, 8), (0, 4, queries))


def test_caches_that_require_gradients_are_written() -> None:
    """As theirs, whose function has no derivative."""
    q, k_cache, k = (t.requires_grad_() for t in drawn((1, 2, 2, 8), (1, 9, 2, 8), (1, 2, 2, 8)))
    assert not flash_attn_with_kvcache(q, k_cache, k_cache.detach().clone(), k, k, cache_seqlens=3).requires_grad
    assert torch.equal(k_cache[:, 3:5], k)


# ---- what is refused


def test_dropout_is_refused() -> None:
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(NotImplementedError, match=r"flash_attn_func: dropout_p is 0\.1; expected 0"):
        flash_attn_func(q, q, q, 0.1)
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.5"):
        flash_attn_varlen_qkvpacked_func(torch.zeros(4, 3, 2, 8), offsets([4]), 4, dropout_p=0.5)


@pytest.mark.parametrize(
    ("function", "given", "told"),
    [
        (flash_attn_func, [(1, 3, 2, 8), (1, 3, 2, 9), (1, 3, 2, 8)], "k has shape"),
        (flash_attn_func, [(1, 3, 3, 8), (1, 3, 2, 8), (1, 3, 2, 8)], "heads"),
        (flash_attn_qkvpacked_func, [(1, 7, 2, 2, 8)], r"qkv has shape \(1, 7, 2, 2, 8\); expected \(batch, seqlen, 3"),
        (flash_attn_kvpacked_func, [(1, 7, 2, 8), (1, 7, 3, 2, 8)], r"kv has shape .* expected \(batch, seqlen, 2"),
    ],
)
def test_shapes_are_refused_by_name(function: Callable[..., Any], given: list[tuple[int, ...]], told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        function(*(torch.zeros(shape) for shape in given))


def test_offsets_are_refused_by_name() -> None:
    q = torch.zeros(7, 2, 8)
    for cu_q, cu_k, told in (
        (offsets([3, 4]), offsets([3, 2, 2]), r"shapes \(3,\) and \(4,\)"),
        (offsets([3, 4]).long(), offsets([3, 4]).long(), "cu_seqlens_q .*int32"),
        (offsets([3, 4]), offsets([3, 5]), "cu_seqlens_k falls from 8 to 7"),
    ):
        with pytest.raises(RuntimeError, match=told):
            flash_attn_varlen_func(q, q, q, cu_q, cu_k, 4, 4)
    with pytest.raises(RuntimeError, match=r"q has shape \(1, 7, 2, 8\); expected \(total, heads, head_dim\)"):
        flash_attn_varlen_func(q[None], q, q, offsets([7]), offsets([7]), 7, 7)


@pytest.mark.parametrize(
    ("pages", "told"),
    [
        ([[0, 1], [2, -1]], "sequence 1 has page or row -1"),
        ([[0], [2]], "sequence 1 has 5 positions; block_table has 1 page"),
    ],
)
def test_pages_that_are_not_there(pages: list[list[int]], told: str) -> None:
    k = torch.zeros(3, 4, 2, 8)
    ends, table = offsets([3, 5]), torch.tensor(pages, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=told):
        flash_attn_varlen_func(torch.zeros(8, 2, 8), k, k, ends, ends, 5, 5, block_table=table)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"v": None}, "k and v come together"),
        ({"cache_seqlens": None}, "without cache_seqlens"),
        ({"cache_seqlens": torch.tensor([9, 1], dtype=torch.int32)}, "sequence 0 .* gets 2 more; k_cache holds 10"),
        ({"block_table": torch.zeros(2, 0, dtype=torch.int32)}, "gets 2 more; block_table holds 0"),
        ({"cache_seqlens": torch.tensor([1, 1])}, "cache_seqlens is torch.int64"),
        ({"k": torch.zeros(2, 2, 1, 8)}, r"k has shape \(2, 2, 1, 8\); expected \(2, seqlen_new, 2, 8\)"),
        ({"cache_leftpad": torch.tensor([0, 5], dtype=torch.int32)}, "sequence 1 has positions 5 to 4"),
        ({"rotary_cos": torch.zeros(10, 4)}, "rotary_cos and rotary_sin come together"),
        ({"rotary_cos": torch.zeros(9, 4), "rotary_sin": torch.zeros(9, 4)}, "10 positions at least"),
        ({"rotary_cos": torch.zeros(10, 5), "rotary_sin": torch.zeros(10, 5)}, "rotary_dim 8 at most"),
        ({"cache_batch_idx": torch.tensor([0, 2], dtype=torch.int32)}, "sequence 1 has page or row 2 of the cache"),
        ({"block_table": torch.tensor([[0], [-1]], dtype=torch.int32)}, "sequence 1 has page or row -1 of the cache"),
        ({"cache_seqlens": 9, "rotary_cos": torch.zeros(10, 4), "rotary_sin": torch.zeros(10, 4)}, "k_cache holds 10"),
        ({"q": torch.zeros(3, 2, 2, 8)}, "expected"),
    ],
)
def test_what_a_cache_refuses(queries: int, change: dict[str, Any], told: str) -> None:
    """And it is as it was."""
    caches = torch.zeros(2, 2, 10, 2, 8)
    new = torch.ones(2, 2, 2, 8)
    given = {"q": torch.zeros(2, queries, 2, 8), "k": new, "v": new, "cache_seqlens": 4}
    with pytest.raises(RuntimeError, match=told):
        flash_attn_with_kvcache(k_cache=caches[0], v_cache=caches[1], **given | change)
    assert not caches.any()


def test_queries_behind_the_last_rotation_are_refused() -> None:
    cache, new, angle = torch.zeros(1, 10, 2, 8), torch.ones(1, 1, 2, 8), torch.zeros(10, 4)
    with pytest.raises(RuntimeError, match="a token stands at position 11; rotary_cos has 10 positions"):
        flash_attn_with_kvcache(torch.zeros(1, 3, 2, 8), cache, cache, new, new, angle, angle, 9, causal=True)
    assert not cache.any()


# ---- padding


def test_padding_goes_and_comes_back() -> None:
    (x,) = drawn((3, 7, 2, 4), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0] * 7])
    unused = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [0] * 7, [0] * 7])
    rows, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 4, 8, 8], 4, [3, 4, 0])
    assert (cu_seqlens.dtype, used.dtype) == (torch.int32, torch.int32)
    assert torch.equal(rows, x[(mask + unused).bool()])
    assert torch.equal(pad_input(rows, indices, 3, 7), x * (mask + unused)[:, :, None, None])
    assert torch.equal(unpad_input(x, mask.bool())[0], x[mask.bool()])
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: pad_input(unpad_input(t, mask)[0] ** 2, indices[indices != 3], 3, 7), leaf)
    assert torch.autograd.gradcheck(lambda t: index_first_axis(t, torch.tensor([1, 1, 0])), leaf)


# ---- names

SHARED = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None"
SHARED += " deterministic=False return_attn_probs=False"
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
PUBLISHED = {  # flash-attn 2.8.4
    "flash_attn_func": f"q k v {SHARED}",
    "flash_attn_kvpacked_func": f"q kv {SHARED}",
    "flash_attn_qkvpacked_func": f"qkv {SHARED}",
    "flash_attn_varlen_func": f"q k v {LENGTHS} {SHARED} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {LENGTHS} {SHARED}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {SHARED}",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None"
    " cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1)"
    " softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
    "unpad_input": "hidden_states attention_mask unused_mask=None",
    "pad_input": "hidden_states indices batch seqlen",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_order_and_defaults_are_theirs(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    bare = (p.name if p.default is p.empty else f"{p.name}={p.default}".replace(" ", "") for p in parameters)
    assert " ".join(bare) == PUBLISHED[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
