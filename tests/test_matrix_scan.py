"""What only matrix_scan has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.matrix_scan import CASE
from checks import relative_rms
from torch import Tensor

from madkernels import matrix_scan, reference
from madkernels.benchmarks.matrix_scan import CASES, MatrixCase, chunks

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.backends("cpu")]

FORMS = {"linear": ("beta", "bonus"), "bonus": ("beta",), "delta": ("bonus",), "both": ()}  # without which arguments
each_form = pytest.mark.parametrize("absent", FORMS.values(), ids=FORMS)


def draw(absent: tuple[str, ...], *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {k: t for k, t in CASE.draw(*shape, dtype=dtype).items() if k not in absent}


def results_and_gradients(op: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    given = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.items()}
    out, state = op(**given, return_final_state=True)
    (out.square().sum() + state.sum()).backward()
    gradients = {f"d{k}": t.grad for k, t in given.items() if t.grad is not None}
    return {"out": out.detach(), "state": state.detach()} | gradients


@each_form
@pytest.mark.parametrize("key_dim", [1, 16, 17, 32, 48, 64, 128, 129])
def test_every_number_of_vectors(key_dim: int, absent: tuple[str, ...]) -> None:
    for decay_dim in {1, key_dim}:
        CASE.check(draw(absent, 2, 35, 19, 1, 2, key_dim, decay_dim))


@each_form
@pytest.mark.parametrize("strength", [0.0, 0.01, 30.0, 1000.0])
def test_long_sequences_keep_their_digits(strength: float, absent: tuple[str, ...]) -> None:
    """Float32 over 8,192 steps, of which the first half decays so fast: gradients of decays too."""
    inputs = draw(absent, 1, 8192, 6, 1, 2, 8, 8, dtype=torch.float64)
    inputs["log_decay"][:, :4096] *= strength
    inputs["log_decay"][:, 4096:] *= 0.01
    found, wanted = (results_and_gradients(matrix_scan, inputs, dtype) for dtype in (torch.float32, torch.float64))
    for name in wanted:
        assert relative_rms(found[name], wanted[name]) < 1e-5, name


@each_form
def test_float64_is_the_reference_over_long_sequences(absent: tuple[str, ...]) -> None:
    """What the test above compares with."""
    inputs = draw(absent, 1, 400, 4, 1, 2, 3, 3, dtype=torch.float64)
    found, wanted = (results_and_gradients(op, inputs, torch.float64) for op in (matrix_scan, reference.matrix_scan))
    for name in wanted:
        assert relative_rms(found[name], wanted[name]) < 1e-12, name


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resets(absent: tuple[str, ...], dtype: torch.dtype) -> None:
    """Log decays of -1000 and of -inf, of one channel or of all, at edges of chunks and within."""
    inputs = draw(absent, 1, 70, 5, 1, 2, 9, 9, dtype=dtype)
    for t in (0, 31, 32, 40, 69):
        inputs["log_decay"][0, t, 0] = -torch.inf
        inputs["log_decay"][0, t, 1, 3:5] = -1000.0
    CASE.check(inputs)


def test_what_is_forgotten_leaves_no_trace() -> None:
    inputs = draw(("beta", "bonus"), 1, 60, 5, 1, 2, 9, 9)
    inputs["log_decay"][0, 30] = -torch.inf
    late = {k: t[:, 30:] for k, t in inputs.items() if k != "initial_state"}
    assert torch.equal(matrix_scan(**inputs)[:, 30:], matrix_scan(**late, initial_state=0 * inputs["initial_state"]))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_where_they_are(name: str, value: float) -> None:
    """No earlier step, no other sequence and no document before or behind has them."""
    inputs = draw((), 2, 60, 20, 1, 2, 3, 3)
    inputs[name][1, 35] = value
    found, exact = (f(**inputs).isfinite() for f in (matrix_scan, reference.matrix_scan))
    assert torch.equal(found, exact)
    packed = CASE.packed((20, 30, 10), 20, 1, 2, 3, 3)
    packed[name][0, 35] = value
    clean = matrix_scan(**packed, **CASE.documents((20, 30, 10))).isfinite()
    assert clean[:, :35].all()
    assert clean[:, 50:].all()


@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda c: c.name)
def test_peers_compute_the_same(case: MatrixCase) -> None:
    inputs = case.make_inputs(torch.float64)
    assert relative_rms(chunks(**inputs), matrix_scan(**inputs)) < 1e-9
