"""Mamba-2: state-space duality (Dao and Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models.layers.base import Layer, State, StateOption, check_positive, softplus, wide
from madkernels.models.layers.mamba import initial_step_bias
from madkernels.models.layers.matrix_state import recur
from madkernels.models.layers.recurrence import linear_recurrence
from madkernels.models.layers.short_conv import ShortConv

A_RANGE = (1.0, 16.0)  # of -A at the start, uniform


class Mamba2(Layer):
    """Sequence and channel mixer in one: heads of `head_dim` of the ``expand * dim`` channels, which decay as one and share
    B and C, with `dstate` states per channel; short convolution of `width` taps; gate, then norm."""

    mixes = "both"
    state_option = StateOption("dstate")
    packs_states = True

    def __init__(self, dim: int, *, dstate: int = 128, expand: int = 2, head_dim: int = 64, width: int = 4) -> None:
        super().__init__(dim)
        check_positive(dstate=dstate, expand=expand, head_dim=head_dim, width=width)
        self.inner, self.dstate = expand * dim, dstate
        if self.inner % head_dim:
            raise ValueError(f"{expand} * dim {dim} channels do not divide into heads of {head_dim}")
        self.heads, self.head_dim = self.inner // head_dim, head_dim
        self.in_proj = nn.Linear(dim, 2 * self.inner + 2 * dstate + self.heads, bias=False)
        self.conv = ShortConv(self.inner + 2 * dstate, width, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(*A_RANGE).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.delta_bias = nn.Parameter(initial_step_bias(self.heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        z, mixed, delta = self.in_proj(x).split([self.inner, self.inner + 2 * self.dstate, self.heads], -1)
        mixed = self.conv(mixed, cu_seqlens, state)
        u, B, C = mixed.split([self.inner, self.dstate, self.dstate], -1)
        u = u.unflatten(-1, (self.heads, self.head_dim))
        delta = softplus(wide(delta) + wide(self.delta_bias)).unsqueeze(-1)  # (batch, seqlen, heads, 1)
        log_decay = -wide(self.A_log).exp()[:, None] * delta
        q, k = C.unsqueeze(2), B.unsqueeze(2)
        y = recur(linear_recurrence, q, k, delta * u, log_decay, cu_seqlens=cu_seqlens, state=state)
        y = (y.to(u.dtype) + self.D.to(u.dtype)[:, None] * u).flatten(2)
        out: Tensor = self.out_proj(self.norm((y * F.silu(z)).to(self.norm.weight.dtype)))
        return out

    def init_state(self, batch: int) -> State:
        matrix = self.zeros(batch, self.heads, self.dstate, self.head_dim, dtype=wide(self.D).dtype)
        return {"conv": self.conv.init_state(batch), "matrix": matrix}

    def state_size(self, seqlen: int) -> int:
        return self.inner * self.dstate

    def flops(self, seqlen: int) -> int:
        """Projections twice their parameters, short convolution, and 4 for each state: as the recurrence is stated."""
        matrices = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return seqlen * (2 * matrices + 4 * self.inner * self.dstate) + self.conv.flops(seqlen)
