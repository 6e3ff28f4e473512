"""DeltaNet (Yang et al. 2024, arXiv 2406.06484) and gated DeltaNet (Yang et al. 2024, arXiv 2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models.layers.base import State, check_positive, softplus, wide
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.mamba import initial_step_bias
from madkernels.models.layers.mamba2 import A_RANGE
from madkernels.models.layers.matrix_state import MatrixStateLayer, recur
from madkernels.models.layers.norm import RMSNorm
from madkernels.models.layers.short_conv import ShortConv


class DeltaMixer(MatrixStateLayer):
    """What both share: the state is written what it gets wrong at a key, at a rate of a sigmoid. q, k and v go through a
    short convolution of `width` taps and SiLU, q and k to norm 1; heads are normed."""

    def __init__(self, dim: int, heads: int, width: int, *, expand: int = 1) -> None:
        super().__init__(dim, heads, expand=expand)
        check_positive(width=width)
        values = self.heads * self.value_dim
        self.qkv = Linear(dim, 2 * dim + values, bias=False)
        self.conv = ShortConv(2 * dim + values, width)
        self.rate = Linear(dim, self.heads, bias=False)
        self.norm = RMSNorm(self.value_dim, eps=1e-5)
        self.out = Linear(values, dim, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        mixed = self.conv(self.qkv(x), cu_seqlens, state)
        q, k, v = (self.split_heads(t) for t in mixed.split([self.dim, self.dim, self.heads * self.value_dim], -1))
        q, k = F.normalize(wide(q), dim=-1) * self.key_dim**-0.5, F.normalize(wide(k), dim=-1)
        rate = self.rate(x).sigmoid()
        y = recur(q, k, v, self.log_decay(x), rate, cu_seqlens=cu_seqlens, state=state)
        out: Tensor = self.out(self.read_out(self.norm(y.to(self.norm.weight.dtype)), x).flatten(2))
        return out

    def log_decay(self, x: Tensor) -> Tensor | None:
        """(batch, seqlen, heads, 1)."""
        raise NotImplementedError

    def read_out(self, y: Tensor, x: Tensor) -> Tensor:
        """What becomes of y (batch, seqlen, heads, value_dim) after its norm."""
        raise NotImplementedError

    def init_state(self, batch: int) -> State:
        return super().init_state(batch) | {"conv": self.conv.init_state(batch)}

    def flops(self, seqlen: int) -> int:
        """Twice each matrix parameter, the short convolution's taps among them, and for each element of the state a
        multiply-add to look up, to write and to read: as the recurrence is stated."""
        return super().flops(seqlen) + 2 * seqlen * self.state_size(seqlen)


class DeltaNet(DeltaMixer):
    """The delta rule, without decay or gate."""

    def __init__(self, dim: int, *, heads: int = 8, width: int = 4) -> None:
        super().__init__(dim, heads, width)

    def log_decay(self, x: Tensor) -> None:
        return None

    def read_out(self, y: Tensor, x: Tensor) -> Tensor:
        return y


class GatedDeltaNet(DeltaMixer):
    """Heads also decay, as in Mamba-2, and the output is gated by a SiLU; values are `expand` times as wide as keys."""

    def __init__(self, dim: int, *, heads: int = 8, expand: int = 2, width: int = 4) -> None:
        super().__init__(dim, heads, width, expand=expand)
        self.delta = Linear(dim, heads, bias=False)
        self.delta_bias = nn.Parameter(initial_step_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_RANGE).log())
        self.gate = Linear(dim, heads * self.value_dim, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        delta = softplus(wide(self.delta(x)) + wide(self.delta_bias))
        return (-wide(self.A_log).exp() * delta).unsqueeze(-1)

    def read_out(self, y: Tensor, x: Tensor) -> Tensor:
        return y * F.silu(self.split_heads(self.gate(x)))
