"""RMSNorm by the op where that pays, elsewhere by torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from madkernels import rms_norm

DEVICES = {"cpu"}  # where ops of rows are used; they have no CUDA kernels


def by_op(x: Tensor) -> bool:
    """Whether one call is better than several operators: not in a graph, which is fused as a whole, nor under a mapped axis,
    where each map would be a call, nor where somebody counts what torch's operators do."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return x.device.type in DEVICES and not (watched or torch._C._are_functorch_transforms_active())


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last axis, of a given eps. By the op the output has the dtype of x, beside a wider weight
    too."""

    def forward(self, x: Tensor) -> Tensor:
        if by_op(x) and self.weight.dtype in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
            assert self.eps is not None
            return rms_norm(x, self.weight, eps=self.eps)
        return super().forward(x)
