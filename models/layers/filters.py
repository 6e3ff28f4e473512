"""Filters of long convolutions: implicit, as functions of time, and explicit, as taps. Both give (channels, taps)."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImplicitFilter(nn.Module):
    """A filter of any length (Poli et al. 2023, arXiv 2302.10866): a small network of sines over (t, cos t, sin t), under a
    window that decays with t.

    The rates of the windows are spread evenly over the channels: the fastest falls to 1 % in 0.3 of the horizon, the slowest
    in 1.5. At the start each filter has a norm of about 1, whatever horizon and order: noise stays as large as it was.

    Args:
        channels: how many filters.
        order: width of the network.
        horizon: tokens that are one unit of time. The filter depends on the distance alone, not on the length asked for.
    """

    def __init__(self, channels: int, order: int, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.layers = nn.ModuleList([nn.Linear(3, order), nn.Linear(order, order), nn.Linear(order, order)])
        self.frequency = nn.Parameter(torch.full((order,), 10.0))
        self.out = nn.Linear(order, channels, bias=False)
        with torch.no_grad():
            # A sine has a mean square of 1/2, a window a sum of squares of horizon / (2 rate), but at least 1.
            energy = (horizon / (2 * self.rates(torch.float32))).clamp_min(1.0)
            nn.init.normal_(self.out.weight).mul_((2 / (order * energy)).sqrt()[:, None])

    def forward(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(channels, length) in `dtype`, whatever that of the parameters and whether autocast is on: lower precision would
        blur the positions, and decoding would no longer agree with `forward`."""
        t = torch.arange(length, device=self.out.weight.device, dtype=dtype) / self.horizon
        h = torch.stack([t, torch.cos(2 * math.pi * t), torch.sin(2 * math.pi * t)], dim=-1)
        with torch.autocast(t.device.type, enabled=False):
            for layer in cast("list[nn.Linear]", list(self.layers)):
                h = F.linear(h, layer.weight.to(dtype), layer.bias.to(dtype))
                h = torch.sin(self.frequency.to(dtype) * h)
            filters: Tensor = F.linear(h, self.out.weight.to(dtype)) * torch.exp(-t[:, None] * self.rates(dtype))
        return filters.T

    def rates(self, dtype: torch.dtype) -> Tensor:
        """Decay rates of the windows, (channels,)."""
        weight = self.out.weight
        return torch.linspace(1 / 1.5, 1 / 0.3, len(weight), device=weight.device, dtype=dtype) * math.log(100)


class ExplicitFilter(nn.Module):
    """A filter of learned taps, normal at the start with a norm of about 1."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, taps) / math.sqrt(taps))

    def forward(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(channels, taps) in `dtype`, whatever the length."""
        return self.weight.to(dtype)


class RegularisedFilter(ExplicitFilter):
    """An explicit filter under ``exp(-rate t)``: the rates are spread evenly in their logarithm over the channels, so that
    the slowest has not decayed at the last tap, and the fastest within a few. At the start each has a norm of about 1."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__(channels, taps)
        with torch.no_grad():
            self.weight.mul_(math.sqrt(taps) / self.window(torch.float32).norm(dim=1, keepdim=True))

    def window(self, dtype: torch.dtype) -> Tensor:
        """(channels, taps) in `dtype`."""
        (channels, taps), device = self.weight.shape, self.weight.device
        rates = torch.logspace(math.log10(0.1 / taps), math.log10(0.5), channels, device=device, dtype=dtype)
        return torch.exp(-rates[:, None] * torch.arange(taps, device=device))

    def forward(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype) * self.window(dtype)
