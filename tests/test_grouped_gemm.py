"""What only grouped_gemm has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
from cases.grouped_gemm import CASE, offsets_of
from checks import check, relative_rms
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from madkernels import grouped_gemm, reference

pytestmark = pytest.mark.usefixtures("backend")
on_cpu = pytest.mark.backends("cpu")  # where offsets and indices are looked at, and float64 is taken


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=backends.device())


def drawn(rows: int = 20, groups: int = 3, outputs: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (rows, 4), "weight": (groups, outputs, 4), "bias": (groups, outputs)}
    return {k: torch.randn(shape, dtype=dtype, device=backends.device()) for k, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(1, 1), (7, 40), (40, 7), (129, 1000), (1000, 129), (33, 47), (16, 49)], ids=str)
def test_any_widths(widths: tuple[int, int], dtype: torch.dtype) -> None:
    """Odd numbers of outputs too, which only an activation without a gate can have."""
    inputs, outputs = widths
    weight, bias = torch.randn(3, outputs, inputs) / inputs**0.5, torch.randn(3, outputs)
    given = {
        k: t.to(backends.device(), dtype) for k, t in {"x": torch.randn(70, inputs), "weight": weight, "bias": bias}.items()
    }
    op, plain = CASE.whole(grouped_gemm), CASE.whole(reference.grouped_gemm)
    for activation in (None, "silu"):
        check(op, plain, given, slack=CASE.slack(dtype), offsets=offsets(1, 1, 40, 66), activation=activation)


@on_cpu
def test_transposed_weights_are_the_same_in_any_layout() -> None:
    given, some = drawn(dtype=torch.float64), offsets(0, 5, 5, 20)
    plain = grouped_gemm(**given, offsets=some)
    for matrices in (given["weight"].mT, given["weight"].mT.contiguous()):
        assert relative_rms(grouped_gemm(**given | {"weight": matrices}, offsets=some, transpose=True), plain) < 1e-15


def test_rows_of_no_group_are_zero() -> None:
    """Whatever they hold, and so are their gradients."""
    given = drawn()
    given["x"][:2], given["x"][18:] = torch.nan, torch.inf
    leaves = {k: t.requires_grad_() for k, t in given.items()}
    y = grouped_gemm(**leaves, offsets=offsets(2, 9, 9, 18), activation="swiglu")
    assert y[:2].eq(0).all()
    assert y[18:].eq(0).all()
    grads = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert grads[0][:2].eq(0).all()
    assert grads[0][18:].eq(0).all()
    assert all(g.isfinite().all() for g in grads)
    assert grads[1][1].eq(0).all()  # of a group without rows


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(value: float) -> None:
    given = drawn()
    options: dict[str, Any] = {"offsets": offsets(0, 9, 9, 20), "activation": "swiglu"}
    plain = grouped_gemm(**given, **options)
    given["x"][5, 1] = value
    y, exact = (function(**given, **options) for function in (grouped_gemm, reference.grouped_gemm))
    others = torch.arange(20, device=backends.device()) != 5
    assert torch.equal(y[others], plain[others])
    assert torch.equal(y.isnan(), exact.isnan())


def test_groups_do_not_depend_on_each_other() -> None:
    """All rows in one group, or in many: the bits of a row are the same."""
    x, weight = (torch.randn(shape, device=backends.device()) for shape in ((1200, 60), (60, 60)))
    alone = grouped_gemm(x, weight.expand(1, 60, 60), offsets(0, 1200))
    apart = grouped_gemm(x, weight.expand(5, 60, 60), offsets(0, 0, 1, 700, 700, 1200))
    assert torch.equal(alone, apart)


@on_cpu
def test_a_row_can_be_gathered_often() -> None:
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    gather = offsets(2, 2, -1, 0, 2, 0)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_gemm(x, weight, offsets(0, 4, 6), gather=gather, activation="silu")

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), weight.requires_grad_()))
    assert call(x, weight)[2].eq(0).all()


# Changes are made where the test runs.
Change = Callable[[], dict[str, Any]]
SHAPES_AND_DTYPES: list[tuple[Change, str]] = [
    (lambda: {"offsets": offsets(0, 20)}, r"offsets has shape \(2,\); expected \(4,\)"),
    (lambda: {"offsets": offsets(0, 5, 9, 20).long()}, "offsets has dtype int64; with x in float32 it takes int32"),
    (lambda: {"gather": offsets(*[0] * 20).long()}, "gather has dtype int64"),
    (lambda: {"activation": "tanh"}, 'activation is "tanh"; it takes silu, gelu, relu, relu2, swiglu, geglu, reglu, or'),
]
VALUES: list[tuple[Change, str]] = [
    (lambda: {"offsets": offsets(-1, 5, 9, 20)}, "offsets starts with -1; expected 0 at least"),
    (lambda: {"offsets": offsets(0, 9, 5, 20)}, "offsets falls from 9 to 5 at index 2"),
    (lambda: {"offsets": offsets(0, 5, 9, 21)}, "offsets ends with 21; there are 20 rows"),
    (lambda: {"gather": offsets(*[20] * 20)}, "gather names 20; expected -1 to 19"),
]


def check_refusal(change: Change, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"grouped_gemm: {message}"):
        grouped_gemm(**drawn() | {"offsets": offsets(0, 5, 9, 20)} | change())


@pytest.mark.parametrize(("change", "message"), SHAPES_AND_DTYPES)
def test_refuses_what_does_not_fit(change: Change, message: str) -> None:
    check_refusal(change, message)


@on_cpu
@pytest.mark.parametrize(("change", "message"), VALUES)
def test_refuses_values_that_make_no_groups(change: Change, message: str) -> None:
    check_refusal(change, message)


def test_h_is_kept_for_a_backward_alone() -> None:
    given = [drawn()[k] for k in ("x", "weight")]
    arguments = (offsets_of(20, 3).to(backends.device()), None, None, "silu", False)
    assert torch.ops.madkernels.grouped_gemm(*given, *arguments, False)[1].shape == (0,)
    y, h = torch.ops.madkernels.grouped_gemm(given[0].requires_grad_(), given[1], *arguments, True)
    assert h.shape == (20, 6)
    assert y.requires_grad
    assert not h.requires_grad


def test_flops_are_counted() -> None:
    given = {k: t.requires_grad_() for k, t in drawn().items()}
    with FlopCounterMode(display=False) as counter:
        y = grouped_gemm(**given, offsets=offsets(0, 5, 9, 20), activation="swiglu")
        assert counter.get_total_flops() == 2 * 20 * 6 * 4
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 20 * 6 * 4
