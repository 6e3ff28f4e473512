"""Filters of long convolutions: implicit, as functions of time, explicit, as taps, and modal, as sums of exponentials. All
give (channels, taps)."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImplicitFilter(nn.Module):
    """A filter of any length (Poli et al. 2023, arXiv 2302.10866): a small network of sines over (t, cos, sin), under a
    window that decays with t.

    The rates of the windows are spread evenly over the channels: the fastest falls to 1 % in 0.3 of the horizon, the slowest
    in 1.5. At the start each filter has a norm of about 1, whatever horizon and order: noise stays as large as it was. Sines
    of frequency 1 do not fill their range, and make it a third to a half of that.

    Args:
        channels: how many filters.
        order: width of the network.
        horizon: tokens that are one unit of time. The filter depends on the distance alone, not on the length asked for.
        turns: periods of the features' cosine and sine in a horizon.
        frequency: of the network's sines at the start.
    """

    def __init__(self, channels: int, order: int, horizon: int, turns: float = 1.0, frequency: float = 10.0) -> None:
        super().__init__()
        self.horizon, self.turns = horizon, turns
        self.layers = nn.ModuleList([nn.Linear(3, order), nn.Linear(order, order), nn.Linear(order, order)])
        self.frequency = nn.Parameter(torch.full((order,), float(frequency)))
        self.out = nn.Linear(order, channels, bias=False)
        with torch.no_grad():
            # A sine has a mean square of 1/2, a window a sum of squares of horizon / (2 rate), but at least 1.
            energy = (horizon / (2 * self.rates(torch.float32))).clamp_min(1.0)
            nn.init.normal_(self.out.weight).mul_((2 / (order * energy)).sqrt()[:, None])

    def forward(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(channels, length) in `dtype`, whatever that of the parameters and whether autocast is on: lower precision would
        blur the positions, and decoding would no longer agree with `forward`."""
        t = torch.arange(length, device=self.out.weight.device, dtype=dtype) / self.horizon
        angle = 2 * math.pi * self.turns * t
        h = torch.stack([t, torch.cos(angle), torch.sin(angle)], dim=-1)
        with torch.autocast(t.device.type, enabled=False):
            for layer in cast("list[nn.Linear]", list(self.layers)):
                h = F.linear(h, layer.weight.to(dtype), layer.bias.to(dtype))
                h = torch.sin(self.frequency.to(dtype) * h)
            filters: Tensor = F.linear(h, self.out.weight.to(dtype)) * torch.exp(-t[:, None] * self.rates(dtype))
        return filters.T

    def rates(self, dtype: torch.dtype) -> Tensor:
        """Decay rates of the windows, (channels,)."""
        return decay_rates(len(self.out.weight), self.out.weight.device, dtype)


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


class ModalFilter(nn.Module):
    """``h[t] = sum_n Re(residues[n] exp(log_poles[n] t))``, of any length, with a state that does not grow (Massaroli et al.
    2023, arXiv 2310.18780): ``modes[n] = sum_t exp(log_poles[n] (now - t)) u[t]``.

    The logarithms of the poles are what is learned: a pole near the unit circle, rounded itself, would lose what says how
    slowly it decays. Complex numbers are pairs, real part first. Powers are computed in float64 and put together from those
    of a block and those of its beginning: at 8192 tokens the angle of a pole is as exact as at the first.

    At the start poles have angles drawn from a half circle and the decay rates of :class:`ImplicitFilter`, and each filter a
    norm of about 1. As published, nothing holds a pole within the unit circle.

    Args:
        channels: how many filters.
        order: poles of each.
        horizon: tokens; see :class:`ImplicitFilter`.
    """

    undecayed = ("log_poles",)
    block = 64  # tokens

    def __init__(self, channels: int, order: int, horizon: int) -> None:
        super().__init__()
        rates = (decay_rates(channels) / horizon)[:, None].expand(-1, order)
        angles = math.pi * torch.rand(channels, order)
        self.log_poles = nn.Parameter(torch.stack([-rates, angles], -1))  # (channels, order, 2)
        scale = torch.sqrt(-torch.expm1(-2 * rates) / order)
        self.residues = nn.Parameter(scale[..., None] * torch.randn(channels, order, 2))

    def forward(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(channels, length) in `dtype`, whatever that of the parameters and whether autocast is on."""
        return self.respond(self.residues.to(dtype), length)

    def respond(self, amounts: Tensor, length: int) -> Tensor:
        """Each mode's amount, (..., channels, order, 2), over time, summed: (..., channels, length)."""
        steps, starts = self.within_and_between(length, amounts.dtype)
        real, imag = multiply(amounts.unsqueeze(-2), starts).transpose(-2, -3).unbind(-1)  # (..., channels, blocks, order)
        with torch.autocast(amounts.device.type, enabled=False):
            values = torch.stack([real, -imag], -1).flatten(-2) @ steps.mT.flatten(1, 2)
        taps = values.flatten(-2)
        if torch.compiler.is_compiling():  # of a slice torch would ask, for any length, whether there are so many
            return taps.index_select(-1, torch.arange(length, device=taps.device))
        return taps[..., :length]

    def gather(self, u: Tensor) -> Tensor:
        """What u (batch, seqlen, channels) leaves in the modes, (batch, channels, order, 2)."""
        steps, starts = self.within_and_between(u.shape[1], u.dtype)
        order, blocks, block = steps.shape[1], starts.shape[2], steps.shape[2]
        back = F.pad(u.flip(1), (0, 0, 0, blocks * block - u.shape[1])).mT.reshape(*u.shape[::2], blocks, block)
        with torch.autocast(u.device.type, enabled=False):
            gathered = back @ steps.transpose(1, 2).flatten(2)  # (batch, channels, blocks, order * 2)
        return multiply(gathered.view(*gathered.shape[:3], order, 2).transpose(2, 3), starts).sum(-2)

    def advance(self, amounts: Tensor, steps: int) -> Tensor:
        """Amounts (..., channels, order, 2) so many steps later."""
        return multiply(amounts, self.powers(steps, 1, 1, amounts.dtype).squeeze(-2))

    def within_and_between(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Powers at the tokens of a block, (channels, order, tokens, 2), and where blocks begin, (channels, order, blocks,
        2)."""
        block = 1 if length == 1 else self.block
        blocks = -(-length // block)
        if block > 1 and torch.compiler.is_compiling():
            blocks = length // block + 2  # never one, for which torch would make a graph of its own
        return self.powers(0, block, 1, dtype), self.powers(0, blocks, block, dtype)

    def powers(self, first: int, count: int, by: int, dtype: torch.dtype) -> Tensor:
        """The poles' powers first, first + by, ..., (channels, order, count, 2)."""
        t = first + by * torch.arange(count, device=self.log_poles.device, dtype=torch.float64)
        rate, angle = (self.log_poles.double().unsqueeze(-2) * t[:, None]).unbind(-1)
        return (rate.exp().unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)).to(dtype)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Of complex numbers as pairs (..., 2)."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)


def decay_rates(channels: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of windows, in units of time, (channels,): the slowest falls to 1 % in 1.5 of it, the fastest in 0.3."""
    return torch.linspace(1 / 1.5, 1 / 0.3, channels, device=device, dtype=dtype) * math.log(100)
