"""Hyena: gated long convolution with an implicit filter (Poli et al. 2023, arXiv 2302.10866), of order 2."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels import causal_conv
from madkernels.models.layers.base import Layer, State, check_positive
from madkernels.reference.documents import document_bounds


class Hyena(Layer):
    """out(q * (filter conv (k * v))), with q, k, v through a short convolution.

    Args:
        expand: channels of the long convolution, over dim.
        groups: in-projections are computed for 1/groups of the channels and repeated.
        width: of the short convolution.
        order: width of the network that makes the filter.
        horizon: tokens that are one unit of the filter's time. The filter is defined for any length: it depends on the
            distance alone, so longer inputs and decoding see the same filter.
    """

    def __init__(
        self, dim: int, *, expand: int = 4, groups: int = 4, width: int = 3, order: int = 4, horizon: int = 128
    ) -> None:
        super().__init__(dim)
        check_positive(expand=expand, groups=groups, width=width, order=order, horizon=horizon)
        if expand * dim % groups:
            raise ValueError(f"{expand} * dim {dim} channels do not divide into {groups} groups")
        self.inner, self.groups, self.width, self.order = expand * dim, groups, width, order
        self.in_proj = nn.Linear(dim, 3 * self.inner // groups)
        conv = nn.Conv1d(3 * self.inner, 3 * self.inner, width, groups=3 * self.inner)  # for its initialisation
        self.conv_weight = nn.Parameter(conv.weight.detach().squeeze(1))  # (3 * inner, width)
        self.conv_bias = nn.Parameter(conv.bias.detach()) if conv.bias is not None else None
        self.filter = ImplicitFilter(self.inner, order, horizon)
        self.skip = nn.Parameter(torch.randn(self.inner))
        self.out = nn.Linear(self.inner, dim)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        projected = self.in_proj(x).repeat(1, 1, self.groups)
        conv_state = None if state is None else state["conv"].to(projected.dtype)
        qkv, conv_state = causal_conv(
            projected, self.conv_weight, self.conv_bias,
            initial_state=conv_state, cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        assert isinstance(qkv, Tensor)
        q, k, v = qkv.chunk(3, dim=-1)
        kv = k * v
        if state is not None:
            kv = torch.cat([state["kv"].to(kv.dtype), kv], dim=1)
            state |= {"conv": conv_state, "kv": kv}
        mixed = self.long_conv(kv, cu_seqlens)[:, kv.shape[1] - x.shape[1] :]
        y: Tensor = self.out(q * mixed)
        return y

    def long_conv(self, kv: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """kv (batch, seqlen, inner) convolved with the filter, plus the skip; documents one by one."""
        if cu_seqlens is not None:
            parts = [self.long_conv(kv[:, a:b], None) for a, b in document_bounds(cu_seqlens)]
            return torch.cat(parts, dim=1)
        seqlen = kv.shape[1]
        if kv.numel() == 0:
            return kv  # there is no FFT of nothing
        size = 2 * seqlen  # no wrap-around
        signal = kv.to(torch.promote_types(kv.dtype, torch.float32))
        filters = torch.fft.rfft(self.filter(seqlen, signal.dtype), n=size, dim=0)  # (frequencies, inner)
        mixed: Tensor = torch.fft.irfft(torch.fft.rfft(signal, n=size, dim=1) * filters, n=size, dim=1)[:, :seqlen]
        return mixed.to(kv.dtype) + kv * self.skip.to(kv.dtype)

    def step(self, x: Tensor, state: State) -> Tensor:
        """Exact; keeps all of k * v, so the t-th token costs O(t) multiply-adds a channel."""
        projected = self.in_proj(x.unsqueeze(1)).repeat(1, 1, self.groups)
        qkv, state["conv"] = causal_conv(
            projected, self.conv_weight, self.conv_bias,
            initial_state=state["conv"].to(projected.dtype), return_final_state=True,
        )  # fmt: skip
        q, k, v = qkv.squeeze(1).chunk(3, dim=-1)
        kv = state["kv"] = torch.cat([state["kv"].to(q.dtype), (k * v).unsqueeze(1)], dim=1)
        signal = kv.to(torch.promote_types(kv.dtype, torch.float32))
        mixed = (signal * self.filter(kv.shape[1], signal.dtype).flip(0)).sum(1).to(q.dtype)
        mixed = mixed + k * v * self.skip.to(q.dtype)
        y: Tensor = self.out(q * mixed)
        return y

    def init_state(self, batch: int) -> State:
        return {"conv": self.zeros(batch, self.width - 1, 3 * self.inner), "kv": self.zeros(batch, 0, self.inner)}

    def state_size(self, seqlen: int) -> int:
        """Nominal, as the field counts it: the filter's order for each channel. Decoding keeps the whole past."""
        return self.inner * self.order

    def flops(self, seqlen: int) -> int:
        """Of E channels: projections 6 L D E / G and 2 L D E, short convolution 6 L E W, filter 2 L E S, long convolution
        10 L log2(L) E, gates 4 L E."""
        linear = 6 * self.dim * self.inner // self.groups + 2 * self.dim * self.inner + 6 * self.inner * self.width
        long_conv = int(10 * seqlen * math.log2(max(seqlen, 2))) * self.inner
        return seqlen * (linear + 2 * self.inner * self.order + 4 * self.inner) + long_conv


class ImplicitFilter(nn.Module):
    """A filter of any length: a small network of sines over (t, cos t, sin t), under a window that decays with t.

    The rates of the windows are spread evenly over the channels: the fastest falls to 1 % in 0.3 of the horizon, the slowest
    in 1.5.
    """

    rates: Tensor

    def __init__(self, channels: int, order: int, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.layers = nn.ModuleList([nn.Linear(3, order), nn.Linear(order, order), nn.Linear(order, order)])
        self.frequency = nn.Parameter(torch.full((order,), 10.0))
        self.out = nn.Linear(order, channels, bias=False)
        self.register_buffer("rates", torch.linspace(1 / 1.5, 1 / 0.3, channels) * math.log(100), persistent=False)

    def forward(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(length, channels) in `dtype`, whatever that of the parameters and whether autocast is on: lower precision would
        blur the positions, and decoding would no longer agree with `forward`."""
        t = torch.arange(length, device=self.rates.device, dtype=dtype) / self.horizon
        h = torch.stack([t, torch.cos(2 * math.pi * t), torch.sin(2 * math.pi * t)], dim=-1)
        with torch.autocast(t.device.type, enabled=False):
            for layer in cast("list[nn.Linear]", list(self.layers)):
                h = F.linear(h, layer.weight.to(dtype), layer.bias.to(dtype))
                h = torch.sin(self.frequency.to(dtype) * h)
            filters: Tensor = F.linear(h, self.out.weight.to(dtype)) * torch.exp(-t[:, None] * self.rates.to(dtype))
        return filters
