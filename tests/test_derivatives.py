"""Derivatives beside a plain backward: forward mode, and torch.func's, of every op; what has none says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES
from checks import Function, relative_rms
from op_cases import Inputs, OpCase, Options
from torch import Tensor
from torch.autograd import forward_ad

from madkernels import causal_conv
from madkernels.fused import linear_cross_entropy
from madkernels.models import HybridLM


@pytest.fixture(params=CASES.values(), ids=CASES)
def op(request: pytest.FixtureRequest) -> OpCase:
    case: OpCase = request.param
    return case


@pytest.mark.parametrize(
    ("op", "options"), [pytest.param(op, o, id=f"{op.name}-{o}") for op in CASES.values() for o in op.variants]
)
def test_derivatives_agree_with_differences(op: OpCase, options: Options) -> None:
    """First and second ones, in reverse and forward mode, of outputs and states in every argument."""
    inputs = op.fit(op.draw(2, 5, *op.small, dtype=torch.float64), options)
    values = tuple(t.requires_grad_() for t in inputs.values())

    def call(*tensors: Tensor) -> Any:
        return op.call(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(call, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, values, check_fwd_over_rev=True)


def test_second_derivatives_where_gradients_depend_on_inputs(op: OpCase) -> None:
    """As of a loss that is not linear in the output: what is given to the backward has a graph to the same inputs."""
    inputs = {k: t.requires_grad_() for k, t in op.draw(2, 5, *op.small, dtype=torch.float64).items()}

    def second(function: Function) -> list[Tensor]:
        loss = torch.stack([t.square().sum() for t in function(**inputs, **op.options)]).sum()
        first = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
        return list(torch.autograd.grad(torch.stack([t.square().sum() for t in first]).sum(), list(inputs.values())))

    for value, wanted in zip(second(op.call), second(op.reference), strict=True):
        assert relative_rms(value, wanted) < 1e-10


@pytest.mark.parametrize("op", [op for op in CASES.values() if op.has_documents], ids=lambda op: op.name)
def test_second_derivatives_of_packed_documents(op: OpCase) -> None:
    """Of the output alone: the state then has no gradient."""
    inputs = {k: t.requires_grad_() for k, t in op.packed((1, 3), *op.small, dtype=torch.float64).items()}
    first = op.names("seqlen")[0]

    def call(value: Tensor) -> Tensor:
        return op.call(**inputs | {first: value}, **op.options, **op.documents((1, 3)))[0]

    assert torch.autograd.gradgradcheck(call, (inputs[first],))


def tangents_of(inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(7)
    return {k: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for k, t in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_jvp_is_the_reference_s(op: OpCase, dtype: torch.dtype) -> None:
    inputs = op.draw(2, 40, *op.little, dtype=dtype)
    tangents = tangents_of(inputs)

    def along(function: Function, *given: Inputs) -> Any:
        return torch.func.jvp(lambda t: function(**t, **op.options), given[:1], given[1:])[1]

    found = along(op.call, inputs, tangents)
    exact = along(op.reference, *({k: t.double() for k, t in given.items()} for given in (inputs, tangents)))
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype in (dtype, torch.promote_types(dtype, torch.float32))
        assert relative_rms(value, wanted) < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


def test_transforms_of_torch_func(op: OpCase) -> None:
    """grad, jvp of grad, jacfwd, and both under vmap equal those of the reference."""
    inputs = op.draw(2, 5, *op.small, dtype=torch.float64)
    tangents = tangents_of(inputs)

    def results(function: Function) -> list[Tensor]:
        def loss(t: Inputs) -> Any:
            return sum(o.square().sum() for o in function(**t, **op.options))

        first = next(iter(inputs))
        twice = {k: torch.stack([t, 2 * t]) for k, t in inputs.items()}
        gradient = torch.func.grad(loss)(inputs)
        along = torch.func.jvp(torch.func.grad(loss), (inputs,), (tangents,))[1]
        jacobian = torch.func.jacfwd(lambda t: function(**inputs | {first: t}, **op.options)[0].sum(0))(inputs[first])
        mapped = torch.func.vmap(torch.func.grad(loss))(twice)
        return [*gradient.values(), *along.values(), jacobian, *mapped.values()]

    for value, wanted in zip(results(op.call), results(op.reference), strict=True):
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


@pytest.mark.parametrize("op", [op for op in CASES.values() if op.has_state], ids=lambda op: op.name)
def test_steps_refuse_tangents_by_name(op: OpCase) -> None:
    """Of the state and of every input."""
    inputs = op.rows_at(op.draw(2, 1, *op.small), 0)
    inputs["state"] = inputs.pop("initial_state")
    with forward_ad.dual_level():
        for name, value in inputs.items():
            dual = forward_ad.make_dual(value, value)
            with pytest.raises(NotImplementedError, match=rf"{op.name}_step has no derivative.*; {op.name} has"):
                op.step(**inputs | {name: dual})


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
