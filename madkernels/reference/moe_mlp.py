"""A mixture of experts, one expert after another.

    y_t = sum_k weights[t, k] (down_e act(gate_up_e x_t + gate_up_bias_e) + down_bias_e)

over the choices k of token t that have a row, with e the expert whose row it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madkernels.reference.activations import activate
from madkernels.reference.documents import document_bounds


def moe_mlp(
    x: Tensor,  # (tokens, dim)
    plan: Any,  # weights (tokens, top_k), offsets (experts + 1,), slots (tokens * top_k,)
    gate_up: Tensor,  # (experts, outputs, dim)
    down: Tensor,  # (experts, dim, hidden)
    *,
    activation: str | None = "swiglu",
    gate_up_bias: Tensor | None = None,  # (experts, outputs)
    down_bias: Tensor | None = None,  # (experts, dim)
) -> Tensor:
    """The meaning of :func:`madkernels.moe_mlp`; computes in the widest dtype of its inputs, at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first_bias = x.new_zeros(gate_up.shape[:2]) if gate_up_bias is None else gate_up_bias
    second_bias = x.new_zeros(down.shape[:2]) if down_bias is None else down_bias
    rows, weights, y = x.to(wide), plan.weights.to(wide).flatten(), torch.zeros_like(x, dtype=wide)
    matrices = (t.to(wide) for t in (gate_up, first_bias, down, second_bias))
    for (begin, end), first, b, second, c in zip(document_bounds(plan.offsets), *matrices, strict=True):
        slots = plan.slots[begin:end].long()
        tokens = slots // plan.weights.shape[1]
        out = activate(activation, rows[tokens] @ first.T + b) @ second.T + c
        y = y.index_add(0, tokens, weights[slots].unsqueeze(-1) * out)
    return y.to(x.dtype)
