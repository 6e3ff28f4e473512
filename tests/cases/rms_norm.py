"""rms_norm, as the tests of all ops see it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import OpCase
from torch import Tensor

from madkernels import rms_norm
from madkernels.benchmarks.rms_norm import NormCase


def forgets_the_weight(weight: Tensor, **rest: Any) -> Any:
    return rms_norm(weight=torch.ones_like(weight), **rest)


def norms_before_the_gate(x: Tensor, gate: Tensor, **rest: Any) -> Any:
    return rms_norm(x, **rest) * torch.nn.functional.silu(gate)


def takes_no_eps(eps: float = 0.0, **rest: Any) -> Any:
    return rms_norm(eps=0.0, **rest)


CASE = OpCase(
    name="rms_norm",
    kind=NormCase,
    sizes=("dim",),
    further=lambda inputs, options: {"eps": options["eps"]},
    variants=({"eps": 0.1}, {"eps": 1e-5}),
    has_second=lambda options: False,
    offsets=(),
    keeps_dtype=True,
    shapes=((1, 1, 1), (2, 65, 37), (1, 130, 16), (3, 43, 5), (1, 64, 128), (1, 3, 1500)),  # items have 64 rows
    regimes=((20,), (37,)),
    little=(6,),
    small=(3,),
    empty=((0, 5, 4), (2, 0, 4)),
    any_shape=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 150)),
    refused=(4,),
    refusals=(
        ({"x": torch.zeros(10, dtype=torch.int32)}, "x has dtype int32; it takes float32, bfloat16"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\); expected \(4,\)"),
        ({"weight": torch.zeros(4, dtype=torch.float16)}, "weight has dtype float16; .* it takes float32"),
        ({"gate": torch.zeros(10, 5)}, r"gate has shape \(10, 5\); expected \(10, 4\)"),
        ({"gate": torch.zeros(10, 4).half()}, "gate has dtype float16; .* it takes float32"),
    ),
    mutants=(forgets_the_weight, norms_before_the_gate, takes_no_eps),
)
