"""selective_scan and selective_scan_step against the reference, and by the op contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import backends
import pytest
import torch
from checks import Function, check, far_apart, misaligned, relative_rms, strided, transposed
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import madkernels
from madkernels import _C, reference, selective_scan, selective_scan_step
from madkernels.ops.selective_scan import CHUNK

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.usefixtures("backend")


def make_inputs(
    batch: int,
    seqlen: int,
    dim: int,
    dstate: int,
    groups: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
    docs: int | None = None,
) -> dict[str, Tensor | None]:
    """Inputs at unit scale; A in the range of trained models."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(batch + 10 * seqlen + 100 * dim + dstate)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(backends.device(), dtype)

    inputs: dict[str, Tensor | None] = {
        "u": normal(batch, seqlen, dim),
        "delta": normal(batch, seqlen, dim),
        "A": (-3 * torch.rand(dim, dstate, generator=generator, dtype=torch.float64)).to(backends.device(), wide),
        "B": normal(batch, seqlen, groups, dstate),
        "C": normal(batch, seqlen, groups, dstate),
    }
    if optional:
        inputs |= {
            "D": normal(dim, dtype=wide),
            "z": normal(batch, seqlen, dim),
            "delta_bias": normal(dim, dtype=wide),
            "initial_state": normal(batch if docs is None else docs, dim, dstate, dtype=wide),
        }
    return inputs


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=backends.device())


def whole(function: Any) -> Function:
    """`function` with its final state."""
    return lambda **inputs: function(**inputs, return_final_state=True)


def check_scan(op: Any, inputs: dict[str, Tensor | None], **options: Any) -> None:
    options.setdefault("delta_softplus", True)
    slack = EXP2_ERRORS * abs(mean_error_of_exp2()) if backends.device().type == "cuda" else 0
    check(whole(op), whole(reference.selective_scan), inputs, slack=slack, **options)


# The 2^x of a GPU may be wrong in one direction on average, and a state adds its errors up over the steps that it remembers:
# with a mean error put into it, the results of these tests were wrong by up to 48 times as much.
EXP2_ERRORS = 64


@cache
def mean_error_of_exp2() -> float:
    """Relative, over [-1, 0], as a state of the scan shows it after one step with nothing added."""
    device = backends.device()
    A = -torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).to(device) / math.log2(math.e)
    row, projection = torch.ones(1, 1, 64, device=device), torch.zeros(1, 1, 64, device=device)
    options = {"initial_state": torch.ones(1, 64, 64, device=device), "return_final_state": True}
    _, state = selective_scan(row, row, A, projection, projection, **options)
    exact = torch.exp2((A * torch.tensor(math.log2(math.e), device=device)).double())
    return float((state[0].double() / exact - 1).mean())


@pytest.mark.backends("ptx", "cuda")
def test_mean_error_of_exp2() -> None:
    assert abs(mean_error_of_exp2()) <= 2**-22  # the largest single error, says CUDA
    if backends.device().type != "cuda":
        assert abs(mean_error_of_exp2()) <= 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "dstate", "groups"),
    [
        (2, 65, 37, 5, 1),  # no size divides anything
        (1, 31, 64, 16, 1),
        (2, 32, 16, 16, 2),
        (1, 33, 130, 4, 1),  # one channel block and two channels
        (3, 1, 7, 1, 7),  # one step, a group a channel
        (1, 130, 96, 21, 3),
        (2, 63, 1, 64, 1),
    ],
)
def test_matches_reference(dtype: torch.dtype, batch: int, seqlen: int, dim: int, dstate: int, groups: int) -> None:
    check_scan(selective_scan, make_inputs(batch, seqlen, dim, dstate, groups, dtype=dtype))


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state", "all"])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(absent: str, softplus: bool) -> None:
    inputs = make_inputs(2, 40, 20, 6, optional=absent != "all")
    inputs.pop(absent, None)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs() * 0.1
        inputs.pop("delta_bias", None)
    check_scan(selective_scan, inputs, delta_softplus=softplus)


def test_projections_without_groups() -> None:
    inputs = make_inputs(2, 20, 8, 4)
    inputs |= {name: inputs[name].squeeze(2) for name in "BC"}
    check_scan(selective_scan, inputs)


@pytest.mark.parametrize("layout", [transposed, strided, misaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: Any, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 75, 37, 16, 1, dtype=dtype)
    plain = selective_scan(**inputs, delta_softplus=True)
    moved = {k: v if v is None or v.dim() == 1 else layout(v) for k, v in inputs.items()}
    assert torch.equal(selective_scan(**moved, delta_softplus=True), plain)
    check_scan(selective_scan, moved)


def test_offsets_beyond_32_bits() -> None:
    inputs = make_inputs(2, 40, 5, 3, dtype=torch.float16)
    moved = inputs | {name: far_apart(inputs[name]) for name in ("u", "B", "z")}
    assert torch.equal(selective_scan(**moved, delta_softplus=True), selective_scan(**inputs, delta_softplus=True))


def test_transposed_view_stays_transposed() -> None:
    inputs = make_inputs(2, 40, 24, 4)
    inputs |= {k: transposed(inputs[k]) for k in ("u", "delta", "z")}
    assert selective_scan(**inputs).stride() == inputs["u"].stride()


@pytest.mark.parametrize("lengths", [(5, 1, 0, 64, 33), (100,), (0, 0, 3), (32, 32), (31, 33, 1)])
def test_packed_documents(lengths: tuple[int, ...]) -> None:
    cu_seqlens = offsets_of(lengths)
    inputs = make_inputs(1, sum(lengths), 20, 6, 2, docs=len(lengths))
    check_scan(selective_scan, inputs, cu_seqlens=cu_seqlens)
    separate = [
        selective_scan(
            **{k: v if v is None or v.dim() == 1 or k in ("A", "initial_state") else v[:, a:b] for k, v in inputs.items()}
            | {"initial_state": inputs["initial_state"][i : i + 1]},
            delta_softplus=True,
        )
        for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    packed = selective_scan(**inputs, delta_softplus=True, cu_seqlens=cu_seqlens)
    assert relative_rms(packed, torch.cat(separate, dim=1)) < 1e-6


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2), (2, 5, 4, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    check_scan(selective_scan, make_inputs(*shape))


def test_state_hand_over() -> None:
    inputs = make_inputs(2, 90, 20, 6)
    whole_out, whole_state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    state, outs = inputs.pop("initial_state"), []
    for part in (slice(0, 41), slice(41, 90)):
        cut = {k: v[:, part] if v is not None and v.dim() > 2 else v for k, v in inputs.items()}
        out, state = selective_scan(**cut, delta_softplus=True, initial_state=state, return_final_state=True)
        outs.append(out)
    assert relative_rms(torch.cat(outs, 1), whole_out) < 1e-6
    assert relative_rms(state, whole_state) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_by_step(dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 9, 37, 16, 1, dtype=dtype)
    out, final = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    state = inputs["initial_state"].clone()
    for t in range(9):
        now = {k: inputs[k][:, t] for k in ("u", "delta", "B", "C", "z")}
        step = selective_scan_step(
            state, now["u"], now["delta"], inputs["A"], now["B"], now["C"], inputs["D"], now["z"],
            inputs["delta_bias"], True,
        )  # fmt: skip
        assert relative_rms(step, out[:, t]) < 1e-6
    assert relative_rms(state, final) < 1e-6


def test_step_matches_reference() -> None:
    inputs = make_inputs(2, 1, 10, 3, 2)
    states = [inputs["initial_state"].clone() for _ in range(2)]
    arguments = [inputs[k] if k in ("A", "D", "delta_bias") else inputs[k][:, 0] for k in
                 ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]  # fmt: skip
    outs = [f(s, *arguments, True) for f, s in zip((selective_scan_step, reference.selective_scan_step), states)]  # noqa: B905
    assert relative_rms(outs[0], outs[1]) < 1e-6
    assert relative_rms(states[0], states[1]) < 1e-6


@settings(max_examples=25)
@given(
    batch=st.integers(0, 3),
    seqlen=st.integers(0, 80),
    channels=st.integers(1, 40),
    groups=st.integers(1, 3),
    dstate=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    optional=st.booleans(),
)
def test_any_shape(
    backend: str, batch: int, seqlen: int, channels: int, groups: int, dstate: int, dtype: torch.dtype, optional: bool
) -> None:
    assume(backend == "cpu" or dtype != torch.float64)
    inputs = make_inputs(batch, seqlen, channels * groups, dstate, groups, dtype=dtype, optional=optional)
    check_scan(selective_scan, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_exponents(dtype: torch.dtype) -> None:
    """Decays to zero, growth past overflow, and what lies between, as the reference has them."""
    inputs = make_inputs(1, 6, 40, 2, dtype=dtype, optional=False)
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


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_propagate(name: str, value: float) -> None:
    inputs = make_inputs(1, 40, 20, 3)
    inputs[name].view(-1)[inputs[name].numel() // 2] = value
    out, exact = (f(**inputs, delta_softplus=True) for f in (selective_scan, reference.selective_scan))
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert torch.equal(out.isnan(), exact.isnan())


def test_softplus_is_accurate_far_from_zero() -> None:
    inputs = make_inputs(1, 1, 200, 1, dtype=torch.float32, optional=False)
    inputs["delta"] = torch.linspace(-30, 30, 200, device=backends.device()).view(1, 1, 200)
    inputs["A"].zero_()
    check_scan(selective_scan, inputs)


@pytest.mark.backends("cpu")
def test_same_bits_whatever_the_threads() -> None:
    inputs = make_inputs(3, 200, 300, 16)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out, state = selective_scan(**leaves, delta_softplus=True, return_final_state=True)
        return [out, state, *torch.autograd.grad(out.square().sum() + state.sum(), list(leaves.values()))]

    before = torch.get_num_threads()
    try:
        runs = [bits(threads) for threads in (1, 2, 3, 2)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def small_double() -> dict[str, Tensor]:
    inputs = make_inputs(1, 4, 3, 2, dtype=torch.float64)
    return {k: v.requires_grad_() for k, v in inputs.items() if v is not None}


@pytest.mark.backends("cpu")
def test_gradcheck() -> None:
    inputs = small_double()
    names = list(inputs)

    def call(*values: Tensor) -> Any:
        return selective_scan(**dict(zip(names, values, strict=True)), delta_softplus=True, return_final_state=True)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(call, tuple(inputs.values()))


@pytest.mark.backends("cpu")
def test_gradgradcheck_of_the_output_alone() -> None:
    inputs = small_double()
    cu_seqlens = offsets_of([1, 3])

    def call(u: Tensor, B: Tensor) -> Any:
        rest = {k: v for k, v in inputs.items() if k not in ("u", "B", "initial_state")}
        return selective_scan(u=u, B=B, **rest, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradgradcheck(call, (inputs["u"], inputs["B"]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(packed: bool, optional: bool) -> None:
    inputs = make_inputs(1, 3, 12, 2, optional=optional, docs=2 if packed else None)
    cu_seqlens = offsets_of([1, 2]) if packed else None
    t = {k: v.requires_grad_() for k, v in inputs.items()}
    arguments = (
        t["u"], t["delta"], t["A"], t["B"], t["C"], t.get("D"), t.get("z"), t.get("delta_bias"), True,
        t.get("initial_state"), cu_seqlens,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.madkernels.selective_scan.default, (*arguments, True))
    out, state, checkpoints = torch.ops.madkernels.selective_scan(*arguments, True)
    weights = [torch.randn_like(out), torch.randn_like(state)]
    if packed:  # its second gradient goes through the reference, which looks at the offsets: eager mode only
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.madkernels.selective_scan_backward.default, (*weights, *arguments, checkpoints.detach()))


def test_opcheck_step() -> None:
    inputs = make_inputs(2, 1, 12, 3)
    state = inputs.pop("initial_state")
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arguments = (state, *(inputs[k][:, 0] if inputs[k].dim() > 2 else inputs[k] for k in order), True)
    torch.library.opcheck(torch.ops.madkernels.selective_scan_step.default, arguments)


def test_compile_and_export() -> None:
    inputs = make_inputs(2, 40, 12, 3)

    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
            rest = {k: inputs[k] for k in ("A", "D", "z", "delta_bias", "initial_state")}
            out = selective_scan(u, delta, B=B, C=C, **rest, delta_softplus=True)
            assert isinstance(out, Tensor)
            return out * 2

    scan = Scan()
    arguments = tuple(inputs[k].requires_grad_() for k in ("u", "delta", "B", "C"))
    plain = scan(*arguments)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(plain, compiled)
    grads = [torch.autograd.grad(out.square().sum(), arguments) for out in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        exported = torch.export.export(scan, arguments).module()(*arguments)
    assert torch.equal(plain, exported)


def test_autocast_casts_activations_only() -> None:
    inputs = make_inputs(2, 40, 12, 3)
    with torch.autocast(backends.device().type, torch.bfloat16):
        out, state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    halves = inputs | {k: inputs[k].bfloat16() for k in ("u", "delta", "B", "C", "z")}
    expected, expected_state = selective_scan(**halves, delta_softplus=True, return_final_state=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(state, expected_state)


def test_inference_saves_no_checkpoints() -> None:
    inputs = make_inputs(1, 40, 12, 3)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arguments = (*(inputs[k] for k in order), True, inputs["initial_state"], None)
    assert torch.ops.madkernels.selective_scan(*arguments, False)[2].numel() == 0
    slots = torch.ops.madkernels.selective_scan(*arguments, True)[2]
    assert slots.shape == (2, 3, 12)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 5)}, r"u has shape \(2, 5\); expected \(batch, seqlen, dim\)"),
        ({"u": torch.zeros(2, 5, 4, dtype=torch.int64)}, "u has dtype int64; it takes float32, bfloat16"),
        ({"delta": torch.zeros(2, 6, 4)}, r"delta has shape \(2, 6, 4\); expected \(2, 5, 4\)"),
        (
            {"delta": torch.zeros(2, 5, 4, dtype=torch.bfloat16)},
            "delta has dtype bfloat16; .* it takes float32",
        ),
        ({"A": torch.zeros(4, 3, dtype=torch.float64)}, "A has dtype float64; .* it takes float32"),
        ({"A": torch.zeros(3)}, r"A has shape \(3,\); expected \(dim, dstate\)"),
        ({"B": torch.zeros(2, 5, 3, 3)}, r"C has shape \(2, 5, 1, 3\); expected \(2, 5, 3, 3\)"),
        (
            {"B": torch.zeros(2, 5, 3, 3), "C": torch.zeros(2, 5, 3, 3)},
            "B has 3 groups; expected a divisor of dim, 4",
        ),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\); expected \(4,\)"),
        ({"z": torch.zeros(2, 5, 5)}, r"z has shape \(2, 5, 5\)"),
        (
            {"initial_state": torch.zeros(1, 4, 3)},
            r"initial_state has shape \(1, 4, 3\); expected \(2, 4, 3\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "expected batch 1, got 2"),
    ],
)
def test_refusals(change: dict[str, Tensor], message: str) -> None:
    inputs = make_inputs(2, 5, 4, 3) | {name: value.to(backends.device()) for name, value in change.items()}
    with pytest.raises(RuntimeError, match=f"selective_scan: .*{message}"):
        selective_scan(**inputs)


@pytest.mark.backends("cpu", "ptx")  # looking at them on a GPU would wait for it
@pytest.mark.backends("cpu")  # on a GPU the host would have to wait to see them
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "cu_seqlens starts with 1; expected 0"),
        ([0, 4, 3, 5], "cu_seqlens falls from 4 to 3 at index 2"),
        ([0, 3], "cu_seqlens ends with 3; expected the seqlen, 5"),
    ],
)
def test_refuses_bad_offsets(offsets: list[int], message: str) -> None:
    inputs = make_inputs(1, 5, 4, 3, optional=False)
    with pytest.raises(RuntimeError, match=message):
        selective_scan(**inputs, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"cu_seqlens has dtype int64; .* it takes int32"):
        selective_scan(**inputs, cu_seqlens=torch.tensor(offsets))


def test_step_refuses_a_state_it_cannot_update() -> None:
    inputs = make_inputs(2, 1, 4, 3, optional=False)
    now = [inputs[k] if k == "A" else inputs[k][:, 0] for k in ("u", "delta", "A", "B", "C")]
    with pytest.raises(RuntimeError, match="state must be contiguous"):
        selective_scan_step(transposed(torch.zeros(2, 4, 3, device=backends.device())), *now)


# ---- wrong on purpose: each must be caught by the checks above


def drops_the_carry(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Any:
    """Starts each chunk from the state zero."""
    cut = CHUNK
    parts = [
        selective_scan(*(t[:, a : a + cut] if t.dim() > 2 else t for t in (u, delta, A, B, C)),
                       **{k: v[:, a : a + cut] if k == "z" else v for k, v in rest.items()})
        for a in range(0, u.shape[1], cut)
    ]  # fmt: skip
    return torch.cat([p[0] for p in parts], 1), parts[-1][1]


def forgets_softplus(**inputs: Any) -> Any:
    return selective_scan(**inputs | {"delta_softplus": False})


def looks_one_step_back(**inputs: Any) -> Any:
    return selective_scan(**inputs | {"B": inputs["B"].roll(1, dims=1)})


def returns_zeros(**inputs: Any) -> Any:
    out, state = selective_scan(**inputs)
    return out * 0, state


def drops_the_final_states_gradient(**inputs: Any) -> Any:
    out, state = selective_scan(**inputs)
    return out, state.detach() + 0 * out.sum()


@pytest.mark.parametrize(
    "mutant",
    [drops_the_carry, forgets_softplus, looks_one_step_back, returns_zeros, drops_the_final_states_gradient],
)
def test_mutants_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError, match=r"relative RMS error"):
        check_scan(mutant, make_inputs(2, 65, 37, 5, 1))


@pytest.mark.backends("cpu")
def test_instruction_set_is_a_supported_one() -> None:
    assert _C.cpu_isa() == _C.cpu_supported()[-1] or _C.cpu_isa() in _C.cpu_supported()
    assert madkernels.__version__ == _C.build_info()["version"]
