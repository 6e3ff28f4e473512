"""Multi-head Hyena (Massaroli et al. 2023, arXiv 2310.18780; Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

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
        heads = (*x.shape[:2], self.heads, self.dim // self.heads)
        q, k, v = (t.reshape(heads) for t in self.project(x, cu_seqlens, state))
        products = k.unsqueeze(-1) * v.unsqueeze(-2)
        mixed = self.convolve(products.flatten(2), cu_seqlens, state).view(products.shape)
        y: Tensor = self.out((q.unsqueeze(-1) * mixed).sum(-2).flatten(2))
        return y

    def flops(self, seqlen: int) -> int:
        """Projections 6 L D^2 and 2 L D^2, and those of :meth:`long_conv_flops`, with D^2 / H channels and H filters."""
        return 2 * seqlen * 4 * self.dim**2 + self.long_conv_flops(seqlen)
