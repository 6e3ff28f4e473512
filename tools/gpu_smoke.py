"""Runs every op on a GPU, forward and backward, at small odd sizes: what `make gpu-check` gives to compute-sanitizer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from madkernels import (
    attention,
    attention_step,
    causal_conv,
    causal_conv_step,
    fft_conv,
    fft_conv_step,
    grouped_gemm,
    moe_combine,
    moe_dispatch,
    moe_mlp,
    moe_route,
    selective_scan,
    selective_scan_step,
    ssd_scan,
    ssd_scan_step,
)

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)


def scan(dtype: torch.dtype, batch: int, seqlen: int, dim: int, dstate: int, docs: list[int] | None = None) -> None:
    states = batch if docs is None else len(docs) - 1
    u, delta, z = (leaf(batch, seqlen, dim, dtype=dtype) for _ in range(3))
    B, C = (leaf(batch, seqlen, 1, dstate, dtype=dtype) for _ in range(2))
    A, D, bias, initial = leaf(dim, dstate), leaf(dim), leaf(dim), leaf(states, dim, dstate)
    offsets = None if docs is None else torch.tensor(docs, dtype=torch.int32, device=DEVICE)
    options = {"initial_state": initial, "cu_seqlens": offsets, "return_final_state": True}
    out, state = selective_scan(u, delta, A, B, C, D, z, bias, True, **options)
    (out.float().sum() + state.sum()).backward()
    if seqlen:
        state = torch.zeros(batch, dim, dstate, device=DEVICE)
        selective_scan_step(state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias, True)


def scan_heads(dtype: torch.dtype, seqlen: int, head_dim: int, dstate: int, docs: list[int] | None = None) -> None:
    batch, heads, groups = 2 if docs is None else 1, 4, 2
    x, delta = leaf(batch, seqlen, heads, head_dim, dtype=dtype), torch.rand(batch, seqlen, heads, device=DEVICE)
    B, C = (leaf(batch, seqlen, groups, dstate, dtype=dtype) for _ in range(2))
    initial = leaf(batch if docs is None else len(docs) - 1, heads, head_dim, dstate)
    A, D = -torch.rand(heads, device=DEVICE), leaf(heads)
    offsets = None if docs is None else torch.tensor(docs, dtype=torch.int32, device=DEVICE)
    options = {"initial_state": initial, "cu_seqlens": offsets, "return_final_state": True}
    out, state = ssd_scan(x, delta.requires_grad_(), A.requires_grad_(), B, C, D, **options)
    (out.float().sum() + state.sum()).backward()
    state = torch.zeros(batch, heads, head_dim, dstate, device=DEVICE)
    ssd_scan_step(state, x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D)


def conv(dtype: torch.dtype, batch: int, seqlen: int, dim: int, width: int, docs: list[int] | None = None) -> None:
    states = batch if docs is None else len(docs) - 1
    x, weight, bias = leaf(batch, seqlen, dim, dtype=dtype), leaf(dim, width, dtype=dtype), leaf(dim, dtype=dtype)
    initial = leaf(states, width - 1, dim, dtype=dtype)
    offsets = None if docs is None else torch.tensor(docs, dtype=torch.int32, device=DEVICE)
    for rows in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        options = {"initial_state": initial, "cu_seqlens": offsets, "return_final_state": True}
        out, state = causal_conv(rows, weight, bias, activation="silu", **options)
        (out.float().sum() + state.float().sum()).backward()
    if seqlen:
        causal_conv_step(torch.zeros(batch, width - 1, dim, device=DEVICE, dtype=dtype), x[:, 0], weight, bias)


def long_conv(dtype: torch.dtype, batch: int, seqlen: int, dim: int, taps: int, docs: list[int] | None = None) -> None:
    states = batch if docs is None else len(docs) - 1
    u, pre, post = (leaf(batch, seqlen, dim, dtype=dtype) for _ in range(3))
    filters, skip, initial = leaf(dim, taps), leaf(dim), leaf(states, taps - 1, dim)
    offsets = None if docs is None else torch.tensor(docs, dtype=torch.int32, device=DEVICE)
    for rows in (u, u.transpose(1, 2).contiguous().transpose(1, 2)):
        gates = {"skip": skip, "pre_gate": pre, "post_gate": post}
        out, state = fft_conv(rows, filters, **gates, initial_state=initial, cu_seqlens=offsets, return_final_state=True)
        (out.float().sum() + state.sum()).backward()
    state = torch.zeros(batch, taps - 1, dim, device=DEVICE)
    fft_conv_step(state, u[:, 0], filters, skip=skip, pre_gate=pre[:, 0], post_gate=post[:, 0])


def attend(dtype: torch.dtype, queries: int, keys: int, head_dim: int, docs: list[int] | None = None) -> None:
    q = leaf(1, queries, 4, head_dim, dtype=dtype)
    k, v = leaf(1, keys, 2, head_dim, dtype=dtype), leaf(1, keys, 2, head_dim + 3, dtype=dtype)
    offsets = None if docs is None else torch.tensor(docs, dtype=torch.int32, device=DEVICE)
    plain = {"causal": True, "cu_seqlens_q": offsets}
    added = {
        "bias": leaf(queries, keys, dtype=dtype),
        "alibi_slopes": leaf(4),
        "sink": leaf(4),
        "softcap": 3.0,
        "window": 40,
    }
    for options in (plain, plain | added):
        out, lse = attention(q, k, v, return_lse=True, **options)
        (out.float().sum() + lse.clamp(min=0).sum()).backward()


def attend_once(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    q, k, v = (leaf(2, n, head_dim, dtype=dtype).detach() for n in (heads, kv_heads, kv_heads))
    lengths = torch.tensor([40, 299], dtype=torch.int32, device=DEVICE)
    whole = [leaf(2, 300, kv_heads, head_dim, dtype=dtype).detach() for _ in range(2)]
    attention_step(q, *whole, k, v, cache_seqlens=lengths, window=280, softcap=3.0, alibi_slopes=leaf(heads).detach())
    pages = [cache.reshape(60, 10, kv_heads, head_dim) for cache in whole]
    table = torch.arange(60, dtype=torch.int32, device=DEVICE).flip(0).view(2, 30)
    attention_step(q, *pages, k, v, cache_seqlens=lengths, block_table=table)


def route(dtype: torch.dtype, tokens: int, experts: int, top_k: int, dim: int, **options: Any) -> None:
    x = leaf(tokens, dim, dtype=dtype)
    plan = moe_route(leaf(tokens, experts, dtype=dtype), top_k, **options)
    out = moe_combine(moe_dispatch(x, plan), plan)
    (out.float().sum() + plan.load_balance_loss + plan.z_loss).backward()


def multiply(dtype: torch.dtype, rows: int, inputs: int, outputs: int, groups: int, activation: str | None) -> None:
    offsets = torch.arange(groups + 1, dtype=torch.int32, device=DEVICE) * (rows // (groups + 1))
    gather = torch.arange(rows, dtype=torch.int32, device=DEVICE).flip(0) // 2
    x, bias = leaf(rows, inputs, dtype=dtype), leaf(groups, outputs, dtype=dtype)
    weight = leaf(groups, outputs, inputs, dtype=dtype)
    for matrices, transpose in ((weight, False), (weight.mT.contiguous(), True)):
        for index in (None, gather):
            y = grouped_gemm(x, matrices, offsets, bias=bias, activation=activation, gather=index, transpose=transpose)
            y.float().sum().backward()


def mix(dtype: torch.dtype, tokens: int, dim: int, hidden: int, experts: int, top_k: int, activation: str) -> None:
    x, gate_up, down = (
        leaf(tokens, dim, dtype=dtype),
        leaf(experts, 2 * hidden, dim, dtype=dtype),
        leaf(experts, dim, hidden, dtype=dtype),
    )
    biases = {"gate_up_bias": leaf(experts, 2 * hidden, dtype=dtype), "down_bias": leaf(experts, dim, dtype=dtype)}
    plan = moe_route(leaf(tokens, experts, dtype=dtype), top_k)
    moe_mlp(x, plan, gate_up, down, activation=activation, **biases).float().sum().backward()


def main() -> None:
    for dtype, (seqlen, dstate) in itertools.product(DTYPES, ((41, 16), (70, 19), (900, 3))):
        scan(dtype, 2, seqlen, 67, dstate)
    scan(torch.bfloat16, 1, 100, 9, 4, [0, 40, 40, 100])
    for dtype, (seqlen, head_dim, dstate) in itertools.product(DTYPES, ((41, 37, 5), (150, 64, 128), (70, 70, 66))):
        scan_heads(dtype, seqlen, head_dim, dstate)
    scan_heads(torch.bfloat16, 100, 20, 6, [0, 40, 40, 100])
    for dtype, (seqlen, dim, width) in itertools.product(DTYPES, ((41, 37, 4), (130, 38, 3), (20, 37, 7))):
        conv(dtype, 2, seqlen, dim, width)
    conv(torch.bfloat16, 1, 100, 9, 4, [0, 40, 40, 100])
    for dtype, (seqlen, dim) in itertools.product(DTYPES, ((41, 37), (1100, 9), (20000, 2))):
        long_conv(dtype, 2, seqlen, dim, seqlen)
    long_conv(torch.bfloat16, 1, 100, 9, 70, [0, 40, 40, 100])
    for dtype, (queries, keys, head_dim) in itertools.product(
        DTYPES, ((70, 150, 59), (150, 70, 64), (80, 80, 125), (70, 70, 160))
    ):
        attend(dtype, queries, keys, head_dim)
    attend(torch.bfloat16, 100, 100, 64, [0, 40, 40, 100])
    for dtype, (heads, kv_heads, head_dim) in itertools.product(DTYPES, ((2, 2, 64), (8, 2, 59), (6, 1, 128))):
        attend_once(dtype, heads, kv_heads, head_dim)
    for dtype, (experts, top_k, dim) in itertools.product(DTYPES, ((6, 6, 37), (40, 3, 64), (1100, 2, 9))):
        route(dtype, 70, experts, top_k, dim)
    for dtype, (inputs, outputs, activation) in itertools.product(
        DTYPES, ((64, 80, "swiglu"), (37, 59, None), (200, 6, "geglu"))
    ):
        multiply(dtype, 300, inputs, outputs, 3, activation)
        mix(dtype, 150, inputs, outputs, 4, 3, activation or "reglu")
    route(torch.bfloat16, 70, 40, 3, 64, score="sigmoid", groups=(20, 4), capacity=5)


if __name__ == "__main__":
    main()
    torch.cuda.synchronize()
    print("every op ran")
