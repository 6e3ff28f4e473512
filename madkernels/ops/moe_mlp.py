"""A mixture of experts, each an MLP, over a plan of which token goes where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from madkernels import reference
from madkernels.ops.registration import (
    keep_under_recomputation,
    needs_gradient,
    register_autocast,
    register_derivatives,
    register_vmap_one_by_one,
)

_forward = torch.ops.madkernels.moe_mlp.default


class Plan(Protocol):
    """Which token goes to which expert, and with what weight. Row r is of slot slots[r]: of choice slot % top_k of token
    slot // top_k."""

    @property
    def weights(self) -> Tensor:
        """(tokens, top_k), float32 (float64 with float64)."""
        ...

    @property
    def offsets(self) -> Tensor:
        """int32 (experts + 1,), rising: the rows of expert e are offsets[e] to offsets[e + 1] - 1."""
        ...

    @property
    def slots(self) -> Tensor:
        """int32 (tokens * top_k,): of each row; -1 behind the last."""
        ...

    @property
    def rows(self) -> Tensor:
        """int32 (tokens, top_k): the row of each slot, -1 where it has none."""
        ...


def moe_mlp(
    x: Tensor,
    plan: Plan,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str | None = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """A sparse mixture of experts (Shazeer et al. 2017, arXiv 1701.06538), each an MLP of two products.

    For token t and its choices k, of expert e each::

        h = gate_up[e] x_t + gate_up_bias[e]
        y_t = sum_k plan.weights[t, k] (down[e] act(h) + down_bias[e])

    A choice without a row, which the plan dropped, adds nothing. Differentiable in x, the plan's weights and all matrices
    and biases, to any order (second derivatives go through the reference), in forward mode too. The backward takes x and h
    alone: outputs of experts are not kept (SonicMoE: Guo et al. 2025, arXiv 2512.14080). Deterministic, whatever the number
    of threads.

    Args:
        x: (tokens, dim). float32, bfloat16, float16, or float64.
        plan: which token goes where; of its weights, that are not rounded to the dtype of `x`, a gradient is given.
        gate_up: (experts, outputs, dim), each as of torch.nn.Linear; dtype of `x`. Outputs are hidden, or 2 hidden of a
            gated activation, the gate before what it multiplies.
        down: (experts, dim, hidden), likewise.
        activation: as of :func:`grouped_gemm`.
        gate_up_bias: (experts, outputs), dtype of `x`.
        down_bias: (experts, dim), dtype of `x`.

    Returns:
        y (tokens, dim), dtype of `x`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or a plan that contradicts itself; the message names the
            argument.
    """
    weights, slots, rows, offsets = plan.weights, plan.slots, plan.rows, plan.offsets
    y: Tensor = _forward_and_keep(
        x, weights, slots, rows, offsets, gate_up, down, gate_up_bias, down_bias, activation, False
    )[0]  # fmt: skip
    return y


def _forward_and_keep(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Keeps h where a backward may follow; under vmap too, where only the rule can see whether it does."""
    found: tuple[Tensor, Tensor] = _forward(*arguments[:-1], arguments[-1] or needs_gradient(*arguments))
    return found


@torch.library.register_fake("madkernels::moe_mlp")
def _forward_fake(
    x: Tensor, weights: Tensor, slots: Tensor, rows: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str | None, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = x.new_empty(slots.shape[0], gate_up.shape[1]) if keep else x.new_empty(0)
    return x.new_empty(x.shape), h


@torch.library.register_fake("madkernels::moe_mlp_backward")
def _backward_fake(
    dy: Tensor, x: Tensor, weights: Tensor, slots: Tensor, rows: Tensor, offsets: Tensor, gate_up: Tensor,
    down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty(weights.shape, dtype=wide),
        x.new_empty(gate_up.shape),
        x.new_empty(down.shape),
        x.new_empty(0 if gate_up_bias is None else gate_up_bias.shape),
        x.new_empty(0 if down_bias is None else down_bias.shape),
    )


# FLOPs as if every choice had a row: how many do is known to the values of the plan alone.
@register_flop_formula(torch.ops.madkernels.moe_mlp)
def _forward_flops(
    x: Any, weights: Any, slots: Sequence[int], rows: Any, offsets: Any, gate_up: Sequence[int], down: Sequence[int],
    *rest: Any, **options: Any,
) -> int:  # fmt: skip
    return 2 * slots[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.madkernels.moe_mlp_backward)
def _backward_flops(dy: Any, *arguments: Any, **options: Any) -> int:
    return 2 * _forward_flops(*arguments)


class _Given:
    """A plan of the tensors that the op was given."""

    def __init__(self, weights: Tensor, slots: Tensor, rows: Tensor, offsets: Tensor) -> None:
        self.weights, self.slots, self.rows, self.offsets = weights, slots, rows, offsets


def _by_reference(
    x: Tensor, weights: Tensor, slots: Tensor, rows: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str | None, keep: bool = False,
) -> Sequence[Tensor]:  # fmt: skip
    options: dict[str, Any] = {"activation": activation, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    plan = _Given(weights, slots, rows, offsets)
    return reference.moe_mlp(x, plan, gate_up, down, **options), x.new_empty(0)  # its gradients need no h


_DIFFERENTIABLE = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
register_derivatives("madkernels::moe_mlp", _DIFFERENTIABLE, _by_reference, only_kept=("h",))
register_autocast("madkernels::moe_mlp", activations=("x", "gate_up", "down", "gate_up_bias", "down_bias"))
register_vmap_one_by_one("madkernels::moe_mlp", op=_forward_and_keep)
keep_under_recomputation("madkernels::moe_mlp")
