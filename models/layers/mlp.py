"""Plain two-layer channel mixer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from madkernels.models.layers.base import Layer, State, check_positive
from madkernels.models.layers.linear import Linear


class MLP(Layer):
    """Linear, GELU (tanh form), linear; no biases. `expand`: hidden width over dim."""

    mixes = "channel"
    packs_states = True

    def __init__(self, dim: int, *, expand: int = 4) -> None:
        super().__init__(dim)
        check_positive(expand=expand)
        self.up = Linear(dim, expand * dim, bias=False)
        self.down = Linear(expand * dim, dim, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        y: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return y

    def flops(self, seqlen: int) -> int:
        """4 L D F."""
        return 4 * seqlen * self.dim * self.up.out_features
