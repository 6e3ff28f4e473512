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
    weights = plan.weights.to(wide).flatten()
    y = torch.zeros_like(x, dtype=wide)
    for expert, (begin, end) in enumerate(document_bounds(plan.offsets)):
        slots = plan.slots[begin:end].long()
        tokens = slots // plan.weights.shape[1]
        h = x.to(wide)[tokens] @ gate_up[expert].to(wide).T
        if gate_up_bias is not None:
            h = h + gate_up_bias[expert].to(wide)
        out = activate(activation, h) @ down[expert].to(wide).T
        if down_bias is not None:
            out = out + down_bias[expert].to(wide)
        y = y.index_add(0, tokens, weights[slots].unsqueeze(-1) * out)
    return y.to(x.dtype)
