"""Gated linear units (Shazeer 2020, arXiv 2002.05202).

y = act(h[: dim]) h[dim :]
"""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels.reference.activations import activate


def glu(h: Tensor, activation: str = "swiglu") -> Tensor:
    """The meaning of :func:`madkernels.glu`, of h (..., 2 dim); computes in float32 at least."""
    return activate(activation, h.to(torch.promote_types(h.dtype, torch.float32))).to(h.dtype)
