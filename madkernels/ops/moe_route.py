"""Routing of tokens to experts, and the way there and back: public functions, and shapes and gradients for torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from madkernels.ops.registration import (
    keep_under_recomputation,
    register_derivatives,
    register_gradient,
    register_vmap_one_by_one,
)
from madkernels.reference.moe_route import (
    RoutingPlan as RoutingPlan,
    combine,
    dispatch,
    dot,
    is_sigmoid,
    jittered,
    plan_of,
    route,
)

_route = torch.ops.madkernels.moe_route.default
_dispatch = torch.ops.madkernels.moe_dispatch.default
_combine = torch.ops.madkernels.moe_combine.default
_dot = torch.ops.madkernels.moe_dot.default


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    capacity: int | None = None,
    jitter: float = 0.0,
) -> RoutingPlan:
    """Chooses the experts of each token, and sorts (token, k) pairs by expert.

    A token's scores are a softmax over all experts, or sigmoids. It chooses the `top_k` highest; of equals the lowest expert
    first, and NaN as the highest. Nothing waits for the device, and the same logits give the same bits. Differentiable in
    `logits`, to any order (second derivatives go through the reference), in forward mode too.

    Args:
        logits: (tokens, experts); float32, bfloat16, float16 or float64. Computed in float32 (float64 with float64).
        top_k: experts of a token, 1 to all.
        score: "softmax", as in Mixtral (arXiv 2401.04088), or "sigmoid", as in DeepSeek-V3 (arXiv 2412.19437).
        renormalize: weights are divided by their sum over the chosen.
        bias: (experts,) float32 (float64 with float64), added to the scores for choosing, not to the weights: balance
            without a loss (arXiv 2408.15664). Without gradient.
        groups: (n, m): experts are in n groups of neighbours, and a token chooses among those of the m groups whose two
            highest scores, bias included, have the highest sum (DeepSeek-V3).
        capacity: the most tokens that an expert takes: its first, in the order of tokens. The others' pairs are dropped. No
            limit, if absent.
        jitter: each logit is multiplied by a random number between 1 - jitter and 1 + jitter first, from torch's generator.

    Returns:
        A :class:`RoutingPlan`.

    Raises:
        RuntimeError: a shape, dtype, device or number that does not fit; the message names the argument.
        ValueError: an unknown score, or a jitter below 0.
    """
    sigmoid = is_sigmoid(score)
    found = _route(jittered(logits, jitter), bias, top_k, sigmoid, renormalize, *(groups or (1, 1)), capacity)
    return plan_of(*found, drops=capacity is not None)


def moe_dispatch(x: Tensor, plan: RoutingPlan) -> Tensor:
    """Tokens into the rows of a plan.

    Args:
        x: (tokens, dim); float32, bfloat16, float16 or float64.
        plan: of :func:`moe_route`.

    Returns:
        (tokens * top_k, dim), dtype of `x`: row r is the token of ``plan.slots[r]``; rows from ``plan.offsets[-1]`` on are
        0. Differentiable in `x`, to any order.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    out: Tensor = _dispatch(x, None, plan.slots, plan.rows)
    return out


def moe_combine(y: Tensor, plan: RoutingPlan) -> Tensor:
    """The weighted sum of what its experts say of each token, in the order of k; dropped pairs add nothing.

    Args:
        y: (tokens * top_k, dim), in rows of the plan; float32, bfloat16, float16 or float64. Rows from
            ``plan.offsets[-1]`` on are not read.
        plan: of :func:`moe_route`, from logits of float64 where `y` is float64, else of another dtype.

    Returns:
        (tokens, dim), dtype of `y`; summed in float32 (float64 with float64). Differentiable in `y` and the plan's weights,
        to any order.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    out: Tensor = _combine(y, plan.weights, plan.slots, plan.rows)
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.register_fake("madkernels::moe_route")
def _route_fake(logits: Tensor, bias: Tensor | None, top_k: int, *options: Any) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    wide = _wide(logits.dtype)
    shapes = (tokens, top_k), (experts,), (experts + 1,), (tokens * top_k,), (tokens, top_k)
    indices = [logits.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return logits.new_empty(tokens, top_k, dtype=wide), logits.new_empty(experts + 1, dtype=wide), *indices


@torch.library.register_fake("madkernels::moe_route_backward")
def _route_backward_fake(dweights: Tensor, daux: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("madkernels::moe_dispatch")
def _dispatch_fake(x: Tensor, weights: Tensor | None, slots: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0] * rows.shape[1], x.shape[1])


@torch.library.register_fake("madkernels::moe_combine")
def _combine_fake(y: Tensor, weights: Tensor | None, slots: Tensor, rows: Tensor) -> Tensor:
    return y.new_empty(rows.shape[0], y.shape[1])


@torch.library.register_fake("madkernels::moe_dot")
def _dot_fake(x: Tensor, y: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.shape, dtype=_wide(x.dtype))


# Each of dispatch, combine and dot is linear in its first two arguments, and their gradients are one another: so there are
# derivatives of any order, and all by kernels.
Gradients = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def _dispatch_gradients(
    dout: Tensor, x: Tensor, weights: Tensor | None, slots: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor | None]:
    return _combine(dout, weights, slots, rows), None if weights is None else _dot(x, dout, slots, rows)


def _combine_gradients(
    dout: Tensor, y: Tensor, weights: Tensor | None, slots: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor | None]:
    return _dispatch(dout, weights, slots, rows), None if weights is None else _dot(dout, y, slots, rows)


def _dot_gradients(dout: Tensor, x: Tensor, y: Tensor | None, slots: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    return _combine(y, dout, slots, rows), _dispatch(x, dout, slots, rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _register_linear(name: str, gradients: Gradients, by_reference: Callable[..., Tensor]) -> None:
    def gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(dout, *ctx.saved_tensors), None, None

    register_gradient(name, gradient, _save, by_reference)


def _by_reference(
    logits: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, renormalize: bool, groups: int, top_groups: int,
    capacity: int | None,
) -> Sequence[Tensor]:  # fmt: skip
    return tuple(route(logits, bias, top_k, sigmoid, renormalize, groups, top_groups, capacity))


register_derivatives("madkernels::moe_route", ("logits",), _by_reference)
_register_linear("madkernels::moe_dispatch", _dispatch_gradients, dispatch)
_register_linear("madkernels::moe_combine", _combine_gradients, combine)
_register_linear("madkernels::moe_dot", _dot_gradients, dot)
keep_under_recomputation("madkernels::moe_route")
for _name in ("moe_route", "moe_dispatch", "moe_combine", "moe_dot"):
    register_vmap_one_by_one(f"madkernels::{_name}")
