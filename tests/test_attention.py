"""What only attention has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.attention import CASE, slack
from checks import check, relative_rms
from hypothesis import given, settings, strategies as st
from op_cases import DTYPES, offsets_of
from torch import Tensor

from madkernels import attention, attention_step, reference

pytestmark = pytest.mark.usefixtures("backend")
on_cpu = pytest.mark.backends("cpu")  # where lengths of sequences in a cache are looked at, and float64


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def qkv(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    shapes = (
        (batch, queries, heads, head_dim),
        (batch, keys, kv_heads, head_dim),
        (batch, keys, kv_heads, head_dim_v or head_dim),
    )
    return dict(zip("qkv", drawn(*shapes, dtype=dtype), strict=True))


def check_attention(inputs: dict[str, Any], **options: Any) -> None:
    check(CASE.call, CASE.reference, inputs, slack=slack(inputs["q"].dtype), **options)


# ---- shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "head_dim"),
    [
        (239, 1, 2, 2, 64), (799, 3, 6, 1, 40), (113, 203, 6, 1, 59), (1, 2048, 2, 1, 111), (3, 799, 2, 2, 128),
        (64, 65, 1, 1, 96), (127, 512, 2, 1, 80), (49, 48, 3, 3, 256), (1, 1, 1, 1, 1), (33, 0, 2, 2, 8), (0, 7, 2, 2, 8),
    ],
)  # fmt: skip
def test_fewer_and_more_keys_than_queries(
    queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, causal: bool, dtype: torch.dtype
) -> None:
    """Causal is aligned at the end; queries before the first key see nothing."""
    check_attention(qkv(1, queries, keys, heads, kv_heads, head_dim, dtype=dtype), causal=causal)


@on_cpu
@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5),
    left=st.none() | st.integers(0, 80),
    right=st.none() | st.integers(0, 80),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_documents_and_windows(
    lengths: list[tuple[int, int]], left: int | None, right: int | None, causal: bool, dtype: torch.dtype
) -> None:
    queries, keys = (sum(n) for n in zip(*lengths, strict=True))
    offsets = [offsets_of(n) for n in zip(*lengths, strict=True)]
    inputs = qkv(1, queries, keys, 4, 2, 9, 17, dtype=dtype)
    check_attention(inputs, causal=causal, window=(left, right), cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])


def test_one_number_is_a_window_of_so_many() -> None:
    inputs = qkv(1, 30, 30, 2, 2, 8)
    assert torch.equal(attention(**inputs, causal=True, window=5), attention(**inputs, window=(4, 0)))
    assert torch.equal(attention(**inputs, window=5), attention(**inputs, window=(4, 4)))
    only_itself = attention(**inputs, causal=True, window=1)
    assert relative_rms(only_itself, inputs["v"]) < 1e-6


# ---- bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 70, 90), (1, 4, 70, 90), (2, 1, 1, 90), (90,), (4, 70, 1), ()], ids=str)
def test_bias_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With its gradient, beside every other option."""
    inputs = qkv(2, 70, 90, 4, 2, 24, dtype=dtype)
    [inputs["bias"]] = drawn(shape, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    inputs["alibi_slopes"], inputs["sink"] = (t.abs() / 8 for t in drawn((4,), (4,), dtype=wide))
    check_attention(inputs, causal=True, softcap=1.5, window=(40, None))


def test_bias_of_packed_documents_lies_at_their_place() -> None:
    inputs = qkv(1, 50, 50, 2, 2, 8)
    [inputs["bias"]] = drawn((1, 2, 50, 50))
    check_attention(inputs, cu_seqlens_q=offsets_of((20, 0, 30)))


def test_a_bias_of_minus_infinity_hides() -> None:
    """As a mask; a query of which all is hidden has out 0, lse -infinity, and gradients of 0."""
    inputs = {k: t.requires_grad_() for k, t in qkv(1, 6, 70, 2, 2, 8).items()}
    hidden = torch.rand(6, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden[3] = True
    bias = torch.zeros(6, 70).masked_fill(hidden, -torch.inf)
    out, lse = attention(**inputs, bias=bias, return_lse=True)
    mask = ~hidden
    mask[3] = True
    q, k, v = (t.transpose(1, 2) for t in inputs.values())
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    keep = [0, 1, 2, 4, 5]
    assert relative_rms(out[:, keep], wanted[:, keep]) < 1e-6
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3]))
    assert (lse[..., 3] == -torch.inf).all()
    grads = torch.autograd.grad(out.square().sum() + lse[..., keep].sum(), list(inputs.values()))
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][:, 3], torch.zeros_like(grads[0][:, 3]))


# ---- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scale_of_any_sign(scale: float, softcap: float, dtype: torch.dtype) -> None:
    check_attention(qkv(1, 60, 70, 2, 2, 16, dtype=dtype), causal=True, softmax_scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    """Scores in the hundreds, and lse with them, from which the backward takes the weights again."""
    inputs = qkv(1, 60, 130, 2, 2, 64, dtype=dtype)
    inputs = {"q": inputs["q"] * 20, "k": inputs["k"] * 5, "v": inputs["v"]}
    check_attention(inputs, causal=True)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences(dtype: torch.dtype) -> None:
    """8,192 keys in float32: sums of many, of a value that does not average out."""
    inputs = qkv(1, 40, 8192, 1, 1, 64, dtype=dtype)
    inputs["v"] = inputs["v"] + 1
    check_attention(inputs, causal=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_special_values(argument: str, value: float) -> None:
    inputs = qkv(1, 70, 70, 2, 2, 16)
    inputs[argument][0, 20, 1, 3] = value
    out, exact = (f(**inputs) for f in (attention, reference.attention))
    assert isinstance(out, Tensor)
    assert isinstance(exact, Tensor)
    assert torch.equal(out.isfinite(), exact.isfinite())


def test_special_values_stay_in_their_document() -> None:
    """Other documents give the same bits, forward and backward."""
    inputs = qkv(1, 90, 90, 2, 2, 16)
    offsets = offsets_of((13, 40, 37))

    def bits(inputs: dict[str, Tensor]) -> list[Tensor]:
        leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
        out = attention(**leaves, cu_seqlens_q=offsets)
        return [out, *torch.autograd.grad(out.sum(), list(leaves.values()))]

    plain = bits(inputs)
    for argument in inputs:
        spoilt = inputs | {argument: inputs[argument].clone()}
        spoilt[argument][:, 13:53] = float("nan")
        found = bits(spoilt)
        assert found[0][:, 13:53].isnan().any()
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a[:, :13], b[:, :13])
            assert torch.equal(a[:, 53:], b[:, 53:])


@on_cpu
def test_memory_is_linear() -> None:
    """Twice the length takes about twice the memory."""
    from madkernels.benchmarks.harness import peak_memory

    def peak(seqlen: int) -> int:
        inputs = qkv(1, seqlen, seqlen, 1, 1, 16)
        return peak_memory(lambda **t: attention(**t, causal=True), {**inputs, "out": torch.ones_like(inputs["v"])})

    assert peak(4096) < 2.2 * peak(2048)


# ---- sinks, against the plain way: one more score


@on_cpu
def test_a_sink_is_one_more_score_without_a_value() -> None:
    inputs = qkv(2, 30, 40, 4, 2, 16, dtype=torch.float64)
    [sink] = drawn((4,), dtype=torch.float64)
    out, lse = attention(**inputs, sink=sink, causal=True, return_lse=True)
    q, k, v = (t.transpose(1, 2) for t in inputs.values())
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    scores = scores.masked_fill(torch.ones(30, 40, dtype=torch.bool).triu(11), -torch.inf)
    with_sink = torch.cat([scores, sink[None, :, None, None].expand(2, 4, 30, 1)], -1)
    wanted = with_sink.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    assert relative_rms(out, wanted.transpose(1, 2)) < 1e-12
    assert relative_rms(lse, with_sink.logsumexp(-1)) < 1e-12


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 0}, ValueError, "attention: window is 0; expected 1 at least"),
        ({"window": (-2, None)}, RuntimeError, "attention: left is -2; expected 0 at least, or None"),
        ({"softcap": -1.0}, RuntimeError, "attention: softcap is -1; expected 0"),
        ({"bias": torch.zeros(3, 9)}, RuntimeError, r"bias has shape \(3, 9\); expected one that expands to \(1, 2, 5, 9\)"),
        ({"bias": torch.zeros(9).half()}, RuntimeError, "bias has dtype float16; with q in float32 it takes float32"),
        ({"cu_seqlens_k": offsets_of((9,))}, ValueError, "cu_seqlens_k is given without cu_seqlens_q"),
        (
            {"cu_seqlens_q": offsets_of((2, 3)), "cu_seqlens_k": offsets_of((9,))},
            RuntimeError,
            "cu_seqlens_k has 1 documents; expected the 2 of cu_seqlens_q",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**qkv(1, 5, 9, 2, 1, 8), **arguments)


# ---- decoding


def cache(batch: int, capacity: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = (batch, heads, head_dim), *[(batch, capacity, kv_heads, head_dim)] * 2, *[(batch, kv_heads, head_dim)] * 2
    return dict(zip(("q", "k_cache", "v_cache", "k", "v"), drawn(*shapes, dtype=dtype), strict=True))


def copies(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in inputs.items()}


def check_step(inputs: dict[str, Tensor], **options: Any) -> None:
    """Compares the result and both caches with the reference's."""
    given, wanted = copies(inputs), {k: t.double() for k, t in inputs.items()}
    found = attention_step(**given, **options, return_lse=True)
    exact = reference.attention_step(**wanted, **options, return_lse=True)
    allowed = 2 * torch.finfo(inputs["q"].dtype).eps
    for value, right in zip(found, exact, strict=True):
        assert relative_rms(value, right) <= allowed
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name].double(), wanted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(4, 2, 64, None), (6, 1, 59, 5), (3, 3, 7, 300), (8, 2, 128, 1)]
)
def test_step_of_unequal_lengths(heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    lengths = torch.tensor([0, 1, 37, 255, 256, 599], dtype=torch.int32)
    inputs = cache(6, 600, heads, kv_heads, head_dim, dtype)
    slopes, sink = (t.abs() for t in drawn((heads,), (heads,)))
    check_step(inputs, cache_seqlens=lengths, window=window)
    options: dict[str, Any] = {"softcap": 3.0, "softmax_scale": -0.2}
    check_step(inputs, cache_seqlens=lengths, window=window, **options)
    found = attention_step(**copies(inputs), cache_seqlens=lengths, alibi_slopes=slopes, sink=sink, return_lse=True)
    exact = reference.attention_step(
        **copies(inputs), cache_seqlens=lengths, alibi_slopes=slopes, sink=sink, return_lse=True
    )
    assert all(relative_rms(a, b) <= 2 * torch.finfo(dtype).eps for a, b in zip(found, exact, strict=True))


def test_step_in_pages_equals_the_whole() -> None:
    lengths = torch.tensor([0, 7, 30, 47], dtype=torch.int32)
    whole = cache(4, 48, 4, 2, 16, torch.float32)
    table = torch.randperm(4 * 6, generator=torch.Generator().manual_seed(0)).int().view(4, 6)
    paged = copies(whole)
    for name in ("k_cache", "v_cache"):
        pages = torch.empty(24, 8, 2, 16)
        pages[table.flatten().long()] = whole[name].reshape(24, 8, 2, 16)
        paged[name] = pages
    check_step(paged, cache_seqlens=lengths, block_table=table)
    assert torch.equal(
        attention_step(**copies(paged), cache_seqlens=lengths, block_table=table),
        attention_step(**copies(whole), cache_seqlens=lengths),
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim", "page_size"),
    [(6, 1, 40, 111, 1), (12, 1, 111, 40, 16), (10, 2, 8, 256, 17), (2, 2, 256, 59, 17)],
)
def test_step_of_any_widths_and_pages(heads: int, kv_heads: int, head_dim: int, value_dim: int, page_size: int) -> None:
    each = -(-300 // page_size)
    keys, values = (3 * each, page_size, kv_heads, head_dim), (3 * each, page_size, kv_heads, value_dim)
    shapes = (3, heads, head_dim), keys, values, (3, kv_heads, head_dim), (3, kv_heads, value_dim)
    inputs = dict(zip(("q", "k_cache", "v_cache", "k", "v"), drawn(*shapes), strict=True))
    table = torch.randperm(3 * each, generator=torch.Generator().manual_seed(0)).int().view(3, each)
    lengths = torch.tensor([0, 100, each * page_size - 1], dtype=torch.int32)
    check_step(inputs, cache_seqlens=lengths, block_table=table)


@pytest.mark.parametrize("head_dim", [16, 17])
def test_step_takes_a_cache_of_any_strides(head_dim: int) -> None:
    inputs = cache(2, 20, 4, 2, head_dim, torch.bfloat16)
    lengths = torch.tensor([5, 19], dtype=torch.int32)
    within = torch.stack([inputs[name].transpose(1, 2) for name in ("k_cache", "v_cache")], 3)
    strided = inputs | dict(zip(("k_cache", "v_cache"), within.transpose(1, 2).unbind(3), strict=True))
    found, wanted = (attention_step(**given, cache_seqlens=lengths) for given in (strided, inputs))
    assert torch.equal(found, wanted)
    assert all(torch.equal(strided[name], inputs[name]) for name in ("k_cache", "v_cache"))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("capacity", [6, 8, 40])
def test_step_by_step_equals_the_whole(capacity: int, window: int | None) -> None:
    """Along a ring, too, which is longer than the window, or as long."""
    if window is None and capacity < 40:
        return
    inputs = qkv(2, 40, 40, 4, 2, 16)
    wanted = attention(**inputs, causal=True, window=window)
    k_cache, v_cache = torch.full((2, 2, capacity, 2, 16), torch.nan).unbind(0)
    lengths = torch.zeros(2, dtype=torch.int32)
    found = []
    for t in range(40):
        q, k, v = (x[:, t] for x in inputs.values())
        found.append(attention_step(q, k_cache, v_cache, k, v, cache_seqlens=lengths, window=window))
        lengths += 1
    assert relative_rms(torch.stack(found, 1), wanted) < 1e-6


def test_step_without_a_new_key_sees_the_cache_alone() -> None:
    inputs = cache(2, 20, 4, 2, 16, torch.float32)
    lengths = torch.tensor([0, 11], dtype=torch.int32)
    q, k_cache, v_cache = (inputs[k] for k in ("q", "k_cache", "v_cache"))
    out, lse = attention_step(q, k_cache, v_cache, cache_seqlens=lengths, return_lse=True)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert relative_rms(out[1:], attention(q[1:, None], k_cache[1:, :11], v_cache[1:, :11])[:, 0]) < 1e-6


@on_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q has shape \(2, 4\); expected \(batch, heads, head_dim\)"),
        ({"k_cache": torch.zeros(2, 9, 3, 8)}, "k_cache has 3 heads; expected a divisor of the 4 heads of q"),
        ({"v_cache": torch.zeros(2, 8, 2, 8)}, r"v_cache has shape \(2, 8, 2, 8\); expected \(2, 9, 2, 8\)"),
        ({"k_cache": torch.zeros(2, 9, 8, 2).mT}, "k_cache must be dense along head_dim"),
        ({"v": None}, "k and v come together"),
        ({"cache_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "sequence 1 sees 10 positions, but the cache holds 9"),
        ({"cache_seqlens": torch.tensor([0, -1], dtype=torch.int32)}, r"cache_seqlens\[1\] is -1; expected 0 at least"),
        ({"cache_seqlens": torch.tensor([0, 1])}, "cache_seqlens has dtype int64; .* it takes int32"),
        (
            {"block_table": torch.tensor([[0], [2]], dtype=torch.int32)},
            "block_table names page 2 for sequence 1; there are 2",
        ),
    ],
)
def test_step_refusals(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = cache(2, 9, 4, 2, 8, torch.float32) | {"cache_seqlens": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"attention_step: .*{message}"):
        attention_step(**inputs | change)


@pytest.mark.backends("ptx", "cuda")
@pytest.mark.parametrize(
    ("lengths", "table"),
    [((4, 9), None), ((4, -1), None), ((4, 3), ((0, 1, 2), (3, 6, 5))), ((4, 4), ((0, 1, 2), (-1, 4, 5)))],
    ids=["too long", "negative", "page of the new key", "page of a key"],
)
def test_step_on_a_gpu_gives_nan_beyond_the_cache(lengths: tuple[int, int], table: Sequence[Sequence[int]] | None) -> None:
    whole = cache(2, 9, 4, 2, 8, torch.float32)
    given = copies(whole)
    options: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    if table:
        given |= {name: given[name].view(6, 3, 2, 8) for name in ("k_cache", "v_cache")}
        options["block_table"] = torch.tensor(table, dtype=torch.int32)
    out, lse = attention_step(**given, **options, return_lse=True)
    wanted, wanted_lse = attention_step(**whole, cache_seqlens=torch.tensor([4, 0], dtype=torch.int32), return_lse=True)
    assert torch.equal(out[0], wanted[0])
    assert torch.equal(lse[0], wanted_lse[0])
    assert out[1].isnan().all()
    assert lse[1].isnan().all()


def test_opcheck_step() -> None:
    inputs = cache(2, 9, 4, 2, 8, torch.float32)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.madkernels.attention_step.default, (*inputs.values(), lengths, None, None, None, None, None)
    )
