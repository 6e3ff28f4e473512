"""Activations whose derivatives torch has to every order, in reverse and in forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x). The gradient of torch's own has no forward mode."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution up to x, by erf: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return x * (0.5 + 0.5 * torch.erf(x / math.sqrt(2)))


def activate(activation: str | None, h: Tensor) -> Tensor:
    """An activation by its name, of the last axis of h; the gated ones take gate and up as its two halves."""
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1)
        return GATED[activation](gate) * up
    return h if activation is None else PLAIN[activation](h)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) * torch.relu(x),
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": silu,
    "geglu": gelu,
    "reglu": torch.relu,
}  # Shazeer 2020, arXiv 2002.05202
