"""The ops mapped over models by torch.func: one call, and the same as one call a model."""

from __future__ import annotations

import op_cases
import pytest
import torch
from checks import relative_rms
from op_cases import OPS, SHAPES
from torch import Tensor

from madkernels import causal_conv
from madkernels.ops.registration import register_autocast

MODELS = 3


@pytest.fixture(params=OPS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def draw(name: str) -> dict[str, Tensor]:
    return {k: t.requires_grad_() for k, t in op_cases.draw(name, MODELS).items()}


def apart(name: str, inputs: dict[str, Tensor], mapped: dict[str, int | None]) -> list[Tensor]:
    found = [OPS[name](**{k: t if mapped[k] is None else t[i] for k, t in inputs.items()}) for i in range(MODELS)]
    return [torch.stack(tensors) for tensors in zip(*found, strict=True)]


@pytest.mark.parametrize("left_out", [False, True])
def test_equals_one_call_a_model(name: str, left_out: bool) -> None:
    """Values and gradients; with `left_out`, each argument in turn is not mapped."""
    for whole in SHAPES[name] if left_out else [None]:
        inputs, mapped = draw(name), {k: None if k == whole else 0 for k in SHAPES[name]}
        if whole:
            inputs[whole] = inputs[whole][0].detach().requires_grad_()
        together = torch.func.vmap(lambda t: OPS[name](**t), in_dims=(mapped,))(inputs)
        wanted = apart(name, inputs, mapped)
        weights = [torch.randn_like(t) for t in wanted]
        grads = [torch.autograd.grad(outputs, list(inputs.values()), weights) for outputs in (together, wanted)]
        for a, b in zip((*together, *grads[0]), (*wanted, *grads[1]), strict=True):
            assert relative_rms(a, b) < 1e-12


def test_other_axes_can_be_mapped(name: str) -> None:
    inputs = {k: t.detach().movedim(0, -1) for k, t in draw(name).items()}
    together = torch.func.vmap(lambda t: OPS[name](**t), in_dims=-1)(inputs)
    wanted = apart(name, {k: t.movedim(-1, 0) for k, t in inputs.items()}, dict.fromkeys(inputs, 0))
    assert all(relative_rms(a, b) < 1e-12 for a, b in zip(together, wanted, strict=True))


def test_offsets_cannot_be_mapped() -> None:
    x, weight = torch.randn(2, 1, 8, 4), torch.randn(4, 3)
    with pytest.raises(ValueError, match="vmap cannot map over cu_seqlens"):
        torch.func.vmap(lambda x, c: causal_conv(x, weight, cu_seqlens=c))(
            x, torch.tensor([[0, 8], [0, 8]], dtype=torch.int32)
        )
    packed = torch.func.vmap(lambda x: causal_conv(x, weight, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32)))(x)
    alone = torch.func.vmap(lambda x: torch.cat([causal_conv(x[:, :3], weight), causal_conv(x[:, 3:], weight)], 1))(x)
    assert relative_rms(packed, alone) < 1e-6


def test_arguments_are_named_as_in_the_schema() -> None:
    """A renamed argument is told where the op is registered."""
    with pytest.raises(ValueError, match=r"causal_conv has no argument 'u'; it has x, weight, bias, silu"):
        register_autocast("madkernels::causal_conv", activations=("u",))
