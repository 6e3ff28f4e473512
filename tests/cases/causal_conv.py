"""causal_conv, as the tests of all ops see it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import OpCase
from torch import Tensor

from madkernels import causal_conv
from madkernels.benchmarks.causal_conv import ConvCase


def reverses_the_taps(weight: Tensor, **rest: Any) -> Any:
    return causal_conv(weight=weight.flip(1), **rest)


def forgets_the_activation(**inputs: Any) -> Any:
    return causal_conv(**inputs | {"activation": None})


CASE = OpCase(
    name="causal_conv",
    kind=ConvCase,
    sizes=("dim", "width"),
    derived=lambda sizes: {"history": sizes["width"] - 1},
    variants=({"activation": "silu"}, {"activation": None}),
    shapes=(
        (2, 65, 37, 4),
        (1, 130, 16, 3),
        (3, 1, 5, 4),
        (2, 3, 20, 7),
        (1, 64, 33, 2),
        (2, 50, 8, 1),
        (1, 2, 1, 70),
        (1, 1500, 3, 4),
        (1, 20, 36, 9),
    ),
    regimes=((20, 4), (37, 3)),  # channels in pairs, and one by one
    little=(6, 4),
    small=(2, 4),
    empty=((0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (0, 0, 0, 1)),
    any_shape=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 40), st.integers(1, 6)),
    refused=(4, 3),
    refusals=(
        ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\); expected \(batch, seqlen, dim\)"),
        ({"x": torch.zeros(2, 5, 4, dtype=torch.int32)}, "x has dtype int32; it takes float32, bfloat16"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\); expected \(4, 3\)"),
        ({"weight": torch.zeros(4, 0)}, "with a width of 1 at least"),
        ({"weight": torch.zeros(4, 3, dtype=torch.float16)}, "weight has dtype float16; .* it takes float32"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); expected \(4,\)"),
        ({"initial_state": torch.zeros(2, 3, 4)}, r"initial_state has shape \(2, 3, 4\); expected \(2, 2, 4\)"),
    ),
    mutants=(reverses_the_taps, forgets_the_activation),
)
