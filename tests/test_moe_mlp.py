"""What only moe_mlp has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

from typing import Any

import backends
import pytest
import torch
from cases.moe_mlp import CASE
from checks import check, relative_rms, with_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from madkernels import moe_mlp, reference
from madkernels.benchmarks.moe_mlp import Plan, grouped_mm, plan_of

pytestmark = pytest.mark.usefixtures("backend")
on_cpu = pytest.mark.backends("cpu")  # where the plan is looked at


def drawn(tokens: int, *sizes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of sizes dim, hidden, experts, top_k."""
    return CASE.draw(1, tokens, *sizes, dtype=dtype)


def with_plan(function: Any, chosen: Tensor, **options: Any) -> Any:
    """The op, or its reference, over a plan, as a function of tensors."""

    def call(weights: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, **rest: Tensor) -> tuple[Tensor]:
        return (function(x, plan_of(weights, chosen.to(x.device), gate_up.shape[0]), gate_up, down, **rest, **options),)

    return call


def random_choices(tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts).topk(top_k).indices


CHOICES = {
    "one expert has all": torch.full((1300, 1), 3),
    "every expert has all": torch.arange(5).expand(70, 5),
    "the last alone": torch.full((1, 1), 4),
    "dropped": torch.full((20, 2), 5),
    "none": torch.zeros(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_uneven_plans(chosen: Tensor) -> None:
    inputs = drawn(len(chosen), 24, 20, 5, chosen.shape[1])
    check(with_plan(moe_mlp, chosen), with_plan(reference.moe_mlp, chosen), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_beside_those_of_torch(dtype: torch.dtype) -> None:
    """At most twice those of the same by torch's grouped product in that dtype, in the output and in every gradient."""
    inputs, chosen = drawn(300, 64, 96, 8, 3, dtype=dtype), random_choices(300, 8, 3)
    inputs = {k: t for k, t in inputs.items() if not k.endswith("bias")}

    def composed(weights: Tensor, x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor]:
        plan = plan_of(weights, chosen.to(x.device), 8)
        slots = {"offsets": plan.offsets, "slots": plan.slots, "rows": plan.rows}
        return (grouped_mm(x, weights, gate_up, down, **slots, activation="swiglu"),)

    exact = with_gradients(with_plan(reference.moe_mlp, chosen), {k: t.double() for k, t in inputs.items()})
    found, other = with_gradients(with_plan(moe_mlp, chosen), inputs), with_gradients(composed, inputs)
    for name, value in found.items():
        assert relative_rms(value, exact[name]) <= 2 * relative_rms(other[name], exact[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_token(dtype: torch.dtype) -> None:
    """And the gradients of x stay in the tokens of a gradient that is NaN."""
    inputs, chosen = drawn(50, 24, 20, 5, 2, dtype=dtype), random_choices(50, 5, 2)
    call, others = with_plan(moe_mlp, chosen), torch.arange(50, device=backends.device()) != 17
    plain = with_gradients(call, inputs)
    inputs["x"][17, 3] = torch.nan
    (y,) = call(**inputs)
    assert y[17].isnan().all()
    assert torch.equal(y[others], plain["output 0"][others])
    found = with_gradients(lambda **t: (torch.where(others.unsqueeze(-1), call(**t)[0], 0),), inputs)
    assert torch.equal(found["dx"][others], plain["dx"][others])


def test_a_dropped_choice_has_no_gradient() -> None:
    inputs, chosen = drawn(6, 8, 5, 3, 2), torch.tensor([[0, 1], [1, 3], [3, 2], [3, 3], [2, 0], [0, 2]])
    found = with_gradients(with_plan(moe_mlp, chosen), inputs)
    assert torch.equal(found["dweights"] == 0, chosen.to(backends.device()) == 3)
    assert found["output 0"][3].eq(0).all()


def test_keeps_x_and_h_alone() -> None:
    """Beside the plan and the parameters: nothing that experts make of h is remembered."""
    inputs = {k: t.requires_grad_() for k, t in drawn(50, 24, 20, 5, 2).items()}
    plan = plan_of(inputs["weights"], random_choices(50, 5, 2).to(backends.device()), 5)
    rest = {k: t for k, t in inputs.items() if k not in ("x", "weights")}
    known = {t.data_ptr() for t in (*inputs.values(), *plan)}
    kept: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        kept.extend([t.shape] if t.data_ptr() not in known else [])
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_mlp(inputs["x"], plan, **rest)
    assert kept == [(100, 40)]


def a_plan(**change: Any) -> Plan:
    chosen = torch.tensor([[0, 1], [1, 0], [1, 2], [0, 3]], device=backends.device())
    moved = {k: t.to(backends.device()) for k, t in change.items()}
    return plan_of(torch.rand(4, 2, device=backends.device()), chosen, 3)._replace(**moved)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


PLANS: list[tuple[dict[str, Tensor], str]] = [
    ({"slots": ints(0, 1, 2)}, r"slots has shape \(3,\); expected \(8,\)"),
    ({"rows": torch.zeros(4, 2, dtype=torch.int64)}, "rows has dtype int64; with x in float32 it takes int32"),
]
CONTRADICTIONS: list[tuple[dict[str, Tensor], str]] = [
    ({"offsets": ints(0, 3, 6, 9)}, "offsets ends with 9; there are 8 rows"),
    ({"offsets": ints(0, 3, 2, 7)}, "offsets falls from 3 to 2 at index 2"),
    ({"offsets": ints(0, 3, 6, 8)}, r"slots\[7\] is -1, but offsets gives the row to an expert"),
    ({"slots": ints(0, 8, 1, 2, 3, 4, 5, 6)}, "slots names 8; expected -1 to 7"),
    ({"rows": ints([0, 1], [2, 3], [4, 5], [6, 8])}, "rows names 8; expected -1 to 7"),
]


def check_refusal(change: dict[str, Tensor], message: str) -> None:
    x, gate_up, down = (torch.zeros(shape, device=backends.device()) for shape in ((4, 6), (3, 10, 6), (3, 6, 5)))
    with pytest.raises(RuntimeError, match=f"moe_mlp: {message}"):
        moe_mlp(x, a_plan(**change), gate_up, down)


@pytest.mark.parametrize(("change", "message"), PLANS)
def test_refuses_a_plan_that_does_not_fit(change: dict[str, Tensor], message: str) -> None:
    check_refusal(change, message)


@on_cpu
@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS)
def test_refuses_a_plan_that_contradicts_itself(change: dict[str, Tensor], message: str) -> None:
    check_refusal(change, message)


def test_flops_are_counted() -> None:
    inputs = {k: t.requires_grad_() for k, t in drawn(50, 24, 20, 5, 2).items()}
    with FlopCounterMode(display=False) as counter:
        (y,) = with_plan(moe_mlp, random_choices(50, 5, 2))(**inputs)
        assert counter.get_total_flops() == 6 * 100 * 24 * 20
        y.sum().backward()
    assert counter.get_total_flops() == 18 * 100 * 24 * 20
