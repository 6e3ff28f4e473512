"""What only ssd_scan has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.ssd_scan import CASE, CHUNK
from checks import relative_rms

from madkernels import reference, ssd_scan
from madkernels.benchmarks.ssd_scan import CASES, by_selective_scan, recurrence

pytestmark = pytest.mark.usefixtures("backend")


def test_skip_weights_of_each_channel() -> None:
    inputs = CASE.draw(2, 70, 20, 4, 6, 2)
    CASE.check(inputs | {"D": torch.randn(4, 20, device=inputs["x"].device)})


@pytest.fixture
def exact(backend: str) -> Callable[..., Any]:
    """ssd_scan in float64: of a GPU, which does not take it, the reference."""
    return ssd_scan if backend == "cpu" else reference.ssd_scan


@pytest.mark.parametrize("decay", [0.02, 1.0, 16.0])
def test_long_sequences_keep_their_digits(decay: float, exact: Callable[..., Any], backend: str) -> None:
    """Float32 over 8,192 steps, of which the first half decays fast: gradients of exponents too. Fewer where the reference,
    whose backward takes the square of the steps, has to be what is right."""
    steps = 8192 if backend == "cpu" else 1024
    inputs = {k: t.double() for k, t in CASE.draw(1, steps, 8, 2, 4, 1).items()}
    inputs["delta"] = torch.full_like(inputs["delta"], 1e-3)
    inputs["delta"][:, : steps // 2] = decay
    inputs["A"] = -torch.ones_like(inputs["A"])
    found, wanted = ([], [])
    for results, op, dtype in ((found, ssd_scan, torch.float32), (wanted, exact, torch.float64)):
        given = {k: t.to(dtype).requires_grad_() for k, t in inputs.items()}
        out, state = op(**given, return_final_state=True)
        (out.square().sum() + state.sum()).backward()
        results += [out.detach(), state.detach(), *(t.grad for t in given.values())]
    for name, a, b in zip(("out", "state", *inputs), found, wanted, strict=True):
        assert relative_rms(a, b) < 1e-5, name


@pytest.mark.backends("cpu")
def test_float64_is_the_reference_over_long_sequences() -> None:
    """What the test above compares with."""
    inputs = CASE.draw(1, 1500, 4, 2, 3, 1, dtype=torch.float64)
    assert relative_rms(ssd_scan(**inputs), reference.ssd_scan(**inputs)) < 1e-12


def test_gradient_of_step_sizes_where_nothing_lasts(exact: Callable[..., Any]) -> None:
    """The gradient of an exponent is as small as what is left of a step at the next one: no difference of larger sums."""
    inputs = CASE.least(CASE.draw(1, 128, 8, 1, 4, 1))
    inputs["delta"] = torch.ones_like(inputs["delta"])
    grads = []
    for op, dtype in ((ssd_scan, torch.float32), (exact, torch.float64)):
        A = torch.full((1,), -30.0, dtype=dtype, requires_grad=True)
        op(**{k: t.to(dtype) for k, t in inputs.items()} | {"A": A}).square().sum().backward()
        assert A.grad is not None
        grads.append(A.grad.double().item())
    assert abs(grads[0] / grads[1] - 1) < 1e-4


def test_a_reset_forgets_all() -> None:
    """A decay of minus infinity, and what came before it is gone."""
    inputs = CASE.least(CASE.draw(1, 150, 8, 2, 4, 1))
    inputs["delta"] = torch.full_like(inputs["delta"], 1e-3)
    inputs["delta"][:, 100] = torch.inf
    inputs["x"][:, 100] = 0
    inputs["B"][:, 100] = 0
    found = ssd_scan(**inputs)
    assert found[:, :100].isfinite().all()


@pytest.mark.parametrize("name", ["x", "B", "C"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_where_they_are(name: str, value: float, backend: str) -> None:
    """No earlier step, on a GPU of an earlier chunk, no other sequence and no document before or behind has them."""
    reach = 1 if backend == "cpu" else CHUNK
    inputs = CASE.draw(2, 150, 20, 2, 3, 1)
    inputs[name][1, 75] = value
    out, exact = (f(**inputs).isfinite() for f in (ssd_scan, reference.ssd_scan))
    earlier = slice(75 // reach * reach, 75)
    exact[1, earlier] = out[1, earlier]
    assert torch.equal(out, exact)
    packed = CASE.packed((70, 80, 60), 20, 2, 3, 1)
    packed[name][0, 100] = value
    clean = ssd_scan(**packed, **CASE.documents((70, 80, 60))).isfinite()
    assert clean[:, : 70 + 30 // reach * reach].all()
    assert clean[:, 150:].all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda c: c.name)
def test_peers_compute_the_same(case: object) -> None:
    inputs = case.make_inputs(torch.float64)  # type: ignore[attr-defined]
    wanted = ssd_scan(**inputs)
    for peer in (recurrence, by_selective_scan):
        assert relative_rms(peer(**inputs), wanted) < 1e-9
