"""selective_scan, as the tests of all ops see it."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import backends
import torch
from hypothesis import strategies as st
from op_cases import Inputs, OpCase, Options, Shape
from torch import Tensor

from madkernels import selective_scan
from madkernels.benchmarks.selective_scan import ScanCase
from madkernels.ops.selective_scan import CHUNK


def scale(inputs: Inputs) -> Inputs:
    """A in the range of trained models."""
    return inputs | {"A": -1.5 * inputs["A"].abs()}


def fit(inputs: Inputs, options: Options) -> Inputs:
    """Without softplus, step sizes are small and positive as they are."""
    if options.get("delta_softplus"):
        return inputs
    return {k: t.abs() * 0.1 if k == "delta" else t for k, t in inputs.items() if k != "delta_bias"}


def shape_of(batch: int, seqlen: int, channels: int, dstate: int, groups: int) -> Shape:
    return batch, seqlen, channels * groups, dstate, groups


# The 2^x of a GPU may be wrong in one direction on average, and a state adds its errors up over the steps that it remembers:
# with a mean error put into it, the results of these tests were wrong by up to 48 times as much.
EXP2_ERRORS = 64


@cache
def mean_error_of_exp2() -> float:
    """Relative, over [-1, 0], as a state of the scan shows it after one step with nothing added."""
    device = backends.device()
    A = -torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).to(device) / math.log2(math.e)
    row, projection = torch.ones(1, 1, 64, device=device), torch.zeros(1, 1, 64, device=device)
    options = {"initial_state": torch.ones(1, 64, 64, device=device), "return_final_state": True}
    _, state = selective_scan(row, row, A, projection, projection, **options)
    exact = torch.exp2((A * torch.tensor(math.log2(math.e), device=device)).double())
    return float((state[0].double() / exact - 1).mean())


def slack(dtype: torch.dtype) -> float:
    return EXP2_ERRORS * abs(mean_error_of_exp2()) if backends.device().type == "cuda" else 0.0


def starts_each_chunk_anew(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Any:
    """From the initial state, instead of from the state after the chunk before."""
    parts = [
        selective_scan(*(t[:, a : a + CHUNK] if t.dim() > 2 else t for t in (u, delta, A, B, C)),
                       **{k: v[:, a : a + CHUNK] if k == "z" else v for k, v in rest.items()})
        for a in range(0, u.shape[1], CHUNK)
    ]  # fmt: skip
    return torch.cat([p[0] for p in parts], 1), parts[-1][1]


def forgets_softplus(**inputs: Any) -> Any:
    return selective_scan(**inputs | {"delta_softplus": False})


def looks_one_step_back(**inputs: Any) -> Any:
    return selective_scan(**inputs | {"B": inputs["B"].roll(1, dims=1)})


CASE = OpCase(
    name="selective_scan",
    kind=ScanCase,
    sizes=("dim", "dstate", "groups"),
    scale=scale,
    fit=fit,
    variants=({"delta_softplus": True}, {"delta_softplus": False}),
    shapes=(
        (2, 65, 37, 5, 1),  # no size divides anything
        (1, 31, 64, 16, 1),
        (2, 32, 16, 16, 2),
        (1, 33, 130, 4, 1),  # one channel block and two channels
        (3, 1, 7, 1, 7),  # one step, a group a channel
        (1, 130, 96, 21, 3),
        (2, 63, 1, 64, 1),
    ),
    regimes=((20, 6, 2), (13, 16, 1)),  # states in turns, and the number that has kernels of its own
    little=(6, 4, 1),
    small=(2, 2, 1),
    empty=((0, 5, 4, 2, 1), (2, 0, 4, 2, 1), (2, 5, 0, 2, 1), (2, 5, 4, 0, 1)),
    any_shape=st.builds(
        shape_of, st.integers(1, 3), st.integers(1, 80), st.integers(1, 40), st.integers(1, 20), st.integers(1, 3)
    ),
    slack=slack,
    step_error=dict.fromkeys((torch.bfloat16, torch.float16, torch.float32, torch.float64), 1e-6),
    state_error=1e-6,
    refused=(4, 3, 1),
    refusals=(
        ({"u": torch.zeros(2, 5)}, r"u has shape \(2, 5\); expected \(batch, seqlen, dim\)"),
        ({"u": torch.zeros(2, 5, 4, dtype=torch.int64)}, "u has dtype int64; it takes float32, bfloat16"),
        ({"delta": torch.zeros(2, 6, 4)}, r"delta has shape \(2, 6, 4\); expected \(2, 5, 4\)"),
        ({"delta": torch.zeros(2, 5, 4, dtype=torch.bfloat16)}, "delta has dtype bfloat16; .* it takes float32"),
        ({"A": torch.zeros(4, 3, dtype=torch.float64)}, "A has dtype float64; .* it takes float32"),
        ({"A": torch.zeros(3)}, r"A has shape \(3,\); expected \(dim, dstate\)"),
        ({"B": torch.zeros(2, 5, 3, 3)}, r"C has shape \(2, 5, 1, 3\); expected \(2, 5, 3, 3\)"),
        ({"B": torch.zeros(2, 5, 3, 3), "C": torch.zeros(2, 5, 3, 3)}, "B has 3 groups; expected a divisor of dim, 4"),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\); expected \(4,\)"),
        ({"z": torch.zeros(2, 5, 5)}, r"z has shape \(2, 5, 5\)"),
        ({"initial_state": torch.zeros(1, 4, 3)}, r"initial_state has shape \(1, 4, 3\); expected \(2, 4, 3\)"),
    ),
    mutants=(starts_each_chunk_anew, forgets_softplus, looks_one_step_back),
)
