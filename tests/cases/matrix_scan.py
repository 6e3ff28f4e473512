"""matrix_scan, as the tests of all ops see it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import Inputs, OpCase, Shape
from torch import Tensor

from madkernels import matrix_scan
from madkernels.benchmarks.matrix_scan import MatrixCase

CHUNK = 32


def scale(inputs: Inputs) -> Inputs:
    """Decays below 1, rates in 0 to 1, and keys so short that the delta rule is stable."""
    keys = inputs["k"] / max(inputs["k"].shape[-1], 1) ** 0.5
    return inputs | {"k": keys, "log_decay": -0.2 * inputs["log_decay"].abs(), "beta": inputs["beta"].sigmoid()}


def shape_of(batch: int, seqlen: int, value_dim: int, groups: int, of_group: int, key_dim: int, vector: bool) -> Shape:
    return batch, seqlen, value_dim, groups, of_group * groups, key_dim, key_dim if vector else 1


def starts_each_chunk_anew(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, **rest: Any) -> Any:
    """From the initial state, instead of from the state after the chunk before."""
    parts = [
        matrix_scan(*(t[:, a : a + CHUNK] for t in (q, k, v, log_decay, beta)), **rest) for a in range(0, q.shape[1], CHUNK)
    ]
    return torch.cat([p[0] for p in parts], 1), parts[-1][1]


def forgets_the_bonus(bonus: Tensor, **inputs: Any) -> Any:
    return matrix_scan(bonus=0 * bonus, **inputs)


def does_not_decay(log_decay: Tensor, **inputs: Any) -> Any:
    return matrix_scan(log_decay=0 * log_decay, **inputs)


def writes_the_whole_error(beta: Tensor, **inputs: Any) -> Any:
    return matrix_scan(beta=torch.ones_like(beta) + 0 * beta, **inputs)


def mixes_up_the_keys(k: Tensor, **inputs: Any) -> Any:
    return matrix_scan(k=k.flip(-1), **inputs)


CASE = OpCase(
    name="matrix_scan",
    kind=MatrixCase,
    sizes=("value_dim", "groups", "heads", "key_dim", "decay_dim"),
    scale=scale,
    variants=({},),
    shapes=(
        (2, 65, 7, 1, 3, 5, 5),  # no size divides anything
        (1, 31, 16, 4, 4, 16, 16),
        (2, 32, 33, 2, 4, 32, 1),
        (1, 50, 130, 1, 2, 20, 20),  # three blocks of values
        (1, 33, 64, 2, 2, 128, 1),
        (3, 1, 1, 2, 4, 1, 1),  # one step
        (1, 17, 5, 3, 3, 130, 130),
    ),
    regimes=((20, 2, 4, 16, 16), (70, 1, 2, 37, 1)),
    little=(6, 1, 2, 4, 4),
    small=(3, 1, 2, 2, 2),
    empty=(
        (0, 5, 4, 2, 2, 3, 3),
        (2, 0, 4, 2, 2, 3, 3),
        (2, 5, 0, 2, 2, 3, 3),
        (2, 5, 4, 2, 2, 0, 0),
        (2, 5, 4, 2, 0, 3, 1),
    ),
    any_shape=st.builds(
        shape_of,
        st.integers(1, 2),
        st.integers(1, 70),
        st.integers(1, 70),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 70),
        st.booleans(),
    ),
    step_error={torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14},
    state_error=1e-6,
    refused=(4, 2, 4, 3, 3),
    refusals=(
        ({"q": torch.zeros(2, 5, 4)}, r"q has shape \(2, 5, 4\); expected \(batch, seqlen, groups, key_dim\)"),
        ({"q": torch.zeros(2, 5, 2, 3, dtype=torch.int64)}, "q has dtype int64; it takes float32, bfloat16"),
        ({"k": torch.zeros(2, 5, 1, 3)}, r"k has shape \(2, 5, 1, 3\); expected \(2, 5, 2, 3\)"),
        ({"v": torch.zeros(2, 5, 4)}, r"v has shape \(2, 5, 4\); expected \(batch, seqlen, heads, value_dim\)"),
        ({"v": torch.zeros(2, 5, 4, 4).half()}, "v has dtype float16; with q in float32 it takes float32"),
        ({n: torch.zeros(2, 5, 3, 3) for n in "qk"}, "q has 3 heads; expected a divisor of the 4 heads of v"),
        ({"log_decay": torch.zeros(2, 5, 4, 2)}, r"log_decay has shape \(2, 5, 4, 2\); expected \(2, 5, 4, 3\)"),
        ({"log_decay": torch.zeros(2, 5, 4, 3).half()}, "log_decay has dtype float16; with q in float32 it takes float32"),
        ({"beta": torch.zeros(2, 5, 4, 1)}, r"beta has shape \(2, 5, 4, 1\); expected \(2, 5, 4\)"),
        ({"bonus": torch.zeros(3)}, r"bonus has shape \(3,\); expected \(4, 3\)"),
        ({"initial_state": torch.zeros(1, 4, 3, 4)}, r"initial_state has shape \(1, 4, 3, 4\); expected \(2, 4, 3, 4\)"),
    ),
    mutants=(starts_each_chunk_anew, forgets_the_bonus, does_not_decay, writes_the_whole_error, mixes_up_the_keys),
)
