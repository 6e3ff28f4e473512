"""RMSNorm, with an optional gate before it.

a = x silu(gate), or x;    y = weight a / sqrt(mean(a^2) + eps)
"""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels.reference.activations import silu


def rms_norm(
    x: Tensor,  # (..., dim)
    weight: Tensor,  # (dim,)
    *,
    eps: float = 1e-5,
    gate: Tensor | None = None,  # (..., dim)
) -> Tensor:
    """The meaning of :func:`madkernels.rms_norm`; computes in the widest dtype of its inputs, at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a = x.to(wide) if gate is None else x.to(wide) * silu(gate.to(wide))
    return (weight.to(wide) * a * torch.rsqrt((a * a).mean(-1, keepdim=True) + eps)).to(x.dtype)
