"""Norms with a gate, as mamba_ssm.ops.triton.layernorm_gated has them, of torch's operations; public in
:mod:`madkernels.compat.mamba_ssm`.

Arithmetic is in float32 at least, whatever the dtypes and under autocast too; the result is rounded once, to the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.compat.dtypes import without_autocast
from madkernels.compat.shapes import check_shape


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """``norm(x) silu(z)``, or ``norm(x silu(z))``, over the last axis.

    Args:
        x: (..., dim).
        weight: (dim,); likewise `bias`.
        z: gate, of the shape of `x`; none if absent.
        group_size: how many neighbours are normalised together, a divisor of dim; all if absent.
        norm_before_gate: whether the gate multiplies what is normalised, weight and bias included, or `x`.
        is_rms_norm: whether the mean is left where it is.

    Returns:
        Shape and dtype of `x`.

    Raises:
        AssertionError: `group_size` does not divide dim.
        RuntimeError: a shape that does not fit; the message names the argument.
    """
    dim, size = x.shape[-1], x.shape[-1] if group_size is None else group_size
    check_shape("weight", weight, dim)
    check_shape("bias", bias, dim)
    check_shape("z", z, *x.shape)
    if dim % size:
        raise AssertionError(f"group_size is {size}; expected a divisor of {dim}")
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        gate = None if z is None else F.silu(z.to(wide))
        given = x.to(wide) if gate is None or norm_before_gate else x.to(wide) * gate
        groups = given.reshape(*x.shape[:-1], dim // size, size)
        normed = F.rms_norm(groups, (size,), None, eps) if is_rms_norm else F.layer_norm(groups, (size,), None, None, eps)
        y = normed.flatten(-2) * weight.to(wide)
        y = y if bias is None else y + bias.to(wide)
        return (y if gate is None or not norm_before_gate else y * gate).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`layernorm_fn` by the root mean square alone."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


class LayerNorm(nn.Module):
    """:func:`layernorm_fn` with its `weight` and `bias`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class RMSNorm(nn.Module):
    """:func:`rmsnorm_fn` with its `weight`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
