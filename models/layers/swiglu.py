"""Gated channel mixer (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from madkernels import glu
from madkernels.models.layers.base import Layer, State, check_positive
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.norm import by_op


class SwiGLU(Layer):
    """down(silu(gate x) * up x).

    Args:
        hidden: width between; 0: 8/3 of dim, rounded up to a multiple of 16.
        bias: whether the projections have one.
    """

    mixes = "channel"
    hidden_option = "hidden"
    packs_states = True

    def __init__(self, dim: int, *, hidden: int = 0, bias: bool = False) -> None:
        super().__init__(dim)
        self.hidden = hidden or -(-8 * dim // 3 // 16) * 16
        check_positive(hidden=self.hidden)
        self.gate_up = Linear(dim, 2 * self.hidden, bias=bias)
        self.down = Linear(self.hidden, dim, bias=bias)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        y: Tensor = self.down(gated(self.gate_up(x)))
        return y

    def flops(self, seqlen: int) -> int:
        """6 L D F."""
        return 6 * seqlen * self.dim * self.hidden


def gated(h: Tensor) -> Tensor:
    """silu(gate) * up, of h (..., 2 hidden) in which gate and up lie side by side."""
    if by_op(h):
        return glu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up
