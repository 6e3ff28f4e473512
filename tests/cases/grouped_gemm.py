"""grouped_gemm, as the tests of all ops see it: rows of no group at both ends, and groups of very different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import Inputs, OpCase, Options
from torch import Tensor

from madkernels.benchmarks.grouped_gemm import GroupedGemmCase


def offsets_of(rows: int, groups: int) -> Tensor:
    """Group after group longer, the first ones empty where there are few rows."""
    begin, end = rows // 20, rows - rows // 15
    return torch.tensor([begin + (end - begin) * i * i // max(groups, 1) ** 2 for i in range(groups + 1)], dtype=torch.int32)


def gather_of(rows: int) -> Tensor:
    """Some rows twice or never, some rows of zeros."""
    index = torch.arange(rows, dtype=torch.int32)
    return torch.where(index % 9 == 4, -1, 3 * index % max(rows, 1))


def adapt(function: Callable[..., Any]) -> Callable[..., Any]:
    """With groups and, if asked for, indices that follow from the shapes."""

    def call(x: Tensor, weight: Tensor, *, gathered: bool = False, transpose: bool = False, **rest: Any) -> Any:
        rows, groups = x.shape[0], weight.shape[0]
        rest["gather"] = gather_of(rows).to(x.device) if gathered else None
        matrices = weight.mT if transpose and weight.dim() == 3 else weight
        return function(x, matrices, offsets_of(rows, groups).to(x.device), transpose=transpose, **rest)

    return call


def further(inputs: Inputs, options: Options) -> Options:
    offsets = offsets_of(inputs["x"].shape[0], inputs["weight"].shape[0])
    return {"offsets": offsets, "activation": options["activation"], "transpose": False}


def slack(dtype: torch.dtype) -> float:
    """Beside the reference, which rounds to the dtype at the end alone, h is rounded before the backward takes it, and so
    are its gradients."""
    return torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0


def forgets_the_bias(bias: Tensor, **inputs: Any) -> Any:
    return CASE.function(**inputs, bias=0 * bias)


def takes_the_next_group(weight: Tensor, **inputs: Any) -> Any:
    return CASE.function(weight=weight.roll(1, 0), **inputs)


def mixes_up_gate_and_up(weight: Tensor, bias: Tensor, **inputs: Any) -> Any:
    half = weight.shape[1] // 2
    return CASE.function(weight=weight.roll(half, 1), bias=bias.roll(half, 1), **inputs)


CASE = OpCase(
    name="grouped_gemm",
    kind=GroupedGemmCase,
    sizes=("inputs", "half", "groups"),
    derived=lambda sizes: {"outputs": 2 * sizes["half"]},
    adapt=adapt,
    further=further,
    scale=lambda inputs: inputs | {"weight": inputs["weight"] / max(inputs["weight"].shape[2], 1) ** 0.5},
    variants=(
        {"activation": "swiglu"},
        {"activation": None, "transpose": True},
        {"activation": "gelu", "gathered": True},
        {"activation": "relu2"},
        {"activation": "geglu", "gathered": True, "transpose": True},
        {"activation": "silu"},
        {"activation": "relu"},
        {"activation": "reglu"},
    ),
    has_second=lambda options: False,
    offsets=(),
    shapes=(
        (1, 1, 1, 1, 1),
        (1, 40, 7, 3, 3),
        (2, 65, 40, 24, 4),  # one vector of features and half of one more
        (1, 300, 129, 48, 2),
        (1, 600, 16, 51, 1),  # more rows than a part has
        (1, 100, 1000, 20, 3),
        (1, 100, 30, 5, 310),
        (3, 16, 48, 65, 5),
    ),
    regimes=((20, 24, 3), (129, 20, 40)),
    little=(6, 5, 3),
    small=(3, 2, 2),
    empty=((0, 5, 4, 3, 2), (1, 5, 4, 3, 0), (1, 5, 0, 3, 2), (1, 5, 4, 0, 2), (0, 0, 0, 0, 0)),
    any_shape=st.tuples(
        st.integers(1, 2), st.integers(1, 90), st.integers(1, 70), st.integers(1, 60), st.integers(1, 9)
    ),
    slack=slack,
    refused=(4, 3, 2),
    refusals=(
        ({"x": torch.zeros(10, 5, 4)}, r"x has shape \(10, 5, 4\); expected \(rows, inputs\)"),
        ({"x": torch.zeros(10, 4, dtype=torch.int32)}, "x has dtype int32; it takes float32, bfloat16"),
        ({"weight": torch.zeros(2, 4)}, r"weight has shape \(2, 4\); expected \(groups, outputs, inputs\)"),
        ({"weight": torch.zeros(2, 6, 5)}, r"weight has shape \(2, 6, 5\); expected \(2, 6, 4\)"),
        ({"weight": torch.zeros(2, 6, 4).half()}, "weight has dtype float16; with x in float32 it takes float32"),
        ({"weight": torch.zeros(2, 5, 4), "bias": torch.zeros(2, 5)}, "weight has 5 outputs; a gated activation takes two"),
        ({"bias": torch.zeros(2, 5)}, r"bias has shape \(2, 5\); expected \(2, 6\)"),
    ),
    mutants=(forgets_the_bias, takes_the_next_group, mixes_up_gate_and_up),
)  # fmt: skip
