"""What is cast in the adapters: nothing by autocast, which knows nothing of the packages' functions; parameters, where the
ops would not take them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(t: Tensor) -> AbstractContextManager[object]:
    """A context in which nothing on the device of `t` is cast. Tensors without memory ("meta") know no autocast."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def beside(x: Tensor, parameter: Tensor) -> Tensor:
    """A parameter in a dtype that the ops take beside that of x: another one is widened to that of their sums. One that is
    no floating point, or would be rounded, is left to the op, which refuses it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    widened = parameter.dtype != x.dtype and parameter.is_floating_point()
    return parameter.to(wide) if widened and torch.promote_types(parameter.dtype, wide) == wide else parameter
