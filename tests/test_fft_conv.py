"""What only fft_conv has; tests/test_op_contract.py has what every op promises."""

from __future__ import annotations

import backends
import pytest
import torch
from cases.fft_conv import CASE
from checks import relative_error, transposed
from op_cases import offsets_of
from torch import Tensor

from madkernels import _C, fft_conv, reference

pytestmark = pytest.mark.usefixtures("backend")
SIZES = [1, 2, 3, 15, 16, 17, 127, 128, 129, 499, 1023, 1024, 1025, 4096, 4099, 16384]


def by_fft(
    u: Tensor,
    filter: Tensor,
    causal: bool = True,
    initial_state: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """The formula in float64, for sizes where the reference would take long."""
    seqlen, taps = u.shape[1], filter.shape[1]
    v = u.double() if pre_gate is None else u.double() * pre_gate.double()
    history = v if initial_state is None else torch.cat([initial_state.double(), v], dim=1)
    size = history.shape[1] + taps - 1
    spectrum = torch.fft.rfft(history, n=size, dim=1) * torch.fft.rfft(filter.double().T, n=size, dim=0)
    first = history.shape[1] - seqlen if causal else (taps - 1) // 2
    out = torch.fft.irfft(spectrum, n=size, dim=1)[:, first : first + seqlen]
    out = out if skip is None else out + v * skip.double()
    return out if post_gate is None else out * post_gate.double()


def error_of_sums(value: Tensor, exact: Tensor, terms: int) -> float:
    """Relative RMS error of sums of so many terms at unit scale; of one that cancels, relative to what others come to."""
    error = (value.double() - exact).square().mean().sqrt()
    return float(error / exact.square().mean().sqrt().clamp_min(terms**0.5))


@pytest.mark.parametrize("seqlen", SIZES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "centred"])
def test_any_length(causal: bool, seqlen: int) -> None:
    inputs = CASE.least(CASE.draw(2, seqlen, 3, 3, seqlen))
    error = relative_error(fft_conv(**inputs, causal=causal), by_fft(**inputs, causal=causal))
    assert error < 5e-7


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("taps", [1, 64, 1000, 32768, 65537, 100000, 150000])
@pytest.mark.parametrize("seqlen", [65537, 99991, 100000])
def test_long(seqlen: int, taps: int) -> None:
    """With gradients, in float32 and in float64; blocks where the filter is the shorter one."""
    for dtype, allowed in ((torch.float32, 1e-6), (torch.float64, 2e-14)):
        inputs = CASE.least(CASE.draw(1, seqlen, 2, 2, taps, dtype=dtype))
        exact = {k: v.double().requires_grad_() for k, v in inputs.items()}
        found = {k: v.requires_grad_() for k, v in inputs.items()}
        outs = fft_conv(**found), by_fft(**exact)
        weights = torch.randn(outs[0].shape, dtype=dtype)
        assert relative_error(*outs) < allowed
        gradients = [
            torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype))
            for out, leaves in zip(outs, (found, exact), strict=True)
        ]
        (du, dfilter), (exact_du, exact_dfilter) = gradients
        assert relative_error(du, exact_du) < 2 * allowed
        assert error_of_sums(dfilter, exact_dfilter, seqlen) < 3 * allowed


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("lengths", [None, (17000, 2900, 0, 1, 99)], ids=["whole", "packed"])
def test_beyond_shared_memory(by_time: bool, lengths: tuple[int, ...] | None) -> None:
    """On a GPU: transforms of two levels, beside smaller ones where documents are short."""
    seqlen, states = 20000, 2 if lengths is None else 5
    inputs = CASE.draw(2 if lengths is None else 1, seqlen, 3, 3, seqlen)
    inputs["initial_state"] = torch.randn(states, 500, 3).to(backends.device())
    inputs["u"] = transposed(inputs["u"]) if by_time else inputs["u"]
    exact = {k: v.double().requires_grad_() for k, v in inputs.items()}
    found = {k: v.requires_grad_() for k, v in inputs.items()}
    offsets = None if lengths is None else offsets_of(lengths)
    out, state = fft_conv(**found, cu_seqlens=offsets, return_final_state=True)
    if lengths is None:
        wanted = by_fft(**exact)
    else:
        rows = {k: exact[k].split(lengths, dim=1) for k in ("u", "pre_gate", "post_gate")}
        fixed = {k: exact[k] for k in ("filter", "skip")}
        parts = [
            by_fft(**fixed, **{k: v[i] for k, v in rows.items()}, initial_state=exact["initial_state"][i : i + 1])
            for i, length in enumerate(lengths)
            if length
        ]
        wanted = torch.cat(parts, 1)
    assert state.shape == (states, seqlen - 1, 3)
    assert relative_error(out, wanted) < 1e-6
    weights = torch.randn(wanted.shape).to(wanted)
    gradients = [
        torch.autograd.grad(o, list(leaves.values()), weights.to(o.dtype)) for o, leaves in ((out, found), (wanted, exact))
    ]
    errors = {k: relative_error(a, b) for k, a, b in zip(inputs, *gradients, strict=True)}
    assert errors.pop("skip") < 3e-6  # one sum over all steps
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("length", [128, 1024, 4096, 16384, 4099])
def test_as_precise_as_torch_fft(length: int) -> None:
    inputs = CASE.draw(2, length, 16, 16, length)
    u, filter = inputs["u"], inputs["filter"]
    exact = by_fft(u, filter)
    size = 2 * length
    plain = torch.fft.irfft(torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(filter.T, n=size, dim=0), n=size, dim=1)
    assert relative_error(fft_conv(u, filter), exact) < 2 * relative_error(plain[:, :length], exact)


@pytest.mark.parametrize("history", [0, 1, 10, 49])
def test_a_shorter_history(history: int) -> None:
    inputs = CASE.draw(2, 33, 6, 6, 50)
    inputs["initial_state"] = inputs["initial_state"][:, 49 - history :]
    CASE.check(inputs)


@pytest.mark.parametrize("taps", [3, 60])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_reach_no_other_sequence(taps: int, value: float) -> None:
    """By transforms they reach all outputs of their block, those before them too."""
    inputs = CASE.draw(2, 60, 20, 20, taps)
    clean = fft_conv(**inputs)
    inputs["u"][0, 20, 7] = value
    out, exact = fft_conv(**inputs), reference.fft_conv(**inputs)
    assert not out[exact.isnan() | exact.isinf()].isfinite().any()
    out[0, :, 7] = clean[0, :, 7]
    assert torch.equal(out, clean)


def test_opcheck_without_the_final_state() -> None:
    arguments = CASE.dispatcher_arguments(CASE.draw(1, 4, *CASE.small) | {"with_final_state": False})
    torch.library.opcheck(torch.ops.madkernels.fft_conv.default, arguments)


@pytest.mark.backends("cpu")
def test_plans() -> None:
    """Short filters are summed, long ones transformed; no length costs far more than the power of two below it."""
    assert _C.fft_conv_plan(4096, 4)["points"] == 0
    assert _C.fft_conv_plan(4096, 4096) == {"points": 4096, "outputs": 4096, "taps": 4096}
    assert _C.fft_conv_plan(4099, 4099)["points"] <= 4800
    assert _C.fft_conv_plan(100, 5000)["taps"] == 100
    assert _C.fft_conv_plan(100, 5000, 300)["taps"] == 400
    long = _C.fft_conv_plan(1_000_000, 1000)
    assert 1000 < long["points"] < 20_000
    assert long["outputs"] == 2 * long["points"] - 999
    for length in range(1, 3000, 7):
        plan = _C.fft_conv_plan(length, length)
        assert plan["points"] == 0 or length <= plan["points"] <= max(1.34 * length, 64)


@pytest.mark.backends("cpu")
def test_plans_of_gpus() -> None:
    """One class that fits, or with packed documents a class for every length; memory and blocks as the sizes ask."""
    assert _C.fft_conv_plan_gpu(4096, 4096)["classes"] == [(4096, 4096, 4096)]
    assert _C.fft_conv_plan_gpu(4097, 4097)["classes"] == [(8192, 4097, 4097)]
    assert _C.fft_conv_plan_gpu(100, 5000)["classes"] == [(128, 100, 100)]
    assert _C.fft_conv_plan_gpu(100, 5000, history=300)["classes"] == [(256, 100, 400)]
    assert _C.fft_conv_plan_gpu(1000, 64, causal=False)["classes"] == [(1024, 1000, 64)]
    packed = _C.fft_conv_plan_gpu(3000, 3000, packed=True, sequences=7)
    assert [points for points, _, _ in packed["classes"]] == [32, 64, 128, 256, 512, 1024, 2048, 4096]
    longest = [length for _, length, _ in packed["classes"]]
    assert longest == sorted(longest)
    assert longest[-1] == 3000
    for seqlen in range(1, 5000, 7):
        plan = _C.fft_conv_plan_gpu(seqlen, seqlen)
        assert [seqlen <= points < max(2 * seqlen, 33) for points, _, _ in plan["classes"]] == [True]
        assert plan["on_chip"] == 1
        assert plan["work_points"] == plan["more_work_points"] == 0


@pytest.mark.backends("cpu")
def test_plans_of_gpus_that_differ() -> None:
    """Shared memory decides where two levels begin, the multiprocessors into how many slices a backward is cut."""
    small = 99 << 10
    assert _C.fft_conv_plan_gpu(16384, 16384)["on_chip"] == 1
    two_level = _C.fft_conv_plan_gpu(16384, 16384, shared_bytes=small, dim=3)
    assert (two_level["on_chip"], two_level["chunk"], two_level["work_points"]) == (0, 3, 3 * 16384)
    assert _C.fft_conv_plan_gpu(1 << 22, 1 << 22)["classes"] == [(1 << 22, 1 << 22, 1 << 22)]
    assert _C.fft_conv_plan_gpu((1 << 22) + 1, (1 << 22) + 1)["classes"] == []
    assert _C.fft_conv_plan_gpu(1 << 22, 1 << 22, shared_bytes=small)["classes"] == []
    short = _C.fft_conv_plan_gpu(500, 500, dim=64, sequences=100, backward=True)
    assert (short["channels"], short["slices"]) == (16, 66)
    assert short["work_points"] == 64 * 66 * 512
    assert _C.fft_conv_plan_gpu(500, 500, dim=64, sequences=100, multiprocessors=20, backward=True)["slices"] == 10
    assert not short["copies_to_time"]
    assert _C.fft_conv_plan_gpu(4096, 4096)["copies_to_time"]  # two channels of float32 are 8 bytes
    assert not _C.fft_conv_plan_gpu(4096, 4096, time_contiguous=True)["copies_to_time"]


def test_refuses_a_state_of_what_is_not_causal() -> None:
    inputs = CASE.draw(2, 5, 4, 4, 7)
    with pytest.raises(RuntimeError, match="initial_state is given to a convolution that is not causal"):
        fft_conv(**inputs, causal=False)
    del inputs["initial_state"]
    with pytest.raises(RuntimeError, match="the final state is asked for of a convolution that is not causal"):
        fft_conv(**inputs, causal=False, return_final_state=True)
