"""Whether a derivative in forward mode is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_unpack: Any = forward_ad.unpack_dual  # torch gives it no types


def has_tangent(values: Sequence[Any]) -> bool:
    """Whether one of the tensors among `values` carries a tangent. Torch has one level of them, 0.

    A tensor takes microseconds to ask, so none is asked in a plain call: where no level is open, and nothing is traced (a
    graph that is traced opens its level without telling Python)."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not traced and forward_ad._current_level < 0:
        return False
    return any(isinstance(v, Tensor) and _unpack(v, level=0).tangent is not None for v in values)
