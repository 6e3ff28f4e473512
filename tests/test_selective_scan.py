"""What only selective_scan has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

import backends
import pytest
import torch
from cases.selective_scan import CASE, mean_error_of_exp2
from checks import relative_rms

import madkernels
from madkernels import _C, reference, selective_scan
from madkernels.ops.selective_scan import CHUNK

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.backends("ptx", "cuda")
def test_mean_error_of_exp2() -> None:
    assert abs(mean_error_of_exp2()) <= 2**-22  # the largest single error, says CUDA
    if backends.device().type != "cuda":
        assert abs(mean_error_of_exp2()) <= 1e-9


def test_projections_without_groups() -> None:
    inputs = CASE.draw(2, 20, 8, 4, 1)
    CASE.check(inputs | {name: inputs[name].squeeze(2) for name in "BC"})


@pytest.mark.backends("cpu")
def test_projections_without_groups_are_mapped() -> None:
    inputs = CASE.draw(2, 20, 8, 4, 1, maps=(3,))
    without = inputs | {name: inputs[name].squeeze(3) for name in "BC"}
    found, wanted = (torch.func.vmap(lambda t: selective_scan(**t))(given) for given in (without, inputs))
    assert relative_rms(found, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_exponents(dtype: torch.dtype) -> None:
    """Decays to zero, growth past overflow, and what lies between, as the reference has them."""
    inputs = CASE.least(CASE.draw(1, 6, 40, 2, 1, dtype=dtype))
    inputs["delta"] = inputs["delta"].abs() * 0 + 1
    inputs["A"] = torch.linspace(-200, 200, 80, dtype=dtype, device=backends.device()).view(40, 2) * (
        1 if dtype == torch.float32 else 8
    )
    out, exact = (f(**inputs) for f in (selective_scan, reference.selective_scan))
    assert out.isinf().any()
    assert torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(out.isnan(), exact.isnan())
    finite = exact.isfinite()
    torch.testing.assert_close(out[finite], exact[finite], rtol=3e-5, atol=1e-30)


@pytest.mark.parametrize("name", CASE.arguments)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_propagate(name: str, value: float) -> None:
    inputs = CASE.draw(1, 40, 20, 3, 1)
    inputs[name].view(-1)[inputs[name].numel() // 2] = value
    out, exact = (f(**inputs, delta_softplus=True) for f in (selective_scan, reference.selective_scan))
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert torch.equal(out.isnan(), exact.isnan())


def test_softplus_is_accurate_far_from_zero() -> None:
    inputs = CASE.least(CASE.draw(1, 1, 200, 1, 1))
    inputs["delta"] = torch.linspace(-30, 30, 200, device=backends.device()).view(1, 1, 200)
    inputs["A"].zero_()
    CASE.check(inputs)


def test_inference_saves_no_checkpoints() -> None:
    inputs = CASE.draw(1, 40, 12, 3, 1)
    for save, shape in ((False, (0,)), (True, (2, 3, 12))):
        arguments = CASE.dispatcher_arguments(inputs | {"save_checkpoints": save})
        assert torch.ops.madkernels.selective_scan(*arguments)[2].shape == shape


@pytest.mark.backends("cpu")
def test_split_of_gpus() -> None:
    """Time is cut where batch and channels do not fill the GPU, into segments of whole chunks."""
    assert _C.selective_scan_split(8, 4096, 8192) == {"segments": 1, "rows": 4096}
    assert _C.selective_scan_split(1, 700, 64) == {"segments": 1, "rows": 700}
    assert _C.selective_scan_split(1, 0, 64) == {"segments": 0, "rows": 0}
    for seqlen in (1000, 8192, 8193, 100_001):
        split = _C.selective_scan_split(1, seqlen, 1024, multiprocessors=108)
        assert split["segments"] >= 3
        assert split["rows"] % CHUNK == 0
        assert (split["segments"] - 1) * split["rows"] < seqlen <= split["segments"] * split["rows"]


@pytest.mark.backends("cpu")
def test_instruction_set_is_a_supported_one() -> None:
    assert _C.cpu_isa() == _C.cpu_supported()[-1] or _C.cpu_isa() in _C.cpu_supported()
    assert madkernels.__version__ == _C.build_info()["version"]
