"""Sparse mixture of SwiGLU experts (Shazeer et al. 2017, arXiv 1701.06538; routing as in Mixtral, arXiv 2401.04088)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models.layers.base import Layer, State, check_positive
from madkernels.models.layers.grouped import grouped_linear


class MoE(Layer):
    """Each token goes to its `top_k` experts of hidden width `hidden`, weighted by a softmax over their router scores.

    Only the chosen experts compute, none is ever full, and no token is dropped. Scores and weights are in float32 at least.
    Of equal scores the lower expert's comes first. Gradients are summed in a fixed order too: a token is copied for each of
    its experts, and the copies are permuted, so that no index occurs twice.
    """

    mixes = "channel"
    hidden_option = "hidden"

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
        ends = (expert.unsqueeze(-1) <= torch.arange(self.experts, device=x.device)).sum(0, dtype=torch.int32)
        copies = tokens.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, self.dim)
        mixed = self.mix(copies[order], ends)
        back = order.argsort()
        y: Tensor = (mixed[back].view(-1, self.top_k, self.dim) * weights.to(mixed.dtype).unsqueeze(-1)).sum(1)
        return y.view(x.shape)

    def mix(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Tokens (copies, dim), those of each expert side by side, through their experts."""
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        gate, up = grouped_linear(tokens.to(dtype), gate_up, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, down, ends)

    def flops(self, seqlen: int) -> int:
        """Router 2 L D E, and 6 L D F for each of a token's experts."""
        return 2 * seqlen * self.dim * self.experts + self.top_k * 6 * seqlen * self.dim * self.hidden

    def active_params(self) -> int:
        return self.router.weight.numel() + self.top_k * 3 * self.dim * self.hidden
