"""RMSNorm: public function, and shapes and gradients for torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from madkernels import reference
from madkernels.ops.registration import register_derivatives, register_vmap_one_by_one, rows_of

_forward = torch.ops.madkernels.rms_norm.default


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, gate: Tensor | None = None) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), of the gated x where there is a gate, as in Mamba-2::

        a = x silu(gate), or x
        y = weight a / sqrt(mean(a^2) + eps)

    Differentiable in x, weight and gate, to any order (second derivatives go through the reference), in forward mode too.
    Deterministic, whatever the number of threads; a row does not depend on others. Sums are in float32 (float64 for
    float64). Autocast changes nothing: the output has the dtype of x.

    Args:
        x: (..., dim). float32, bfloat16, float16, or float64.
        weight: (dim,), dtype of `x`, or float32 beside a narrower one.
        eps: added to the mean square.
        gate: like x.

    Returns:
        y like x, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    y: Tensor = _forward(rows_of(x), weight, eps, None if gate is None else rows_of(gate))[0]
    return y.view(x.shape) if x.dim() != 2 else y


@torch.library.register_fake("madkernels::rms_norm")
def _forward_fake(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("madkernels::rms_norm_backward")
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, rstd: Tensor
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(0 if gate is None else x.shape)


def _by_reference(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Sequence[Tensor]:
    # Its gradients need no rstd.
    return reference.rms_norm(x, weight, eps=eps, gate=gate), x.new_empty(0)


register_derivatives("madkernels::rms_norm", ("x", "weight", "gate"), _by_reference, only_kept=("rstd",))
register_vmap_one_by_one("madkernels::rms_norm")
