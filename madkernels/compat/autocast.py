"""Autocast knows nothing of the packages' functions, so that it changes nothing in their place either."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(t: Tensor) -> AbstractContextManager[object]:
    """A context in which nothing on the device of `t` is cast. Tensors without memory ("meta") know no autocast."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
