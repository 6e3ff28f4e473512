"""Mamba-2: state-space duality (Dao and Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels import rms_norm
from madkernels.models.layers import ssd
from madkernels.models.layers.base import Layer, State, StateOption, check_positive, softplus, wide
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.mamba import initial_step_bias
from madkernels.models.layers.norm import by_op
from madkernels.models.layers.short_conv import ShortConv

A_RANGE = (1.0, 16.0)  # of -A at the start, uniform


class Mamba2(Layer):
    """Sequence and channel mixer in one: heads of `head_dim` of the ``expand * dim`` channels, which decay as one, with
    `dstate` states per channel; short convolution of `width` taps; gate, then norm.

    Args:
        dstate, expand, head_dim, width: see above.
        groups: neighbouring heads of a group share B and C; the norm is over the channels of each group.
        D_per_channel: a D for each channel, not for each head.
        delta_min, delta_max: steps are held between them.
        norm_before_gate: norm, then gate.
        norm_eps: what the norm adds to the mean square.
        bias, conv_bias: whether the projections, and the short convolution, have one.
    """

    mixes = "both"
    state_option = StateOption("dstate")
    packs_states = True

    def __init__(
        self, dim: int, *, dstate: int = 128, expand: int = 2, head_dim: int = 64, width: int = 4, groups: int = 1,
        D_per_channel: bool = False, delta_min: float = 0.0, delta_max: float = math.inf, norm_before_gate: bool = False,
        norm_eps: float = 1e-5, bias: bool = False, conv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        check_positive(dstate=dstate, expand=expand, head_dim=head_dim, width=width, groups=groups)
        self.inner, self.dstate, self.groups = expand * dim, dstate, groups
        if self.inner % head_dim:
            raise ValueError(f"{expand} * dim {dim} channels do not divide into heads of {head_dim}")
        self.heads, self.head_dim = self.inner // head_dim, head_dim
        if self.heads % groups:
            raise ValueError(f"{self.heads} heads do not divide into {groups} groups")
        if not 0 <= delta_min < delta_max:
            raise ValueError(f"delta_min is {delta_min} and delta_max {delta_max}; expected 0 <= delta_min < delta_max")
        self.delta_min, self.delta_max, self.norm_before_gate = delta_min, delta_max, norm_before_gate
        self.mixed = self.inner + 2 * groups * dstate  # channels of x, B and C
        self.in_proj = Linear(dim, self.inner + self.mixed + self.heads, bias=bias)
        self.conv = ShortConv(self.mixed, width, bias=conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(*A_RANGE).log())
        self.D = nn.Parameter(torch.ones(self.inner if D_per_channel else self.heads))
        self.delta_bias = nn.Parameter(initial_step_bias(self.heads))
        self.norm = GroupedNorm(self.inner, groups, norm_eps)
        self.out_proj = Linear(self.inner, dim, bias=bias)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        z, mixed, delta = self.in_proj(x).split([self.inner, self.mixed, self.heads], -1)
        mixed = self.conv(mixed, cu_seqlens, state)
        u, B, C = self.parts(mixed)
        past = None if state is None or cu_seqlens is not None else state["matrix"]
        y, after = ssd.scan(u, self.steps(delta), self.A(), B, C, self.skips(), past, cu_seqlens)
        if state is not None:
            state["matrix"] = after
        out: Tensor = self.out_proj(self.gated_norm(y.flatten(2), z))
        return out

    def step(self, x: Tensor, state: State) -> Tensor:
        """As of :class:`Layer`; without a gradient by the op's step, which is faster, on a copy of the state."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        z, mixed, delta = self.in_proj(x).split([self.inner, self.mixed, self.heads], -1)
        mixed = self.conv(mixed.unsqueeze(1), None, state).squeeze(1)
        u, B, C = self.parts(mixed)
        y, state["matrix"] = ssd.step(u, self.steps(delta), self.A(), B, C, self.skips(), state["matrix"])
        out: Tensor = self.out_proj(self.gated_norm(y.flatten(1), z))
        return out

    def parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., channels) into u (..., heads, head_dim), and B and C (..., groups, dstate)."""
        u, B, C = torch.split(mixed, [self.inner, self.groups * self.dstate, self.groups * self.dstate], -1)
        u, B, C = u.unflatten(-1, (self.heads, -1)), *(t.unflatten(-1, (self.groups, -1)) for t in (B, C))  # type: ignore[no-untyped-call]
        return u, B, C

    def A(self) -> Tensor:
        return -wide(self.A_log).exp()

    def skips(self) -> Tensor:
        """D (heads,) or (heads, head_dim), in float32 at least."""
        D = wide(self.D)
        return D if len(D) == self.heads else D.view(self.heads, self.head_dim)

    def steps(self, delta: Tensor) -> Tensor:
        """delta (batch, seqlen, heads) as projected, to step sizes, in float32 at least."""
        delta = softplus(wide(delta) + wide(self.delta_bias))
        limited = self.delta_min > 0 or self.delta_max < math.inf
        return delta.clamp(self.delta_min, self.delta_max) if limited else delta

    def gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        if by_op(y) and self.groups == 1 and not self.norm_before_gate:
            return rms_norm(y, self.norm.weight, eps=self.norm.eps, gate=z.to(y.dtype))
        gate, dtype = F.silu(z), self.norm.weight.dtype
        normed: Tensor = self.norm(y.to(dtype)) * gate if self.norm_before_gate else self.norm((y * gate).to(dtype))
        return normed

    def init_state(self, batch: int) -> State:
        matrix = self.zeros(batch, self.heads, self.head_dim, self.dstate, dtype=wide(self.D).dtype)
        return {"conv": self.conv.init_state(batch), "matrix": matrix}

    def state_size(self, seqlen: int) -> int:
        return self.inner * self.dstate

    def flops(self, seqlen: int) -> int:
        """Projections twice their parameters, short convolution, and 4 for each state: as the recurrence is stated."""
        matrices = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return seqlen * (2 * matrices + 4 * self.inner * self.dstate) + self.conv.flops(seqlen)


class GroupedNorm(nn.Module):
    """RMSNorm over each of `groups` groups of neighbouring channels, with a weight for each channel."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        grouped: Tensor = x.unflatten(-1, (self.groups, -1))  # type: ignore[no-untyped-call]
        return F.rms_norm(grouped, (grouped.shape[-1],), eps=self.eps).flatten(-2) * self.weight
