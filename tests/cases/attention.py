"""attention, as the tests of all ops see it. Of its arguments `bias` is in tests/test_attention.py alone."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import OpCase, Shape
from torch import Tensor

from madkernels import attention
from madkernels.benchmarks.attention import AttentionCase


def shape_of(batch: int, seqlen: int, head_dim: int, kv_heads: int, group: int, head_dim_v: int) -> Shape:
    return batch, seqlen, head_dim, kv_heads * group, kv_heads, head_dim_v


def slack(dtype: torch.dtype) -> float:
    """Beside the reference, which rounds to the dtype at the end alone, the weights of softmax are rounded before they
    multiply values, and the output before it enters the gradients of scores, whose sums cancel."""
    return torch.finfo(dtype).eps * {2: 2, 4: 64, 8: 128}[dtype.itemsize]


def forgets_the_scale(**inputs: Any) -> Any:
    return attention(**inputs, softmax_scale=1.0)


def forgets_the_mask(**inputs: Any) -> Any:
    return attention(**inputs | {"causal": False})


def forgets_the_slopes(alibi_slopes: Tensor, **inputs: Any) -> Any:
    return attention(**inputs, alibi_slopes=0 * alibi_slopes)


def mixes_up_the_heads(k: Tensor, **inputs: Any) -> Any:
    return attention(k=k.flip(2), **inputs)


CASE = OpCase(
    name="attention",
    kind=AttentionCase,
    sizes=("head_dim", "heads", "kv_heads", "head_dim_v"),
    scale=lambda inputs: inputs | {"alibi_slopes": inputs["alibi_slopes"] / 4},
    variants=(
        {"causal": True},
        {"causal": False},
        {"causal": True, "window": 7, "softcap": 2.0},
        {"window": (3, 20), "softmax_scale": -0.3},
    ),
    second="return_lse",
    result_axes=(1, 2),
    offsets=("cu_seqlens_q", "cu_seqlens_k"),
    shapes=(
        (2, 65, 16, 4, 2, 16),
        (1, 1, 40, 6, 1, 59),
        (1, 203, 111, 2, 2, 8),
        (2, 130, 64, 2, 2, 64),
        (1, 49, 1, 3, 3, 1),
        (1, 100, 32, 1, 1, 128),
        (3, 16, 7, 6, 3, 33),
    ),
    regimes=((16, 4, 2, 16), (59, 3, 3, 40)),
    little=(6, 4, 2, 5),
    small=(3, 2, 1, 2),
    empty=((0, 5, 4, 2, 1, 4), (2, 0, 4, 2, 1, 4)),
    any_shape=st.builds(
        shape_of, st.integers(1, 2), st.integers(1, 150), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3),
        st.integers(1, 70),
    ),
    slack=slack,
    refused=(4, 2, 1, 3),
    refusals=(
        ({"q": torch.zeros(2, 5, 4)}, r"q has shape \(2, 5, 4\); expected \(batch, seqlen, heads, head_dim\)"),
        ({"q": torch.zeros(2, 5, 2, 4, dtype=torch.int32)}, "q has dtype int32; it takes float32, bfloat16"),
        ({"k": torch.zeros(2, 5, 1, 3)}, r"k has shape \(2, 5, 1, 3\); expected \(2, 5, 1, 4\)"),
        ({"k": torch.zeros(2, 5, 0, 4)}, "k has 0 heads; expected a divisor of the 2 heads of q"),
        ({"k": torch.zeros(2, 5, 1, 4).half()}, "k has dtype float16; with q in float32 it takes float32"),
        ({"v": torch.zeros(2, 4, 1, 3)}, r"v has shape \(2, 4, 1, 3\); expected \(2, 5, 1, 3\)"),
        ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes has shape \(3,\); expected one that expands to \(2, 2\)"),
        ({"sink": torch.zeros(3)}, r"sink has shape \(3,\); expected one that expands to \(2,\)"),
    ),
    mutants=(forgets_the_scale, forgets_the_mask, forgets_the_slopes, mixes_up_the_heads),
)  # fmt: skip
