"""Mamba: selective state-space mixer (Gu and Dao 2023, arXiv 2312.00752), on the project's kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels import causal_conv, causal_conv_step, selective_scan, selective_scan_step
from madkernels.models.layers.base import Layer, State, StateOption, check_positive, no_narrower, wide
from madkernels.models.layers.linear import Linear, linear

STEP_RANGE = (1e-3, 1e-1)  # of delta at the start, log-uniform


class Mamba(Layer):
    """Sequence and channel mixer in one: ``expand * dim`` channels of `dstate` states, short convolution of `width` taps.

    Args:
        dstate, expand, width: see above.
        rank: of the step sizes' projection; 0: dim / 16, rounded up.
        bias, conv_bias: whether the projections in and out, and the short convolution, have one.
        projection_norm_eps: if not 0, step sizes (before their second projection), B and C go through an RMSNorm without
            weights that adds this to the mean square (Falcon Mamba: Zuo et al. 2024, arXiv 2410.05355).
    """

    mixes = "both"
    state_option = StateOption("dstate")
    undecayed = ("A_log",)
    packs_states = True

    def __init__(
        self, dim: int, *, dstate: int = 16, expand: int = 2, width: int = 4, rank: int = 0, bias: bool = False,
        conv_bias: bool = True, projection_norm_eps: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        self.inner, self.dstate, self.width, self.rank = expand * dim, dstate, width, rank or math.ceil(dim / 16)
        check_positive(dstate=dstate, expand=expand, width=width, rank=self.rank)
        self.projection_norm_eps = projection_norm_eps
        self.in_proj = Linear(dim, 2 * self.inner, bias=bias)
        conv = nn.Conv1d(self.inner, self.inner, width, groups=self.inner, bias=conv_bias)  # for its initialisation
        self.conv_weight = nn.Parameter(conv.weight.detach().squeeze(1))  # (inner, width)
        self.conv_bias = nn.Parameter(conv.bias.detach()) if conv.bias is not None else None
        self.x_proj = Linear(self.inner, self.rank + 2 * dstate, bias=False)
        self.delta_weight = nn.Parameter(torch.empty(self.inner, self.rank).uniform_(-(self.rank**-0.5), self.rank**-0.5))
        self.delta_bias = nn.Parameter(initial_step_bias(self.inner))
        self.A_log = nn.Parameter(torch.arange(1, dstate + 1, dtype=torch.float32).log().repeat(self.inner, 1))  # S4D-real
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = Linear(self.inner, dim, bias=bias)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        conv_state, scan_state = (None, None) if state is None else (state["conv"].to(u.dtype), state["scan"])
        u, conv_state = causal_conv(
            u, self.conv_weight, self.conv_bias, activation="silu",
            initial_state=conv_state, cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        delta, B, C = self.project(u)
        y, scan_state = selective_scan(
            u, delta, self.A(), B, C, wide(self.D), z, wide(self.delta_bias), True,
            initial_state=scan_state, cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        if state is not None:
            assert isinstance(conv_state, Tensor)
            state |= {"conv": no_narrower(conv_state, state["conv"]), "scan": scan_state}
        out: Tensor = self.out_proj(y)
        return out

    def step(self, x: Tensor, state: State) -> Tensor:
        """As of :class:`Layer`; without a gradient by the ops' steps, which are faster, on copies of the state."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        dense = torch.contiguous_format
        conv_state = state["conv"].to(u.dtype, copy=True, memory_format=dense)
        scan_state = state["scan"].clone(memory_format=dense)
        u = causal_conv_step(conv_state, u, self.conv_weight, self.conv_bias, activation="silu")
        delta, B, C = self.project(u)
        parameters = self.A(), B, C, wide(self.D), z, wide(self.delta_bias)
        y = selective_scan_step(scan_state, u, delta, *parameters, True)
        state |= {"conv": no_narrower(conv_state, state["conv"]), "scan": scan_state}
        out: Tensor = self.out_proj(y)
        return out

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input-dependent step sizes and projections: delta like u, B and C (..., dstate)."""
        low, B, C = self.x_proj(u).split([self.rank, self.dstate, self.dstate], dim=-1)
        if eps := self.projection_norm_eps:
            low, B, C = (F.rms_norm(t, t.shape[-1:], eps=eps) for t in (low, B, C))
        return linear(low, self.delta_weight), B, C

    def A(self) -> Tensor:
        return -torch.exp(wide(self.A_log))

    def init_state(self, batch: int) -> State:
        return {
            "conv": self.zeros(batch, self.width - 1, self.inner),
            "scan": self.zeros(batch, self.inner, self.dstate, dtype=wide(self.A_log).dtype),
        }

    def state_size(self, seqlen: int) -> int:
        return self.inner * self.dstate

    def flops(self, seqlen: int) -> int:
        """FLOPs at width D, expansion E: projections 6 L D^2 E, convolution 2 L D E W, step sizes and projections
        2 L D E (2 R + 2 N), scan 2 L D E N."""
        linear = 6 * self.dim * self.inner + 2 * self.inner * self.width
        return seqlen * (linear + 2 * self.inner * (2 * self.rank + 2 * self.dstate) + 2 * self.inner * self.dstate)


def initial_step_bias(channels: int) -> Tensor:
    """The inverse of softplus at steps drawn log-uniformly from STEP_RANGE."""
    low, high = (math.log(s) for s in STEP_RANGE)
    step = torch.exp(torch.rand(channels) * (high - low) + low).clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))
