"""Hyena experts: a mixture of Hyena operators (Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from madkernels.models.layers.base import State, check_positive
from madkernels.models.layers.hyena import LongConvLayer, check_taps


class HyenaExperts(LongConvLayer):
    """Each token reads from its `top_k` of `experts` Hyena operators of `hidden` channels, weighted by a softmax over their
    router scores; one projection leads out of their sum.

    Every expert's convolution sees every token, whoever reads it: a token may be read long after it came in, by one that is
    routed elsewhere. So projections and convolutions are dense in cost; sparse is what reaches the output and its gradient.
    Scores and weights are in float32 at least, and of equal scores the lower expert's comes first.

    Args:
        experts, hidden, top_k: see above.
        width, order, horizon, taps: as of :class:`Hyena`.
    """

    def __init__(
        self, dim: int, *, experts: int = 8, top_k: int = 2, hidden: int = 16, width: int = 3, order: int = 16,
        horizon: int = 128, taps: int = 0,
    ) -> None:  # fmt: skip
        check_positive(experts=experts, top_k=top_k, hidden=hidden, width=width, order=order, horizon=horizon)
        check_taps(taps)
        if top_k > experts:
            raise ValueError(f"top_k {top_k} is more than there are experts, {experts}")
        inner = experts * hidden
        super().__init__(
            dim, projected=3 * inner, repeats=1, width=width, channels=inner, filters=inner, order=order, horizon=horizon,
            taps=taps,
        )  # fmt: skip
        self.experts, self.top_k, self.hidden = experts, top_k, hidden
        self.router = nn.Linear(dim, experts, bias=False)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        q, k, v = self.project(x, cu_seqlens, state)
        weighted = q * self.weights(x).to(q.dtype).repeat_interleave(self.hidden, dim=-1)
        mixed = self.convolve(v, cu_seqlens, state, pre_gate=k, post_gate=weighted)
        y: Tensor = self.out(mixed.reshape(*x.shape[:2], self.experts, self.hidden).sum(-2))
        return y

    def weights(self, x: Tensor) -> Tensor:
        """(batch, seqlen, experts): of a token's experts its softmax, of the others zero."""
        scores, chosen = self.router(x).sort(dim=-1, descending=True, stable=True)
        scores, chosen = scores[..., : self.top_k], chosen[..., : self.top_k]
        weights: Tensor = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
        return weights.new_zeros(*x.shape[:-1], self.experts).scatter(-1, chosen, weights)

    def flops(self, seqlen: int) -> int:
        """FLOPs with E experts of hidden width F: projections 6 L D E F and 2 L D F, router 2 L D E, and those of
        :meth:`long_conv_flops`, with E F channels."""
        linear = self.in_proj.weight.numel() + self.out.weight.numel() + self.router.weight.numel()
        return 2 * seqlen * linear + self.long_conv_flops(seqlen)
