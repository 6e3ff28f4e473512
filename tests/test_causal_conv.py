"""causal_conv and causal_conv_step against the reference, and by the op contract."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import backends
import pytest
import torch
from checks import Function, check, far_apart, misaligned, relative_rms, strided, transposed
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from madkernels import causal_conv, causal_conv_step, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.usefixtures("backend")


def make_inputs(
    batch: int,
    seqlen: int,
    dim: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
    docs: int | None = None,
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(batch + 10 * seqlen + 100 * dim + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(backends.device(), dtype)

    inputs: dict[str, Tensor | None] = {"x": normal(batch, seqlen, dim), "weight": normal(dim, width)}
    if optional:
        states = batch if docs is None else docs
        inputs |= {"bias": normal(dim), "initial_state": normal(states, width - 1, dim)}
    return inputs


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=backends.device())


def whole(function: Any) -> Function:
    return lambda **inputs: function(**inputs, return_final_state=True)


def check_conv(op: Any, inputs: dict[str, Tensor | None], **options: Any) -> None:
    check(whole(op), whole(reference.causal_conv), inputs, **options)


LAYOUTS = [lambda t: t, transposed]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width"),
    [
        (2, 65, 37, 4),
        (1, 130, 16, 3),
        (3, 1, 5, 4),
        (2, 3, 20, 7),
        (1, 64, 33, 2),
        (2, 50, 8, 1),
        (1, 2, 1, 70),
        (1, 1500, 3, 4),
    ],
)
def test_matches_reference(
    layout: Any, activation: str | None, dtype: torch.dtype, batch: int, seqlen: int, dim: int, width: int
) -> None:
    inputs = make_inputs(batch, seqlen, dim, width, dtype=dtype)
    inputs["x"] = layout(inputs["x"])
    check_conv(causal_conv, inputs, activation=activation)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("absent", ["bias", "initial_state", "all"])
def test_optional_arguments(layout: Any, absent: str) -> None:
    inputs = make_inputs(2, 40, 20, 4, optional=absent != "all")
    inputs["x"] = layout(inputs["x"])
    inputs.pop(absent, None)
    check_conv(causal_conv, inputs, activation="silu")


def test_agrees_with_conv1d() -> None:
    inputs = make_inputs(2, 40, 20, 4, optional=False)
    x, weight = inputs["x"], inputs["weight"]
    rows, taps = x.double().transpose(1, 2), weight.double().unsqueeze(1)  # in float32 cuDNN may round to TF32
    expected = torch.nn.functional.conv1d(rows, taps, groups=20, padding=3)[..., :40]
    assert relative_rms(causal_conv(x, weight), expected.transpose(1, 2)) < 1e-6


def test_float32_weight_with_bfloat16_input() -> None:
    inputs = make_inputs(2, 40, 20, 4, dtype=torch.bfloat16)
    inputs |= {k: inputs[k].float() for k in ("weight", "bias")}
    check_conv(causal_conv, inputs, activation="silu")


@pytest.mark.parametrize("layout", [strided, misaligned])
def test_layouts(layout: Any) -> None:
    inputs = make_inputs(2, 75, 37, 4)
    moved = {k: layout(v) for k, v in inputs.items()}
    assert torch.equal(causal_conv(**moved), causal_conv(**inputs))
    check_conv(causal_conv, moved, activation="silu")


def test_offsets_beyond_32_bits() -> None:
    inputs = make_inputs(2, 40, 5, 4, dtype=torch.float16)
    assert torch.equal(causal_conv(**inputs | {"x": far_apart(inputs["x"])}), causal_conv(**inputs))


def test_transposed_view_stays_transposed() -> None:
    x = transposed(torch.randn(2, 40, 24, device=backends.device()))
    assert causal_conv(x, torch.randn(24, 4, device=backends.device())).stride() == x.stride()


def test_part_of_a_wider_tensor() -> None:
    """As Mamba's layer cuts its projection in two."""
    inputs = make_inputs(2, 40, 24, 4)
    expected = causal_conv(**inputs)
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], dim=-1)[..., :24]
    assert torch.equal(causal_conv(**inputs), expected)
    check_conv(causal_conv, inputs)


def test_gradient_of_a_sum() -> None:
    """The gradient of the output is then an expanded scalar, with strides of zero."""
    x = torch.randn(2, 10, 6, device=backends.device(), requires_grad=True)
    weight = torch.randn(6, 3, device=backends.device())
    (dx,) = torch.autograd.grad(causal_conv(x, weight).sum(), x)
    (expected,) = torch.autograd.grad(reference.causal_conv(x, weight).sum(), x)
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("lengths", [(5, 1, 0, 64, 130), (100,), (0, 0, 3), (2, 2, 2, 2), (64, 64, 1)])
def test_packed_documents(layout: Any, lengths: tuple[int, ...]) -> None:
    cu_seqlens = offsets_of(lengths)
    inputs = make_inputs(1, sum(lengths), 20, 4, docs=len(lengths))
    inputs["x"] = layout(inputs["x"])
    check_conv(causal_conv, inputs, cu_seqlens=cu_seqlens, activation="silu")


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (0, 0, 0, 1)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    check_conv(causal_conv, make_inputs(*shape), activation="silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_step_by_step(dtype: torch.dtype, width: int) -> None:
    inputs = make_inputs(3, 6, 37, width, dtype=dtype)
    out, final = causal_conv(**inputs, activation="silu", return_final_state=True)
    state = inputs["initial_state"].clone()
    steps = [
        causal_conv_step(state, inputs["x"][:, t], inputs["weight"], inputs["bias"], activation="silu") for t in range(6)
    ]
    assert torch.equal(torch.stack(steps, 1), out)
    assert torch.equal(state, final)


@settings(max_examples=30)
@given(
    batch=st.integers(0, 3),
    seqlen=st.integers(0, 80),
    dim=st.integers(1, 40),
    width=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    optional=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(
    backend: str, batch: int, seqlen: int, dim: int, width: int, dtype: torch.dtype, optional: bool, layout: Any
) -> None:
    assume(backend == "cpu" or dtype != torch.float64)
    inputs = make_inputs(batch, seqlen, dim, width, dtype=dtype, optional=optional)
    inputs["x"] = layout(inputs["x"])
    check_conv(causal_conv, inputs, activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_where_they_are(layout: Any, value: float) -> None:
    inputs = make_inputs(1, 40, 20, 4)
    inputs["x"][0, 20, 7] = value
    inputs["x"] = layout(inputs["x"])
    out, exact = (f(**inputs, activation="silu") for f in (causal_conv, reference.causal_conv))
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
def test_same_bits_whatever_the_threads(layout: Any) -> None:
    inputs = make_inputs(3, 500, 200, 4)
    inputs["x"] = layout(inputs["x"])
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = causal_conv(**leaves, activation="silu")
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    before = torch.get_num_threads()
    try:
        runs = [bits(threads) for threads in (1, 2, 3, 2)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation: str | None) -> None:
    inputs = make_inputs(1, 5, 3, 3, dtype=torch.float64)
    names = list(inputs)

    def call(*values: Tensor) -> Any:
        return causal_conv(**dict(zip(names, values, strict=True)), activation=activation, return_final_state=True)

    values = tuple(v.requires_grad_() for v in inputs.values())
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(packed: bool, optional: bool) -> None:
    inputs = make_inputs(1, 4, 12, 3, optional=optional, docs=2 if packed else None)
    cu_seqlens = offsets_of([1, 3]) if packed else None
    t = {k: v.requires_grad_() for k, v in inputs.items()}
    arguments = (t["x"], t["weight"], t.get("bias"), True, t.get("initial_state"), cu_seqlens)
    torch.library.opcheck(torch.ops.madkernels.causal_conv.default, arguments)
    out, state = torch.ops.madkernels.causal_conv(*arguments)
    weights = [torch.randn_like(out), torch.randn_like(state)]
    if packed:  # its second gradient goes through the reference, which looks at the offsets: eager mode only
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.madkernels.causal_conv_backward.default, (*weights, *arguments))


def test_opcheck_step() -> None:
    inputs = make_inputs(2, 1, 12, 3)
    arguments = (inputs["initial_state"], inputs["x"][:, 0], inputs["weight"], inputs["bias"], True)
    torch.library.opcheck(torch.ops.madkernels.causal_conv_step.default, arguments)


def test_compile_and_export() -> None:
    inputs = make_inputs(2, 40, 12, 3)

    class Conv(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            out = causal_conv(x, weight, inputs["bias"], activation="silu")
            assert isinstance(out, Tensor)
            return out * 2

    conv = Conv()
    arguments = (inputs["x"].requires_grad_(), inputs["weight"].requires_grad_())
    plain = conv(*arguments)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(plain, compiled)
    grads = [torch.autograd.grad(out.square().sum(), arguments) for out in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        exported = torch.export.export(conv, arguments).module()(*arguments)
    assert torch.equal(plain, exported)


def test_autocast_casts_the_input_only() -> None:
    inputs = make_inputs(2, 40, 12, 3)
    with torch.autocast(backends.device().type, torch.bfloat16):
        out = causal_conv(**inputs)
    halves = inputs | {k: inputs[k].bfloat16() for k in ("x", "initial_state")}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, causal_conv(**halves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\); expected \(batch, seqlen, dim\)"),
        ({"x": torch.zeros(2, 5, 4, dtype=torch.int32)}, "x has dtype int32; it takes float32, bfloat16"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\); expected \(4, 3\)"),
        ({"weight": torch.zeros(4, 0)}, "with a width of 1 at least"),
        ({"weight": torch.zeros(4, 3, dtype=torch.float16)}, "weight has dtype float16; .* it takes float32"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); expected \(4,\)"),
        (
            {"initial_state": torch.zeros(2, 3, 4)},
            r"initial_state has shape \(2, 3, 4\); expected \(2, 2, 4\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "expected batch 1, got 2"),
    ],
)
def test_refusals(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"causal_conv: .*{message}"):
        causal_conv(**make_inputs(2, 5, 4, 3) | {name: value.to(backends.device()) for name, value in change.items()})


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"activation is 'gelu'; it takes None or \"silu\""):
        causal_conv(torch.zeros(1, 2, 3), torch.zeros(3, 2), activation="gelu")


# ---- wrong on purpose: each must be caught by the checks above


def sees_one_step_ahead(x: Tensor, **rest: Any) -> Any:
    out, state = causal_conv(torch.cat([x[:, 1:], x[:, :1]], dim=1), **rest)
    return out, state


def drops_the_carry(x: Tensor, initial_state: Tensor, **rest: Any) -> Any:
    return causal_conv(x, initial_state=initial_state * 0, **rest)


def reverses_the_taps(weight: Tensor, **rest: Any) -> Any:
    return causal_conv(weight=weight.flip(1), **rest)


def forgets_the_activation(**inputs: Any) -> Any:
    return causal_conv(**inputs | {"activation": None})


@pytest.mark.parametrize("mutant", [sees_one_step_ahead, drops_the_carry, reverses_the_taps, forgets_the_activation])
def test_mutants_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError, match=r"relative RMS error"):
        check_conv(mutant, make_inputs(2, 65, 37, 4), activation="silu")
