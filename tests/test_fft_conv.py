"""fft_conv and fft_conv_step against the reference, and by the op contract."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import backends
import pytest
import torch
from checks import Function, check, far_apart, misaligned, relative_error, strided, transposed
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from madkernels import _C, fft_conv, fft_conv_step, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.usefixtures("backend")


def make_inputs(
    batch: int,
    seqlen: int,
    dim: int,
    taps: int,
    *,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
    state: bool = False,
    docs: int | None = None,
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(batch + 10 * seqlen + 100 * dim + taps)

    def normal(*shape: int, wide: bool = False) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.to(backends.device(), torch.promote_types(dtype, torch.float32) if wide else dtype)

    filters = normal(dim if groups is None else groups, taps) / taps**0.5
    inputs: dict[str, Tensor | None] = {"u": normal(batch, seqlen, dim), "filter": filters}
    if optional:
        inputs |= {"skip": normal(dim), "pre_gate": normal(batch, seqlen, dim), "post_gate": normal(batch, seqlen, dim)}
    if state:
        inputs["initial_state"] = normal(batch if docs is None else docs, taps - 1, dim, wide=True)
    return inputs


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=backends.device())


def whole(function: Any) -> Function:
    def call(causal: bool = True, **inputs: Any) -> Any:
        if causal:
            return function(**inputs, return_final_state=True)
        return (function(**inputs, causal=False),)

    return call


def check_conv(op: Any, inputs: dict[str, Tensor | None], **options: Any) -> None:
    check(whole(op), whole(reference.fft_conv), inputs, **options)


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


LAYOUTS = [lambda t: t, transposed]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "centred"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "groups", "taps"),
    [
        (2, 65, 37, 37, 65),  # as long as the sequence
        (1, 300, 16, 16, 300),
        (3, 1, 5, 5, 1),
        (2, 3, 20, 20, 7),  # longer
        (1, 200, 33, 11, 17),  # short, shared
        (2, 256, 4, 1, 256),
        (1, 90, 3, 3, 400),
    ],
)
def test_matches_reference(
    layout: Any, causal: bool, dtype: torch.dtype, batch: int, seqlen: int, dim: int, groups: int, taps: int
) -> None:
    inputs = make_inputs(batch, seqlen, dim, taps, groups=groups, dtype=dtype, state=causal)
    inputs |= {k: layout(inputs[k]) for k in ("u", "pre_gate", "post_gate", "filter")}
    check_conv(fft_conv, inputs, causal=causal)


@pytest.mark.parametrize("present", [(), ("skip",), ("pre_gate",), ("post_gate",), ("initial_state",), ("skip", "pre_gate")])
@pytest.mark.parametrize("taps", [5, 200])
def test_optional_arguments(present: tuple[str, ...], taps: int) -> None:
    inputs = make_inputs(2, 150, 20, taps, state=True)
    check_conv(fft_conv, {k: v for k, v in inputs.items() if k in ("u", "filter", *present)})


SIZES = [1, 2, 3, 15, 16, 17, 127, 128, 129, 499, 1023, 1024, 1025, 4096, 4099, 16384]


@pytest.mark.parametrize("seqlen", SIZES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "centred"])
def test_any_length(causal: bool, seqlen: int) -> None:
    inputs = make_inputs(2, seqlen, 3, seqlen, optional=False)
    error = relative_error(fft_conv(**inputs, causal=causal), by_fft(**inputs, causal=causal))
    assert error < 5e-7


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("taps", [1, 64, 1000, 32768, 65537, 100000, 150000])
@pytest.mark.parametrize("seqlen", [65537, 99991, 100000])
def test_long(seqlen: int, taps: int) -> None:
    """With gradients, in float32 and in float64; blocks where the filter is the shorter one."""
    for dtype, allowed in ((torch.float32, 1e-6), (torch.float64, 2e-14)):
        inputs = make_inputs(1, seqlen, 2, taps, optional=False, dtype=dtype)
        exact = {k: v.double().requires_grad_() for k, v in inputs.items()}
        found = {k: v.requires_grad_() for k, v in inputs.items()}
        outs = fft_conv(**found), by_fft(**exact)
        weights = torch.randn(outs[0].shape, dtype=dtype)
        assert relative_error(*outs) < allowed
        gradients = [
            torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype))
            for out, leaves in zip(outs, (found, exact), strict=True)
        ]
        errors = [relative_error(a, b) for a, b in zip(*gradients, strict=True)]
        assert max(errors) < 3 * allowed, errors  # a tap's gradient is one long sum


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("lengths", [None, (17000, 2900, 0, 1, 99)], ids=["whole", "packed"])
def test_beyond_shared_memory(layout: Any, lengths: tuple[int, ...] | None) -> None:
    """On a GPU: transforms of two levels, beside smaller ones where documents are short."""
    seqlen, states = 20000, 2 if lengths is None else 5
    inputs = make_inputs(2 if lengths is None else 1, seqlen, 3, seqlen)
    inputs["initial_state"] = torch.randn(states, 500, 3).to(backends.device())
    inputs["u"] = layout(inputs["u"])
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
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("length", [128, 1024, 4096, 16384, 4099])
def test_as_precise_as_torch_fft(length: int) -> None:
    inputs = make_inputs(2, length, 16, length, optional=False)
    u, filter = inputs["u"], inputs["filter"]
    exact = by_fft(u, filter)
    size = 2 * length
    plain = torch.fft.irfft(torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(filter.T, n=size, dim=0), n=size, dim=1)
    assert relative_error(fft_conv(u, filter), exact) < 2 * relative_error(plain[:, :length], exact)


def test_float32_filter_with_bfloat16_input() -> None:
    inputs = make_inputs(2, 40, 20, 40, dtype=torch.bfloat16, state=True)
    inputs |= {k: inputs[k].float() for k in ("filter", "skip")}
    check_conv(fft_conv, inputs)


@pytest.mark.parametrize("layout", [strided, misaligned])
def test_layouts(layout: Any) -> None:
    inputs = make_inputs(2, 75, 37, 75, state=True)
    moved = {k: layout(v) for k, v in inputs.items()}
    assert torch.equal(fft_conv(**moved), fft_conv(**inputs))
    check_conv(fft_conv, moved)


@pytest.mark.parametrize("taps", [3, 40])
def test_offsets_beyond_32_bits(taps: int) -> None:
    inputs = make_inputs(2, 40, 5, taps, dtype=torch.float16)
    far = {k: far_apart(inputs[k]) for k in ("u", "pre_gate", "post_gate")}
    assert torch.equal(fft_conv(**inputs | far), fft_conv(**inputs))


def test_transposed_view_stays_transposed() -> None:
    u = transposed(torch.randn(2, 40, 24, device=backends.device()))
    assert fft_conv(u, torch.randn(24, 40, device=backends.device())).stride() == u.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("taps", [4, 150])
@pytest.mark.parametrize("lengths", [(5, 1, 0, 64, 130), (100,), (0, 0, 3), (2, 2, 2, 2), (150, 40, 150)])
def test_packed_documents(layout: Any, taps: int, lengths: tuple[int, ...]) -> None:
    cu_seqlens = offsets_of(lengths)
    inputs = make_inputs(1, sum(lengths), 20, taps, state=True, docs=len(lengths))
    inputs |= {k: layout(inputs[k]) for k in ("u", "pre_gate", "post_gate")}
    check_conv(fft_conv, inputs, cu_seqlens=cu_seqlens)


def test_packed_documents_apart() -> None:
    """Each as it would be alone, to rounding, centred filters too."""
    lengths = (30, 70, 3)
    inputs = make_inputs(1, sum(lengths), 20, 60, optional=False)
    packed = fft_conv(**inputs, causal=False, cu_seqlens=offsets_of(lengths))
    alone = [fft_conv(u, inputs["filter"], causal=False) for u in inputs["u"].split(lengths, dim=1)]
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-6


@pytest.mark.parametrize("taps", [3, 31, 400])
@pytest.mark.parametrize("cut", [1, 20, 64])
def test_chunks_equal_the_whole(cut: int, taps: int) -> None:
    inputs = make_inputs(2, 65, 20, taps)
    out, final = fft_conv(**inputs, return_final_state=True)
    rows = ("u", "pre_gate", "post_gate")
    first, state = fft_conv(**inputs | {k: inputs[k][:, :cut] for k in rows}, return_final_state=True)
    rest = inputs | {k: inputs[k][:, cut:] for k in rows}
    second, state = fft_conv(**rest, initial_state=state, return_final_state=True)
    assert relative_error(torch.cat([first, second], 1), out) < 1e-6
    assert torch.equal(state, final)


@pytest.mark.parametrize("history", [0, 1, 10, 49])
def test_a_shorter_history(history: int) -> None:
    inputs = make_inputs(2, 33, 6, 50, state=True)
    inputs["initial_state"] = inputs["initial_state"][:, 49 - history :]
    check_conv(fft_conv, inputs)


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (0, 0, 0, 1), (2, 0, 4, 300)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    check_conv(fft_conv, make_inputs(*shape, state=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [1, 2, 33, 100])
def test_step_by_step(dtype: torch.dtype, taps: int) -> None:
    inputs = make_inputs(3, 6, 36, taps, groups=12, dtype=dtype, state=True)
    out, final = fft_conv(**inputs, return_final_state=True)
    state = inputs["initial_state"].clone()
    fixed = {k: inputs[k] for k in ("filter", "skip")}
    rows = ("u", "pre_gate", "post_gate")
    steps = [fft_conv_step(state, **{k: inputs[k][:, t] for k in rows}, **fixed) for t in range(6)]
    allowed = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert relative_error(torch.stack(steps, 1), out) < allowed
    assert torch.equal(state, final)


@settings(max_examples=40)
@given(
    batch=st.integers(0, 3),
    seqlen=st.integers(0, 200),
    groups=st.integers(1, 9),
    shared=st.integers(1, 5),
    taps=st.integers(1, 250),
    dtype=st.sampled_from(DTYPES),
    optional=st.booleans(),
    causal=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(
    backend: str, batch: int, seqlen: int, groups: int, shared: int, taps: int, dtype: torch.dtype, optional: bool,
    causal: bool, layout: Any,
) -> None:  # fmt: skip
    assume(backend == "cpu" or dtype != torch.float64)
    inputs = make_inputs(
        batch, seqlen, groups * shared, taps, groups=groups, dtype=dtype, optional=optional, state=optional and causal
    )
    inputs["u"] = layout(inputs["u"])
    check_conv(fft_conv, inputs, causal=causal)


@pytest.mark.parametrize("taps", [3, 60])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_reach_no_other_sequence(taps: int, value: float) -> None:
    """By transforms they reach all outputs of their block, those before them too."""
    inputs = make_inputs(2, 60, 20, taps)
    clean = fft_conv(**inputs)
    inputs["u"][0, 20, 7] = value
    out, exact = fft_conv(**inputs), reference.fft_conv(**inputs)
    assert not out[exact.isnan() | exact.isinf()].isfinite().any()
    out[0, :, 7] = clean[0, :, 7]
    assert torch.equal(out, clean)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
@pytest.mark.parametrize("taps", [9, 500])
def test_same_bits_whatever_the_threads(layout: Any, taps: int) -> None:
    inputs = make_inputs(3, 500, 200, taps, state=True)
    inputs["u"] = layout(inputs["u"])
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = fft_conv(**leaves)
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    before = torch.get_num_threads()
    try:
        runs = [bits(threads) for threads in (1, 2, 3, 2)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "centred"])
def test_gradcheck(causal: bool) -> None:
    inputs = make_inputs(1, 9, 4, 7, groups=2, dtype=torch.float64, state=causal)
    names = list(inputs)

    def call(*values: Tensor) -> Any:
        return whole(fft_conv)(**dict(zip(names, values, strict=True)), causal=causal)

    values = tuple(v.requires_grad_() for v in inputs.values())
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels", "time"])
def test_opcheck(layout: Any, packed: bool, optional: bool) -> None:
    inputs = make_inputs(1, 4, 12, 6, optional=optional, state=optional, docs=2 if packed else None)
    cu_seqlens = offsets_of([1, 3]) if packed else None
    t = {k: (layout(v) if v.dim() > 1 and k != "initial_state" else v).requires_grad_() for k, v in inputs.items()}
    given = [t["u"], t["filter"], *(t.get(k) for k in ("skip", "pre_gate", "post_gate"))]
    arguments = (*given, True, t.get("initial_state"), cu_seqlens)
    for with_final_state in (True, False):
        torch.library.opcheck(torch.ops.madkernels.fft_conv.default, (*arguments, with_final_state))
    out, state = torch.ops.madkernels.fft_conv(*arguments, True)
    weights = [torch.randn_like(out), torch.randn_like(state)]
    if packed:  # its second gradient goes through the reference, which looks at the offsets: eager mode only
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.madkernels.fft_conv_backward.default, (*weights, *arguments))


def test_opcheck_step() -> None:
    inputs = make_inputs(2, 1, 12, 9, state=True)
    one_step = {k: inputs[k][:, 0] for k in ("u", "pre_gate", "post_gate")}
    arguments = [(inputs | one_step)[k] for k in ("initial_state", "u", "filter", "skip", "pre_gate", "post_gate")]
    torch.library.opcheck(torch.ops.madkernels.fft_conv_step.default, tuple(arguments))


def test_compile_and_export() -> None:
    inputs = make_inputs(2, 40, 12, 40)

    class Conv(torch.nn.Module):
        def forward(self, u: Tensor, filter: Tensor) -> Tensor:
            out = fft_conv(u, filter, skip=inputs["skip"], post_gate=inputs["post_gate"])
            assert isinstance(out, Tensor)
            return out * 2

    conv = Conv()
    arguments = (inputs["u"].requires_grad_(), inputs["filter"].requires_grad_())
    plain = conv(*arguments)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(plain, compiled)
    grads = [torch.autograd.grad(out.square().sum(), arguments) for out in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        exported = torch.export.export(conv, arguments).module()(*arguments)
    assert torch.equal(plain, exported)


def test_autocast_casts_the_input_and_the_gates() -> None:
    inputs = make_inputs(2, 40, 12, 40)
    with torch.autocast(backends.device().type, torch.bfloat16):
        out = fft_conv(**inputs)
    halves = inputs | {k: inputs[k].bfloat16() for k in ("u", "pre_gate", "post_gate")}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fft_conv(**halves))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 5)}, r"u has shape \(2, 5\); expected \(batch, seqlen, dim\)"),
        ({"u": torch.zeros(2, 5, 4, dtype=torch.int32)}, "u has dtype int32; it takes float32, bfloat16"),
        ({"filter": torch.zeros(3, 7)}, "filter has 3 groups, which do not divide the dim of u, 4"),
        ({"filter": torch.zeros(0, 7)}, "filter has 0 groups"),
        ({"filter": torch.zeros(4, 0)}, "with one tap at least"),
        ({"filter": torch.zeros(4)}, r"filter has shape \(4,\); expected \(groups, filter_len\)"),
        ({"filter": torch.zeros(4, 7, dtype=torch.float16)}, "filter has dtype float16; .* it takes float32"),
        ({"skip": torch.zeros(3)}, r"skip has shape \(3,\); expected \(4,\)"),
        ({"pre_gate": torch.zeros(2, 5, 3)}, r"pre_gate has shape \(2, 5, 3\); expected \(2, 5, 4\)"),
        ({"post_gate": torch.zeros(2, 5, 4).half()}, "post_gate has dtype float16"),
        ({"initial_state": torch.zeros(2, 7, 4)}, "initial_state has 7 inputs; expected at most filter_len - 1, 6"),
        ({"initial_state": torch.zeros(3, 6, 4)}, r"initial_state has shape \(3, 6, 4\); expected \(2, 6, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "expected batch 1, got 2"),
    ],
)
def test_refusals(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"fft_conv: .*{message}"):
        fft_conv(**make_inputs(2, 5, 4, 7) | {name: value.to(backends.device()) for name, value in change.items()})


def test_refuses_a_state_of_what_is_not_causal() -> None:
    inputs = make_inputs(2, 5, 4, 7, state=True)
    with pytest.raises(RuntimeError, match="initial_state is given to a convolution that is not causal"):
        fft_conv(**inputs, causal=False)
    del inputs["initial_state"]
    with pytest.raises(RuntimeError, match="the final state is asked for of a convolution that is not causal"):
        fft_conv(**inputs, causal=False, return_final_state=True)


# ---- wrong on purpose: each must be caught by the checks above


def sees_one_step_ahead(u: Tensor, **rest: Any) -> Any:
    return fft_conv(torch.cat([u[:, 1:], u[:, :1]], dim=1), **rest)


def drops_the_carry(u: Tensor, initial_state: Tensor, **rest: Any) -> Any:
    return fft_conv(u, initial_state=initial_state * 0, **rest)


def wraps_around(u: Tensor, filter: Tensor, skip: Tensor, pre_gate: Tensor, post_gate: Tensor, **rest: Any) -> Any:
    v = u * pre_gate
    spectra = torch.fft.rfft(v, dim=1) * torch.fft.rfft(filter.T, n=v.shape[1], dim=0)
    _, state = fft_conv(u, filter, pre_gate=pre_gate, **rest)
    return post_gate * (torch.fft.irfft(spectra, n=v.shape[1], dim=1) + v * skip), state


def forgets_the_skip(skip: Tensor, **inputs: Any) -> Any:
    return fft_conv(**inputs, skip=0 * skip)


def gates_twice(post_gate: Tensor, **inputs: Any) -> Any:
    return fft_conv(**inputs, post_gate=post_gate * post_gate)


MUTANTS = [sees_one_step_ahead, drops_the_carry, wraps_around, forgets_the_skip, gates_twice]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError, match=r"relative RMS error"):
        check_conv(mutant, make_inputs(2, 65, 37, 60, state=True))
