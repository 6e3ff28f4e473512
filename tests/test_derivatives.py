"""Derivatives beside a plain backward: forward mode, and torch.func's, of every op; what has none says so."""

from __future__ import annotations

from typing import Any

import op_cases
import pytest
import torch
from checks import relative_rms
from op_cases import OPS, REFERENCES
from torch import Tensor
from torch.autograd import forward_ad

from madkernels import causal_conv, causal_conv_step, fft_conv_step, selective_scan_step
from madkernels.fused import linear_cross_entropy
from madkernels.models import HybridLM

SMALL = {
    "selective_scan": {
        k: tuple({40: 5, 6: 2, 4: 2}.get(n, n) for n in s) for k, s in op_cases.SHAPES["selective_scan"].items()
    },
    "causal_conv": {k: tuple({40: 5, 6: 2}.get(n, n) for n in s) for k, s in op_cases.SHAPES["causal_conv"].items()},
    "fft_conv": {k: tuple({40: 5, 6: 3, 17: 4, 16: 3}.get(n, n) for n in s) for k, s in op_cases.SHAPES["fft_conv"].items()},
}


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_agrees_with_differences(op: str) -> None:
    """Of outputs and states in every argument, and of the gradients."""
    inputs = op_cases.draw(op, **SMALL[op])
    values = tuple(t.requires_grad_() for t in inputs.values())

    def call(*tensors: Tensor) -> Any:
        return OPS[op](**dict(zip(inputs, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, values, check_fwd_over_rev=True)


def tangents_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {k: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for k, t in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_jvp_is_the_reference_s(op: str, dtype: torch.dtype) -> None:
    inputs = op_cases.draw(op, dtype=dtype)
    tangents = tangents_of(inputs)
    found = torch.func.jvp(lambda t: OPS[op](**t), (inputs,), (tangents,))[1]
    double = [{k: t.double() for k, t in given.items()} for given in (inputs, tangents)]
    exact = torch.func.jvp(lambda t: REFERENCES[op](**t), (double[0],), (double[1],))[1]
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype in (dtype, torch.promote_types(dtype, torch.float32))
        assert relative_rms(value, wanted) < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func(op: str) -> None:
    """grad, jvp of grad, jacfwd, and both under vmap equal those of the reference."""
    inputs = op_cases.draw(op, **SMALL[op])
    tangents = tangents_of(inputs)

    def results(calls: Any) -> list[Tensor]:
        def loss(t: dict[str, Tensor]) -> Tensor:
            return sum(o.square().sum() for o in calls[op](**t))

        first = next(iter(inputs))
        twice = {k: torch.stack([t, 2 * t]) for k, t in inputs.items()}
        gradient = torch.func.grad(loss)(inputs)
        along = torch.func.jvp(torch.func.grad(loss), (inputs,), (tangents,))[1]
        jacobian = torch.func.jacfwd(lambda t: calls[op](**inputs | {first: t})[0].sum(0))(inputs[first])
        mapped = torch.func.vmap(torch.func.grad(loss))(twice)
        return [*gradient.values(), *along.values(), jacobian, *mapped.values()]

    for value, wanted in zip(results(OPS), results(REFERENCES), strict=True):
        assert relative_rms(value, wanted) < 1e-10


def test_forward_mode_of_packed_documents_under_compile() -> None:
    x, tangent = torch.randn(2, 1, 12, 6, dtype=torch.float64)
    weight = torch.randn(6, 3, dtype=torch.float64)
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    wanted = causal_conv(tangent, weight, cu_seqlens=offsets)  # it is linear
    assert (
        relative_rms(torch.func.jvp(lambda v: causal_conv(v, weight, cu_seqlens=offsets), (x,), (tangent,))[1], wanted)
        < 1e-12
    )
    compiled = torch.compile(
        lambda x, t: torch.func.jvp(lambda v: causal_conv(v, weight), (x,), (t,))[1], backend="aot_eager"
    )
    assert relative_rms(compiled(x, tangent), causal_conv(tangent, weight)) < 1e-12


@pytest.mark.parametrize("arch", ["mamba swiglu", "hyena swiglu"])
def test_forward_mode_through_a_model(arch: str) -> None:
    """The derivative along all parameters is what the gradient says."""
    model = HybridLM(arch, vocab_size=8, dim=8).double()
    tokens = torch.randint(8, (2, 9))
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    tangents = tangents_of(parameters)

    def loss(values: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, values, tokens)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    along = torch.func.jvp(loss, (parameters,), (tangents,))[1]
    loss(dict(model.named_parameters())).backward()
    wanted = sum((p.grad * tangents[k]).sum() for k, p in model.named_parameters() if p.grad is not None)
    torch.testing.assert_close(along, wanted)


def test_steps_refuse_tangents_by_name() -> None:
    row, state, filters = torch.zeros(2, 4), torch.zeros(2, 2, 4), torch.zeros(4, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(row, row)
        with pytest.raises(NotImplementedError, match=r"causal_conv_step has no derivative.*; causal_conv has"):
            causal_conv_step(state, dual, filters)
        with pytest.raises(NotImplementedError, match="fft_conv_step has no derivative"):
            fft_conv_step(state, row, filters, post_gate=dual)
        with pytest.raises(NotImplementedError, match="selective_scan_step has no derivative"):
            selective_scan_step(
                forward_ad.make_dual(state.mT.contiguous(), state.mT), row, row, -filters, *state[:2, 0, :3], D=None
            )


def test_cross_entropy_refuses_forward_mode_by_name() -> None:
    x, weight = torch.randn(2, 5, 3), torch.randn(7, 3)
    targets = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy does not go through torch.func"):
        torch.func.jvp(lambda v: linear_cross_entropy(v, weight, targets), (x[0],), (x[1],))
    with (
        pytest.raises(NotImplementedError, match="linear_cross_entropy has no forward-mode derivative"),
        forward_ad.dual_level(),
    ):
        linear_cross_entropy(forward_ad.make_dual(x[0], x[1]), weight, targets)
