"""flash-fft-conv's modules against convolutions by FFT and by torch.nn.Conv1d in float64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, relative_error
from torch import Tensor, nn

from madkernels.compat import flashfftconv
from madkernels.compat.flashfftconv import FlashDepthWiseConv1d, FlashFFTConv

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def circle(
    u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None, *, seqlen: int
) -> tuple[Tensor]:
    """By an FFT of so many points, in float32 at least."""
    wide = torch.promote_types(u.dtype, torch.float32)
    v = u.to(wide) if pregate is None else u.to(wide) * pregate.to(wide)
    spectrum = torch.fft.rfft(v, n=seqlen) * torch.fft.rfft(k.to(torch.promote_types(k.dtype, torch.float32)), n=seqlen)
    out = torch.fft.irfft(spectrum, n=seqlen)[..., : u.shape[2]]
    return ((out if postgate is None else out * postgate.to(wide)).to(u.dtype),)


def convolved(
    u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None, *, seqlen: int
) -> tuple[Tensor]:
    return (FlashFFTConv(seqlen)(u, k, pregate, postgate),)


def draw(
    length: int, filter_len: int, dtype: torch.dtype, *, gates: bool, per_sequence: bool, batch: int = 2, dim: int = 3
) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    shape = (batch, dim, filter_len) if per_sequence else (dim, filter_len)
    inputs: dict[str, Tensor | None] = {"u": torch.randn(batch, dim, length).to(dtype), "k": torch.randn(shape) / 5}
    if gates:
        inputs |= {name: torch.randn(batch, dim, length).to(dtype) for name in ("pregate", "postgate")}
    return inputs


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize(
    ("length", "filter_len"),
    [
        (256, 256),  # a circle
        (128, 128),  # causal
        (200, 57),  # the last that comes to the end and not around
        (200, 58),
        (200, 256),
        (256, 1),
        (256, 300),  # more of a filter than the FFT has
        (7, 256),
    ],
)
def test_fft_convolution_and_its_gradients(
    length: int, filter_len: int, gates: bool, per_sequence: bool, dtype: torch.dtype
) -> None:
    inputs = draw(length, filter_len, dtype, gates=gates, per_sequence=per_sequence)
    check(convolved, circle, inputs, seqlen=256, slack=1e-6)


@pytest.mark.parametrize("seqlen", [512, 2048, 16384])
def test_long_circles(seqlen: int) -> None:
    inputs = draw(seqlen, seqlen, torch.float32, gates=True, per_sequence=False)
    check(convolved, circle, inputs, seqlen=seqlen, slack=1e-6)


@pytest.mark.parametrize("of_filter", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_filters_of_any_dtype(dtype: torch.dtype, of_filter: torch.dtype) -> None:
    inputs = draw(256, 256, dtype, gates=True, per_sequence=False)
    inputs["k"] = inputs["k"].to(of_filter)
    check(convolved, circle, inputs, seqlen=256, slack=1e-6)


def test_views_and_autocast_change_nothing() -> None:
    inputs = draw(256, 256, torch.float32, gates=True, per_sequence=True)
    (told,) = convolved(*inputs.values(), seqlen=256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(convolved(*inputs.values(), seqlen=256)[0], told)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs.values()]
    torch.testing.assert_close(convolved(*turned, seqlen=256)[0], told)
    one = inputs["u"][:1].expand(2, -1, -1)
    torch.testing.assert_close(
        convolved(one, *list(inputs.values())[1:], seqlen=256)[0],
        convolved(one.clone(), *list(inputs.values())[1:], seqlen=256)[0],
    )


def test_compiled_in_one_graph() -> None:
    inputs = draw(256, 256, torch.bfloat16, gates=True, per_sequence=True)
    short = FlashDepthWiseConv1d(3, 3, 1, torch.randn(3, 1, 3), torch.randn(3))
    for module, given in ((FlashFFTConv(256), list(inputs.values())), (short, [inputs["u"]])):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*given), module(*given))


def test_tables_of_the_package_are_passed_over() -> None:
    model = nn.Sequential(FlashFFTConv(256, dtype=torch.bfloat16), nn.Linear(2, 2))
    assert list(model.state_dict()) == ["1.weight", "1.bias"]
    theirs = {
        "0.f_sqrt_N_fft": torch.zeros(16, 16, 2),
        "0.twiddle_factors_fft": torch.zeros(16, 16, 2),
        "0.twid": torch.zeros(2),
    }
    model.load_state_dict(theirs | model.state_dict())
    FlashFFTConv(256).load_state_dict({"f_16_fft_real": torch.zeros(16, 16)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.filter"):
        model.load_state_dict(theirs | model.state_dict() | {"0.filter": torch.zeros(2)})


# ---- short convolutions ----


def direct(input: Tensor, weight: Tensor, bias: Tensor, *, padding: int) -> tuple[Tensor]:
    wide = torch.promote_types(input.dtype, torch.float32)
    out = F.conv1d(input.to(wide), weight.to(wide), bias.to(wide), padding=padding, groups=len(bias))
    return (out.to(input.dtype),)


@pytest.mark.parametrize("of_weights", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kernel_size", "padding"), [(3, 1), (7, 3), (5, 0), (3, 2), (3, 4), (1, 0), (11, 10)])
@pytest.mark.parametrize("is_bhl", [True, False])
def test_short_convolution_and_its_gradients(
    is_bhl: bool, kernel_size: int, padding: int, dtype: torch.dtype, of_weights: torch.dtype
) -> None:
    torch.manual_seed(0)
    dim = 6
    inputs: dict[str, Tensor | None] = {"input": torch.randn(2, dim, 33).to(dtype)}
    inputs |= {"weight": torch.randn(dim, 1, kernel_size).to(of_weights), "bias": torch.randn(dim).to(of_weights)}

    def op(input: Tensor, weight: Tensor, bias: Tensor, padding: int) -> tuple[Tensor]:
        module = FlashDepthWiseConv1d(dim, kernel_size, padding, weight, bias, is_bhl)
        weights = weight[:, 0] if is_bhl else weight[:, 0].T
        assert torch.equal(module.weights, weights)
        given = (input if is_bhl else input.transpose(1, 2),)
        out = torch.func.functional_call(module, {"weights": weights, "bias": bias}, given)
        return (out if is_bhl else out.transpose(1, 2),)

    check(op, direct, inputs, padding=padding, slack=1e-6)


@pytest.mark.parametrize("is_bhl", [True, False])
def test_parameters_of_short_convolutions(is_bhl: bool) -> None:
    """They are copies under the package's names, train, and come back from a state dict."""
    theirs = nn.Conv1d(6, 6, 5, groups=6, padding=2)
    ours, other = (FlashDepthWiseConv1d(6, 5, 2, w, theirs.bias, is_bhl) for w in (theirs.weight, theirs.weight + 1))
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        "weights": (6, 5) if is_bhl else (5, 6),
        "bias": (6,),
    }
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 33)
    for module in (ours, other):
        out = module(x) if is_bhl else module(x.transpose(1, 2)).transpose(1, 2)
        assert relative_error(out, theirs(x)) < 1e-6
    out.square().sum().backward()
    theirs(x).square().sum().backward()
    weights = other.weights.grad if is_bhl else other.weights.grad.T
    torch.testing.assert_close(weights, theirs.weight.grad[:, 0])
    torch.testing.assert_close(other.bias.grad, theirs.bias.grad)
    with torch.no_grad():
        theirs.weight.zero_()
    assert ours.weights.all()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x if is_bhl else x.transpose(1, 2)).dtype == torch.float32


def test_tensors_without_memory() -> None:
    u = torch.zeros(2, 3, 256, device="meta", dtype=torch.bfloat16)
    out = FlashFFTConv(256)(u, torch.zeros(3, 256, device="meta"), u, u)
    assert (out.shape, out.dtype, out.device.type) == (u.shape, u.dtype, "meta")
    short = FlashDepthWiseConv1d(3, 3, 1, torch.zeros(3, 1, 3, device="meta"), torch.zeros(3, device="meta"))(u)
    assert (short.shape, short.dtype, short.device.type) == (u.shape, u.dtype, "meta")


# ---- what is refused ----

_u, _k = torch.zeros(2, 3, 9), torch.zeros(3, 9)


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ((_u, _k, _u), AssertionError, "pregate and postgate are given together"),
        ((_u, _k, None, _u), AssertionError, "pregate and postgate are given together"),
        ((torch.zeros(2, 3, 257), _k), RuntimeError, "u has length 257; expected 256 at most"),
        ((_u[0], _k), RuntimeError, r"u has shape \(3, 9\)"),
        ((_u, _k[:2]), RuntimeError, r"k has shape \(2, 9\); expected \(3, filter_len\)"),
        ((_u, _u[:1]), RuntimeError, r"k has shape \(1, 3, 9\); expected \(2, 3, filter_len\)"),
        ((_u, _k, _u, _u[..., :8]), RuntimeError, r"postgate has shape \(2, 3, 8\)"),
        ((_u, _k, _u.half(), _u), RuntimeError, "pre_gate has dtype"),
        ((_u, _k.double()), RuntimeError, "filter has dtype float64"),
    ],
)
def test_what_the_fft_convolution_refuses(given: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        FlashFFTConv(256)(*given)


def test_what_is_refused_at_the_start() -> None:
    with pytest.raises(AssertionError, match=r"dtype is torch\.float32"):
        FlashFFTConv(256, torch.float32)
    for size in (128, 384, 2**23):
        with pytest.raises(NotImplementedError, match=f"seqlen is {size}; expected a power of 2 from 256 to 4194304"):
            FlashFFTConv(size)
    with pytest.raises(RuntimeError, match=r"weights has shape \(3, 3\); expected \(3, 1, 3\)"):
        FlashDepthWiseConv1d(3, 3, 1, torch.zeros(3, 3), torch.zeros(3))
    even = FlashDepthWiseConv1d(3, 4, 1, torch.zeros(3, 1, 4), torch.zeros(3))
    with pytest.raises(RuntimeError, match="kernel_size is 4; expected an odd number"):
        even(torch.zeros(2, 3, 9))
    with pytest.raises(RuntimeError, match=r"input has shape \(2, 9, 3\); expected \(batch, 3, length\)"):
        FlashDepthWiseConv1d(3, 3, 1, torch.zeros(3, 1, 3), torch.zeros(3))(torch.zeros(2, 9, 3))


def test_arguments_have_the_published_names_and_order() -> None:
    published = {
        FlashFFTConv: "seqlen dtype use_32_butterfly",
        FlashFFTConv.forward: "self u k pregate postgate",
        FlashDepthWiseConv1d: "channels kernel_size padding weights bias is_bhl device dtype",
        FlashDepthWiseConv1d.forward: "self input",
    }
    for named, names in published.items():
        assert " ".join(inspect.signature(named).parameters) == names
    assert sorted(flashfftconv.__all__) == ["FlashDepthWiseConv1d", "FlashFFTConv"]
