"""Whether a derivative in forward mode is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

_unpack: Any = forward_ad.unpack_dual  # torch gives it no types


def has_tangent(values: Sequence[Any]) -> bool:
    """Whether one of the tensors among `values` carries a tangent. Torch has one level of them, 0."""
    return any(isinstance(v, Tensor) and _unpack(v, level=0).tangent is not None for v in values)
