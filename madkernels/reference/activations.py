"""Activations whose derivatives torch has to every order, in reverse and in forward mode."""

from __future__ import annotations

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x). The gradient of torch's own has no forward mode."""
    return x * torch.sigmoid(x)
