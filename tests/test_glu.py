"""What only glu has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from madkernels import glu

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("shape", [(14,), (5, 14), (2, 3, 14), (2, 0, 14)], ids=str)
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    """Values and gradients of torch's own."""
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gate, up = h.chunk(2, -1)
    found, wanted = glu(h), F.silu(gate) * up
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), [h]), torch.autograd.grad(wanted.square().sum(), [h]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
def test_what_is_not_gated_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=f'activation is "{name}"'):
        glu(torch.zeros(2, 4), name)
