"""Sparse mixture of SwiGLU experts (Shazeer et al. 2017, arXiv 1701.06538; routing as in Mixtral, arXiv 2401.04088)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models.layers.base import Layer, State, check_positive


class MoE(Layer):
    """Each token goes to its `top_k` experts of hidden width `hidden`, weighted by a softmax over their router scores.

    Only the chosen experts compute, none is ever full, and no token is dropped. Scores and weights are in float32 at least.
    Of equal scores the lower expert's comes first. Gradients are summed in a fixed order too: a token is copied for each of
    its experts, and the copies are permuted, so that no index occurs twice.
    """

    def __init__(self, dim: int, *, experts: int = 8, top_k: int = 2, hidden: int = 128) -> None:
        super().__init__(dim)
        check_positive(experts=experts, top_k=top_k, hidden=hidden)
        if top_k > experts:
            raise ValueError(f"top_k {top_k} is more than there are experts, {experts}")
        self.experts, self.top_k, self.hidden = experts, top_k, hidden
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))
        for weight in (self.gate_up, self.down):  # each expert as torch.nn.Linear would be
            nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[2]), 1 / math.sqrt(weight.shape[2]))

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        tokens = x.reshape(-1, self.dim)
        scores, chosen = self.router(tokens).sort(dim=-1, descending=True, stable=True)
        scores, chosen = scores[:, : self.top_k], chosen[:, : self.top_k]  # (tokens, top_k)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
        expert, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=self.experts).tolist()
        copies = tokens.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, self.dim)
        parts = torch.split(copies[order], counts)
        mixed = torch.cat([self.expert(i, part) for i, part in enumerate(parts)])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        y: Tensor = (mixed[back].view(-1, self.top_k, self.dim) * weights.to(mixed.dtype).unsqueeze(-1)).sum(1)
        return y.view(x.shape)

    def expert(self, i: int, tokens: Tensor) -> Tensor:
        gate, up = F.linear(tokens, self.gate_up[i]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down[i])

    def flops(self, seqlen: int) -> int:
        """Router 2 L D E, and 6 L D F for each of a token's experts."""
        return 2 * seqlen * self.dim * self.experts + self.top_k * 6 * seqlen * self.dim * self.hidden

    def active_params(self) -> int:
        return self.router.weight.numel() + self.top_k * 3 * self.dim * self.hidden
