"""Products of groups of rows, one group after another.

    h_r = W_g x_{gather[r]} + b_g,    y_r = act(h_r)    for the rows r of group g, offsets[g] <= r < offsets[g + 1]

Rows of no group are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels.reference.activations import activate
from madkernels.reference.documents import document_bounds


def grouped_gemm(
    x: Tensor,  # (rows, inputs); with `gather` any number of rows
    weight: Tensor,  # (groups, outputs, inputs); with `transpose` (groups, inputs, outputs)
    offsets: Tensor,  # (groups + 1,)
    *,
    bias: Tensor | None = None,  # (groups, outputs)
    activation: str | None = None,
    gather: Tensor | None = None,  # (rows,), -1 for a row of zeros
    transpose: bool = False,
) -> Tensor:
    """The meaning of :func:`madkernels.grouped_gemm`; computes in the widest dtype of its inputs, at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    matrices = (weight if transpose else weight.mT).to(wide)  # (groups, inputs, outputs)
    biases = matrices.new_zeros(weight.shape[0], matrices.shape[2]) if bias is None else bias.to(wide)
    rows = x.to(wide) if gather is None else _gathered(x.to(wide), gather)
    parts = [rows.new_zeros(0, matrices.shape[2])]
    for (begin, end), matrix, shift in zip(document_bounds(offsets), matrices, biases, strict=True):
        parts.append(rows[begin:end] @ matrix + shift)
    y = activate(activation, torch.cat(parts))
    before, behind = int(offsets[0]), len(rows) - int(offsets[-1])
    return torch.cat([y.new_zeros(before, y.shape[1]), y, y.new_zeros(behind, y.shape[1])]).to(x.dtype)


def _gathered(x: Tensor, gather: Tensor) -> Tensor:
    """Rows of x, and a row of zeros for -1."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[gather.long()]
