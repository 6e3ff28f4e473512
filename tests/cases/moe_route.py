"""moe_route, as the tests of all ops see it: the weights, and the means that its losses are made of.

What goes where, and rows to experts and back, is in tests/test_moe_route.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import OpCase
from torch import Tensor

from madkernels import RoutingPlan, moe_route
from madkernels.benchmarks.moe_route import RouteCase

Function = Callable[..., RoutingPlan]


def bias_of(logits: Tensor) -> Tensor:
    """Of either sign, larger than most differences of scores, and different for every expert."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.linspace(-0.31, 0.27, logits.shape[1], dtype=wide, device=logits.device).flip(0)


def in_tensors(function: Function) -> Callable[..., Any]:
    """The function, with its results in one or two tensors; `top_k` is cut to what there is."""

    def call(logits: Tensor, *, top_k: int, biased: bool = False, return_means: bool = False, **options: Any) -> Any:
        top_k = min(top_k, logits.shape[-1]) if logits.dim() == 2 else top_k
        plan = function(logits, top_k, **options, **({"bias": bias_of(logits)} if biased else {}))
        means = torch.cat([plan.mean_probs, plan.z_loss.unsqueeze(0)])
        return (plan.weights, means) if return_means else plan.weights

    return call


def forgets_to_renormalize(logits: Tensor, top_k: int, **options: Any) -> RoutingPlan:
    return moe_route(logits, top_k, **options | {"renormalize": False})


def takes_the_next_experts(logits: Tensor, top_k: int, **options: Any) -> RoutingPlan:
    plan = moe_route(logits, top_k + 1, **options)
    return plan._replace(weights=plan.weights[:, 1:])


def forgets_the_gradient_of_means(logits: Tensor, top_k: int, **options: Any) -> RoutingPlan:
    plan = moe_route(logits, top_k, **options)
    return plan._replace(mean_probs=plan.mean_probs.detach(), z_loss=plan.z_loss.detach())


CASE = OpCase(
    name="moe_route",
    kind=RouteCase,
    sizes=("experts",),
    adapt=in_tensors,
    further=lambda inputs, options: {"top_k": options["top_k"], "groups": 1, "top_groups": 1},
    variants=(
        {"top_k": 2},
        {"top_k": 3, "score": "sigmoid"},
        {"top_k": 5, "renormalize": False, "capacity": 7, "biased": True},
        {"top_k": 2, "score": "sigmoid", "renormalize": False, "groups": (1, 1)},
        {"top_k": 9, "biased": True},
    ),
    second="return_means",
    offsets=(),
    keeps_dtype=True,
    shapes=((2, 65, 37), (1, 1, 1), (1, 33, 16), (3, 7, 128), (1, 31, 129), (1, 64, 8), (1, 20, 1000), (5, 26, 3)),
    regimes=((8,), (200,)),
    little=(6,),
    small=(3,),
    empty=((0, 5, 4), (2, 0, 1)),
    any_shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 300)),
    refused=(4,),
    refusals=(
        ({"logits": torch.zeros(5)}, r"logits has shape \(5,\); expected \(tokens, experts\) with 1 expert at least"),
        ({"logits": torch.zeros(10, 0)}, r"logits has shape \(10, 0\); expected \(tokens, experts\)"),
        ({"logits": torch.zeros(10, 4, dtype=torch.int32)}, "logits has dtype int32; it takes float32, bfloat16"),
    ),
    mutants=tuple(in_tensors(f) for f in (forgets_to_renormalize, takes_the_next_experts, forgets_the_gradient_of_means)),
)
