"""The grouped product against a loop, with its gradients, and mapped over models."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checks import relative_rms
from torch import Tensor

from madkernels.models.layers import LAYERS
from madkernels.models.layers.grouped import grouped_linear


def by_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    bounds = pairwise([0, *ends.tolist()])
    return torch.cat([x[a:b] @ weight[g].T for g, (a, b) in enumerate(bounds)])


def draw(rows: int, inputs: int, outputs: int, dtype: torch.dtype, models: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + inputs)
    shapes = (*models, rows, inputs), (*models, 4, outputs, inputs)
    x, weight = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    return x, weight


@pytest.mark.parametrize("ends", [[3, 3, 9, 20], [0, 0, 0, 20], [20, 20, 20, 20], [5, 10, 15, 20]], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, inputs: int, outputs: int, ends: list[int]) -> None:
    x, weight = draw(20, inputs, outputs, dtype)
    offsets = torch.tensor(ends, dtype=torch.int32)
    y = grouped_linear(x, weight, offsets)
    exact = by_groups(x.double(), weight.double(), offsets)
    weights = torch.randn_like(exact)
    found = torch.autograd.grad(y, (x, weight), weights.to(dtype))
    wanted = torch.autograd.grad(exact, (x, weight), weights)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip((y, *found), (exact, *wanted), strict=True):
        assert a.dtype == dtype
        assert relative_rms(a, b) < tolerance


def test_gradients_of_gradients() -> None:
    x, weight = draw(6, 3, 2, torch.float64)
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_linear(a, b, ends), (x, weight))


def test_no_rows() -> None:
    x, weight = draw(0, 16, 16, torch.float32)
    y = grouped_linear(x, weight, torch.zeros(4, dtype=torch.int32))
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert (y.shape, dx.shape) == ((0, 16), (0, 16))
    assert not dweight.any()


def test_mapped_over_models() -> None:
    """Values and gradients, with groups of their own for each model."""
    x, weight = draw(20, 16, 8, torch.float32, models=(3,))
    ends = torch.tensor([[3, 3, 9, 20], [0, 0, 0, 20], [5, 10, 15, 20]], dtype=torch.int32)

    def loss(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return grouped_linear(x, weight, ends).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, weight, ends)
    apart = [torch.func.grad(loss, argnums=(0, 1))(x[i], weight[i], ends[i]) for i in range(3)]
    for a, b in zip(found, map(torch.stack, zip(*apart, strict=True)), strict=True):
        assert relative_rms(a, b) < 1e-6


@pytest.mark.parametrize(("dim", "hidden"), [(32, 16), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_moe_is_one_graph_of_any_length(dtype: torch.dtype, dim: int, hidden: int) -> None:
    """The compiled layer's values and gradients are the layer's own."""
    torch.manual_seed(0)
    torch.compiler.reset()
    moe = LAYERS["moe"](dim, experts=5, top_k=3, hidden=hidden).to(dtype)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for seqlen in (20, 30, 41):
        x = torch.randn(2, seqlen, dim).to(dtype).requires_grad_()
        found, wanted = (
            (y, *torch.autograd.grad(y.sin().sum(), [x, *moe.parameters()])) for y in (layer(x) for layer in (compiled, moe))
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
