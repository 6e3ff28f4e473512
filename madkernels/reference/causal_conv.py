"""Short causal depthwise convolution, tap by tap.

    out[t, d] = activation(bias[d] + sum_j weight[d, j] x[t - (width - 1) + j, d])

What lies before a sequence is its initial state (its last width - 1 inputs), or zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels.reference.activations import silu
from madkernels.reference.documents import document_bounds


def causal_conv(
    x: Tensor,  # (batch, seqlen, dim)
    weight: Tensor,  # (dim, width)
    bias: Tensor | None = None,  # (dim,)
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,  # (batch, width - 1, dim), or (num_docs, width - 1, dim) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (num_docs + 1,)
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of :func:`madkernels.causal_conv`; computes in the widest dtype of its inputs, at least float32."""
    width = weight.shape[1]
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (begin, end) in enumerate(document_bounds(cu_seqlens)):
            out, state = causal_conv(
                x[:, begin:end], weight, bias, activation=activation,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                return_final_state=True,
            )  # fmt: skip
            outs.append(out)
            states.append(state)
        packed = torch.cat(outs, dim=1) if outs else torch.zeros_like(x)
        final = torch.cat(states) if states else x.new_zeros(0, width - 1, x.shape[2])
        return (packed, final) if return_final_state else packed

    batch, seqlen, dim = x.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    before = x.new_zeros(batch, width - 1, dim) if initial_state is None else initial_state
    history = torch.cat([before, x], dim=1)
    out = torch.zeros_like(x, dtype=dtype)
    for tap in range(width):
        out = out + history[:, tap : tap + seqlen].to(dtype) * weight[:, tap].to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    if activation == "silu":
        out = silu(out)
    out = out.to(x.dtype)
    return (out, history[:, seqlen:].clone()) if return_final_state else out


def causal_conv_step(
    state: Tensor,  # (batch, width - 1, dim), updated in place
    x: Tensor,  # (batch, dim)
    weight: Tensor,  # (dim, width)
    bias: Tensor | None = None,  # (dim,)
    *,
    activation: str | None = None,
) -> Tensor:
    """The meaning of :func:`madkernels.causal_conv_step`."""
    out, final = causal_conv(
        x.unsqueeze(1), weight, bias, activation=activation, initial_state=state, return_final_state=True
    )
    state.copy_(final)
    return out.squeeze(1)
