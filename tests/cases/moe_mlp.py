"""moe_mlp, as the tests of all ops see it: experts with many tokens and with none, and choices that were dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import Inputs, OpCase, Options, Shape
from torch import Tensor

from madkernels.benchmarks.moe_mlp import MoeCase, Plan, plan_of
from madkernels.reference.activations import GATED


def plan_for(weights: Tensor, tokens: int, experts: int) -> Plan:
    """Some experts are asked often, some never; every seventh choice is dropped."""
    token, choice = torch.arange(tokens).unsqueeze(1), torch.arange(weights.shape[1])
    chosen = (token * token + choice) % max(experts, 1)
    chosen = torch.where((token + 2 * choice) % 7 == 3, experts, chosen)
    return plan_of(weights, chosen.to(weights.device), experts)


def adapt(function: Callable[..., Any]) -> Callable[..., Any]:
    """With a plan that follows from the shapes."""

    def call(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, **rest: Any) -> Any:
        return function(x, plan_for(weights, x.shape[0], gate_up.shape[0]), gate_up, down, **rest)

    return call


def further(inputs: Inputs, options: Options) -> Options:
    plan = plan_for(inputs["weights"], inputs["x"].shape[0], inputs["gate_up"].shape[0])
    return {"offsets": plan.offsets, "slots": plan.slots, "rows": plan.rows, "activation": options["activation"]}


def fit(inputs: Inputs, options: Options) -> Inputs:
    """Without a gate, half as many outputs."""
    if options["activation"] in GATED:
        return inputs
    hidden = inputs["down"].shape[2]
    return {k: t[:, :hidden] if k in ("gate_up", "gate_up_bias") else t for k, t in inputs.items()}


def scale(inputs: Inputs) -> Inputs:
    return inputs | {k: inputs[k] / max(inputs[k].shape[-1], 1) ** 0.5 for k in ("gate_up", "down")}


def slack(dtype: torch.dtype) -> float:
    """Beside the reference, which rounds to the dtype at the end alone, what lies between two products is rounded too; and
    the gradient of a single weight is a sum that may cancel."""
    return 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0


def shape_of(tokens: int, dim: int, hidden: int, top_k: int, others: int) -> Shape:
    return 1, tokens, dim, hidden, top_k + others, top_k


def forgets_the_weights(weights: Tensor, **inputs: Any) -> Any:
    return CASE.function(weights=0 * weights + 1, **inputs)


def asks_the_next_expert(down: Tensor, **inputs: Any) -> Any:
    return CASE.function(down=down.roll(1, 0), **inputs)


def takes_the_first_choice_alone(weights: Tensor, **inputs: Any) -> Any:
    first = torch.arange(weights.shape[1], device=weights.device) == 0
    return CASE.function(weights=torch.where(first, weights, 0), **inputs)


CASE = OpCase(
    name="moe_mlp",
    kind=MoeCase,
    sizes=("dim", "hidden", "experts", "top_k"),
    derived=lambda sizes: {"outputs": 2 * sizes["hidden"]},
    adapt=adapt,
    further=further,
    scale=scale,
    fit=fit,
    variants=(
        {"activation": "swiglu"},
        {"activation": "relu2"},
        {"activation": "geglu"},
        {"activation": None},
        {"activation": "gelu"},
        {"activation": "reglu"},
        {"activation": "silu"},
        {"activation": "relu"},
    ),
    has_second=lambda options: False,
    offsets=(),
    shapes=(
        (1, 1, 1, 1, 1, 1),
        (1, 40, 7, 3, 3, 2),
        (2, 65, 40, 24, 4, 4),  # every expert
        (1, 300, 129, 48, 2, 1),
        (1, 600, 16, 51, 1, 1),  # more rows than a part has
        (1, 50, 1000, 20, 5, 3),
        (1, 50, 30, 5, 310, 3),
        (3, 16, 48, 65, 5, 2),
    ),
    regimes=((20, 24, 3, 2), (129, 20, 40, 4)),
    little=(6, 5, 3, 2),
    small=(3, 2, 3, 2),
    empty=((0, 5, 4, 3, 2, 1), (1, 5, 4, 3, 2, 0), (1, 5, 0, 3, 2, 1), (1, 5, 4, 0, 2, 1), (0, 0, 0, 0, 0, 0)),
    any_shape=st.builds(
        shape_of, st.integers(1, 90), st.integers(1, 70), st.integers(1, 60), st.integers(1, 4), st.integers(0, 6)
    ),
    slack=slack,
    refused=(4, 3, 2, 2),
    refusals=(
        ({"x": torch.zeros(10, 5, 4)}, r"x has shape \(10, 5, 4\); expected \(tokens, dim\)"),
        ({"x": torch.zeros(10, 4, dtype=torch.int32)}, "x has dtype int32; it takes float32, bfloat16"),
        ({"weights": torch.zeros(9, 2)}, r"weights has shape \(9, 2\); expected \(10, 2\)"),
        ({"weights": torch.zeros(10, 2).half()}, "weights has dtype float16; with x in float32 it takes float32"),
        ({"gate_up": torch.zeros(2, 6, 5)}, r"gate_up has shape \(2, 6, 5\); expected \(2, 6, 4\)"),
        ({"gate_up": torch.zeros(2, 5, 4)}, "gate_up has 5 outputs; a gated activation takes two halves"),
        ({"down": torch.zeros(2, 4, 4)}, r"down has shape \(2, 4, 4\); expected \(2, 4, 3\)"),
        ({"gate_up_bias": torch.zeros(2, 5)}, r"gate_up_bias has shape \(2, 5\); expected \(2, 6\)"),
        ({"down_bias": torch.zeros(2, 4).half()}, "down_bias has dtype float16"),
    ),
    mutants=(forgets_the_weights, asks_the_next_expert, takes_the_first_choice_alone),
)  # fmt: skip
