"""The ops mapped over models by torch.func: one call, and the same as one call a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from cases import CASES
from checks import relative_rms
from op_cases import Inputs, OpCase
from torch import Tensor

from madkernels import causal_conv
from madkernels.ops.registration import register_autocast

MODELS = 3


@pytest.fixture(params=CASES.values(), ids=CASES)
def op(request: pytest.FixtureRequest) -> OpCase:
    case: OpCase = request.param
    return case


def draw(op: OpCase) -> Inputs:
    inputs = op.draw(2, 40, *op.little, dtype=torch.float64, maps=(MODELS,))
    return {k: t.requires_grad_() for k, t in inputs.items()}


def call(op: OpCase) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda inputs: op.call(**inputs, **op.options)


def apart(op: OpCase, inputs: Inputs, mapped: dict[str, int | None]) -> list[Tensor]:
    found = [call(op)({k: t if mapped[k] is None else t[i] for k, t in inputs.items()}) for i in range(MODELS)]
    return [torch.stack(tensors) for tensors in zip(*found, strict=True)]


@pytest.mark.parametrize("left_out", [False, True])
def test_equals_one_call_a_model(op: OpCase, left_out: bool) -> None:
    """Values and gradients; with `left_out`, each argument of several in turn is not mapped."""
    for whole in op.arguments if left_out and len(op.arguments) > 1 else [None]:
        inputs, mapped = draw(op), {k: None if k == whole else 0 for k in op.arguments}
        if whole:
            inputs[whole] = inputs[whole][0].detach().requires_grad_()
        together = torch.func.vmap(call(op), in_dims=(mapped,))(inputs)
        wanted = apart(op, inputs, mapped)
        weights = [torch.randn_like(t) for t in wanted]
        grads = [torch.autograd.grad(outputs, list(inputs.values()), weights) for outputs in (together, wanted)]
        for a, b in zip((*together, *grads[0]), (*wanted, *grads[1]), strict=True):
            assert relative_rms(a, b) < 1e-12


def test_other_axes_can_be_mapped(op: OpCase) -> None:
    inputs = {k: t.detach().movedim(0, -1) for k, t in draw(op).items()}
    together = torch.func.vmap(call(op), in_dims=-1)(inputs)
    wanted = apart(op, {k: t.movedim(-1, 0) for k, t in inputs.items()}, dict.fromkeys(inputs, 0))
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
