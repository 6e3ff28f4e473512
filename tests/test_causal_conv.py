"""What only causal_conv has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

import pytest
import torch
from cases.causal_conv import CASE
from checks import relative_rms, transposed

from madkernels import causal_conv, reference

pytestmark = pytest.mark.usefixtures("backend")


def test_agrees_with_conv1d() -> None:
    inputs = CASE.draw(2, 40, 20, 4)
    x, weight = inputs["x"], inputs["weight"]
    rows, taps = x.double().transpose(1, 2), weight.double().unsqueeze(1)  # in float32 cuDNN may round to TF32
    expected = torch.nn.functional.conv1d(rows, taps, groups=20, padding=3)[..., :40]
    assert relative_rms(causal_conv(x, weight), expected.transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_where_they_are(by_time: bool, value: float) -> None:
    inputs = CASE.draw(1, 40, 20, 4)
    inputs["x"][0, 20, 7] = value
    inputs["x"] = transposed(inputs["x"]) if by_time else inputs["x"]
    out, exact = (f(**inputs, activation="silu") for f in (causal_conv, reference.causal_conv))
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"activation is 'gelu'; it takes None or \"silu\""):
        causal_conv(torch.zeros(1, 2, 3), torch.zeros(3, 2), activation="gelu")
