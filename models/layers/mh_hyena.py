"""Multi-head Hyena (Massaroli et al. 2023, arXiv 2310.18780; Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.models.layers.base import State, check_positive
from madkernels.models.layers.hyena import LongConvLayer
from madkernels.models.layers.linear import Linear


class MultiHeadHyena(LongConvLayer):
    """In each head the outer product of k and v, through one filter that the head's products share, read out by q:
    ``y[j] = sum_i q[i] (filter conv (k[i] v[j]) + skip k[i] v[j])``.

    Args:
        heads: of dim / heads channels each, so dim^2 / heads channels are convolved.
        width, order, horizon, taps, turns, frequency: as of :class:`Hyena`.

    Each head has its own projections: the published code computes a quarter of them and repeats it, and takes the number of
    heads for their width.

    Whole sequences that are short for their heads are taken by pairs of steps, as attention without a softmax is:
    ``y[t] = sum_s filter[t - s] (q[t] . k[s]) v[s] + skip (q[t] . k[t]) v[t]`` is the same sum in another order, without
    the products of k and v.
    """

    def __init__(
        self, dim: int, *, heads: int = 16, width: int = 3, order: int = 2, horizon: int = 128, taps: int = 0,
        turns: float = 1.0, frequency: float = 10.0,
    ) -> None:  # fmt: skip
        check_positive(heads=heads, width=width, order=order, horizon=horizon)
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        super().__init__(
            dim, projected=3 * dim, repeats=1, width=width, channels=dim * dim // heads, filters=heads, order=order,
            horizon=horizon, taps=taps, turns=turns, frequency=frequency,
        )  # fmt: skip
        self.heads = heads
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        size = self.dim // self.heads
        q, k, v = (t.reshape(*x.shape[:2], self.heads, size) for t in self.project(x, cu_seqlens, state))
        if state is None and cu_seqlens is None and pairs_pay(x.shape[1], size):
            mixed = self.mix_pairs(q, k, v)
        else:
            products = k.unsqueeze(-1) * v.unsqueeze(-2)
            mixed = self.convolve(products.flatten(2), cu_seqlens, state).view(products.shape)
            mixed = (q.unsqueeze(-1) * mixed).sum(-2)
        y: Tensor = self.out(mixed.flatten(2))
        return y

    def mix_pairs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """y before the projection, from q, k and v (batch, seqlen, heads, size)."""
        seqlen, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
        filters = self.filter(seqlen, wide)
        filters = F.pad(filters, (0, seqlen - filters.shape[1])) + F.pad(self.skip.to(wide).unsqueeze(1), (0, seqlen - 1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT
        return (scores * by_lag(filters).to(scores.dtype) @ v).transpose(1, 2)

    def flops(self, seqlen: int) -> int:
        """Projections 6 L D^2 and 2 L D^2, and those of :meth:`long_conv_flops`, with D^2 / H channels and H filters,
        even where pairs of steps are taken."""
        return 2 * seqlen * 4 * self.dim**2 + self.long_conv_flops(seqlen)


def pairs_pay(seqlen: int, size: int) -> bool:
    """Whether pairs of steps cost less than convolutions in heads of `size` channels. Fitted to training steps on a CPU,
    from 128 to 4096 steps and 8 to 128 channels."""
    return 0 < seqlen * (22 + size) <= 80 * size**2


def by_lag(filters: Tensor) -> Tensor:
    """(heads, seqlen) to (heads, seqlen, seqlen): the tap t - s at [t, s], 0 where s comes after t."""
    seqlen = filters.shape[1]
    return F.pad(filters, (seqlen - 1, 0)).unfold(1, seqlen, 1).flip(2)
