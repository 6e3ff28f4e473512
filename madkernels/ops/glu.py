"""Gated linear units: public function, and shapes and gradients for torch."""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels import reference
from madkernels.ops.registration import register_derivatives, register_vmap_one_by_one, rows_of

_forward = torch.ops.madkernels.glu.default


def glu(h: Tensor, activation: str = "swiglu") -> Tensor:
    """Gated linear unit (Shazeer 2020, arXiv 2002.05202) of gate and up, which lie side by side::

        y = act(h[..., : dim]) h[..., dim :]

    Differentiable to any order (second derivatives go through the reference), in forward mode too. The backward writes both
    halves of the gradient in one pass. Autocast changes nothing: the output has the dtype of h.

    Args:
        h: (..., 2 dim): what a product with gate and up gives. float32, bfloat16, float16, or float64.
        activation: "swiglu", "geglu" (by erf) or "reglu".

    Returns:
        y (..., dim), contiguous, dtype of `h`.

    Raises:
        RuntimeError: a shape, dtype, device or activation that does not fit; the message names the argument.
    """
    y: Tensor = _forward(rows_of(h), activation)
    return y.view(*h.shape[:-1], y.shape[-1]) if h.dim() != 2 else y


@torch.library.register_fake("madkernels::glu")
def _forward_fake(h: Tensor, activation: str) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@torch.library.register_fake("madkernels::glu_backward")
def _backward_fake(dy: Tensor, h: Tensor, activation: str) -> Tensor:
    return h.new_empty(h.shape)


register_derivatives("madkernels::glu", ("h",), reference.glu)
register_vmap_one_by_one("madkernels::glu")
