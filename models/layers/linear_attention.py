"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) and gated linear attention (Yang et al. 2023, arXiv
2312.06635)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models.layers import ssd
from madkernels.models.layers.base import State, check_positive, wide
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.matrix_state import MatrixStateLayer, recur
from madkernels.models.layers.norm import RMSNorm

GATE_DIVISOR = 16  # of the logarithm of the forget gate, so that it starts near 1


class FeatureMap(nn.Module):
    """The product of two linear maps of a head's channels, shared by all heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.left, self.right = Linear(dim, dim), Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(x) * self.right(x)
        return y


class LinearAttention(MatrixStateLayer):
    """``y[t] = sum_s (q[t] k[s]) v[s] / sum_s (q[t] k[s])`` with learned feature maps for q and k.

    Args:
        heads: of dim / heads channels.
        normalise: whether to divide by the sum, as published. The features have no sign, so the sum may come near zero and
            the output grow without bound; without it the output grows with the length.
    """

    def __init__(self, dim: int, *, heads: int = 16, normalise: bool = True) -> None:
        super().__init__(dim, heads)
        self.normalise = normalise
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_features, self.k_features = FeatureMap(self.key_dim), FeatureMap(self.key_dim)
        self.out = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        q, k, v = (self.split_heads(t) for t in self.qkv(x).chunk(3, -1))
        q, k = self.q_features(q), self.k_features(k)
        if self.normalise:  # the sum of keys is what a value of 1 gathers
            v = F.pad(v, (0, 1), value=1.0)
        past = None if state is None or cu_seqlens is not None else state["matrix"]
        sums, after = ssd.attend(q, k, v, past, cu_seqlens)
        if state is not None:
            state["matrix"] = after
        y = sums.to(v.dtype)
        if self.normalise:
            y = y[..., :-1] / (y[..., -1:] + 1e-12)
        mixed: Tensor = self.out(y.flatten(2))
        return mixed

    def init_state(self, batch: int) -> State:
        state = super().init_state(batch)
        return {"matrix": F.pad(state["matrix"], (0, 1))} if self.normalise else state

    def flops(self, seqlen: int) -> int:
        """FLOPs as above; the feature maps are applied once per head."""
        features = sum(p.numel() for m in (self.q_features, self.k_features) for p in m.parameters() if p.dim() > 1)
        return super().flops(seqlen) + 2 * seqlen * (self.heads - 1) * features


class GatedLinearAttention(MatrixStateLayer):
    """A decay of each key channel that the input sets through `rank` dimensions: ``sigmoid(gate)^(1/16)``. Heads are normed,
    and gated by a SiLU."""

    def __init__(self, dim: int, *, heads: int = 8, rank: int = 16) -> None:
        super().__init__(dim, heads)
        check_positive(rank=rank)
        self.qkvg = Linear(dim, 4 * dim, bias=False)
        self.forget = nn.Sequential(Linear(dim, rank, bias=False), Linear(rank, dim))
        self.norm = RMSNorm(self.value_dim, eps=1e-5)
        self.out = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        q, k, v, gate = (self.split_heads(t) for t in self.qkvg(x).chunk(4, -1))
        log_decay = F.logsigmoid(self.split_heads(wide(self.forget(x)))) / GATE_DIVISOR
        y = recur(q * self.key_dim**-0.5, k, v, log_decay, cu_seqlens=cu_seqlens, state=state)
        mixed: Tensor = self.out((self.norm(y.to(self.norm.weight.dtype)) * F.silu(gate)).flatten(2))
        return mixed
