"""ssd_scan, as the tests of all ops see it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import Inputs, OpCase, Shape
from torch import Tensor

from madkernels import ssd_scan
from madkernels.benchmarks.ssd_scan import SsdCase

CHUNK = 64


def scale(inputs: Inputs) -> Inputs:
    """Step sizes and A in the range of trained models."""
    return inputs | {"delta": 0.1 * inputs["delta"].abs(), "A": -3 * inputs["A"].abs()}


def shape_of(batch: int, seqlen: int, head_dim: int, of_group: int, dstate: int, groups: int) -> Shape:
    return batch, seqlen, head_dim, of_group * groups, dstate, groups


def slack(dtype: torch.dtype) -> float:
    """Beside the reference, which rounds to the dtype at the end alone, scores and states are rounded before they are
    multiplied, and so are their gradients."""
    return torch.finfo(dtype).eps * {2: 2, 4: 16, 8: 16}[dtype.itemsize]


def starts_each_chunk_anew(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any) -> Any:
    """From the initial state, instead of from the state after the chunk before."""
    parts = [
        ssd_scan(*(t[:, a : a + CHUNK] for t in (x, delta)), A, *(t[:, a : a + CHUNK] for t in (B, C)), D, **rest)
        for a in range(0, x.shape[1], CHUNK)
    ]
    return torch.cat([p[0] for p in parts], 1), parts[-1][1]


def forgets_the_skip(D: Tensor, **inputs: Any) -> Any:
    return ssd_scan(D=0 * D, **inputs)


def mixes_up_the_heads(A: Tensor, **inputs: Any) -> Any:
    return ssd_scan(A=A.flip(0), **inputs)


def looks_one_step_back(B: Tensor, **inputs: Any) -> Any:
    return ssd_scan(B=B.roll(1, dims=1), **inputs)


CASE = OpCase(
    name="ssd_scan",
    kind=SsdCase,
    sizes=("head_dim", "heads", "dstate", "groups"),
    scale=scale,
    variants=({},),
    shapes=(
        (2, 65, 37, 3, 5, 1),  # no size divides anything
        (1, 63, 64, 2, 16, 1),
        (2, 64, 16, 4, 33, 2),
        (1, 200, 48, 6, 64, 3),
        (1, 130, 1, 2, 128, 2),
        (3, 1, 7, 4, 1, 4),  # one step, a group a head
        (1, 17, 100, 10, 3, 1),
    ),
    regimes=((20, 6, 5, 2), (64, 2, 16, 1)),
    little=(6, 4, 3, 2),
    small=(2, 2, 2, 1),
    empty=((0, 5, 4, 2, 3, 1), (2, 0, 4, 2, 3, 1), (2, 5, 0, 2, 3, 1), (2, 5, 4, 2, 0, 1)),
    any_shape=st.builds(
        shape_of,
        st.integers(1, 2),
        st.integers(1, 150),
        st.integers(1, 70),
        st.integers(1, 3),
        st.integers(1, 40),
        st.integers(1, 3),
    ),
    slack=slack,
    step_error={torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14},
    state_error=1e-2,
    refused=(4, 4, 3, 2),
    refusals=(
        ({"x": torch.zeros(2, 5, 4)}, r"x has shape \(2, 5, 4\); expected \(batch, seqlen, heads, head_dim\)"),
        ({"x": torch.zeros(2, 5, 4, 4, dtype=torch.int64)}, "x has dtype int64; it takes float32, bfloat16"),
        ({"delta": torch.zeros(2, 5, 3)}, r"delta has shape \(2, 5, 3\); expected \(2, 5, 4\)"),
        ({"delta": torch.zeros(2, 5, 4).half()}, "delta has dtype float16; with x in float32 it takes float32"),
        ({"A": torch.zeros(4, dtype=torch.float64)}, "A has dtype float64; .* it takes float32"),
        ({"A": torch.zeros(4, 3)}, r"A has shape \(4, 3\); expected \(4,\)"),
        ({"B": torch.zeros(2, 5, 3)}, r"B has shape \(2, 5, 3\); expected \(batch, seqlen, groups, dstate\)"),
        ({"C": torch.zeros(2, 5, 1, 3)}, r"C has shape \(2, 5, 1, 3\); expected \(2, 5, 2, 3\)"),
        ({n: torch.zeros(2, 5, 3, 3) for n in "BC"}, "B has 3 groups; expected a divisor of the 4 heads of x"),
        ({"D": torch.zeros(3)}, r"D has shape \(3,\); expected \(4,\)"),
        ({"D": torch.zeros(4, 3)}, r"D has shape \(4, 3\); expected \(4, 4\)"),
        ({"initial_state": torch.zeros(1, 4, 4, 3)}, r"initial_state has shape \(1, 4, 4, 3\); expected \(2, 4, 4, 3\)"),
    ),
    mutants=(starts_each_chunk_anew, forgets_the_skip, mixes_up_the_heads, looks_one_step_back),
)
