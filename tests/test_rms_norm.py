"""What only rms_norm has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import relative_rms
from torch import Tensor

from madkernels import rms_norm

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_any_leading_axes(shape: tuple[int, ...], gated: bool) -> None:
    """Values and gradients of torch's own."""
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, *([torch.randn(shape, dtype=torch.float64)] if gated else []))]

    def results(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    gate = leaves[2] if gated else None
    found = results(rms_norm(x, weight, eps=0.1, gate=gate))
    wanted = results(F.rms_norm(x if gate is None else x * F.silu(gate), (7,), weight, 0.1))
    assert found[0].shape == shape
    torch.testing.assert_close(found, wanted)


def test_narrow_beside_a_wide_weight() -> None:
    x, weight = torch.randn(40, 33).bfloat16(), torch.randn(33)
    y = rms_norm(x, weight)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y.double(), F.rms_norm(x.double(), (33,), weight.double(), 1e-5)) < 3e-3
    leaf = weight.requires_grad_()
    rms_norm(x, leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


def test_rows_of_views_are_read_in_place() -> None:
    wide = torch.randn(30, 40)
    torch.testing.assert_close(rms_norm(wide[:, 8:24], torch.ones(16)), rms_norm(wide[:, 8:24].clone(), torch.ones(16)))
    torch.testing.assert_close(rms_norm(wide.T, torch.ones(30)), rms_norm(wide.T.contiguous(), torch.ones(30)))


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 20)
    x[1, 4] = torch.nan
    y = rms_norm(x, torch.ones(20))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
