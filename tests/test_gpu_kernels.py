"""What only the CUDA kernels do: schedules of threads, and splits of time that follow the size of the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import backends
import pytest
import torch
from cases import CASES as CASES_OF_OPS
from checks import relative_rms, transposed, with_gradients
from op_cases import Inputs, OpCase, changed, offsets_of
from torch import Tensor

from madkernels import (
    RoutingPlan,
    attention_step,
    causal_conv,
    fft_conv,
    grouped_gemm,
    moe_combine,
    moe_dispatch,
    moe_mlp,
    moe_route,
    selective_scan,
)

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.backends("ptx")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION, CONV, LONG, SCAN = (CASES_OF_OPS[n] for n in ("attention", "causal_conv", "fft_conv", "selective_scan"))
GEMM, MOE, SSD = (CASES_OF_OPS[n] for n in ("grouped_gemm", "moe_mlp", "ssd_scan"))
MANY_MULTIPROCESSORS = 1000  # more than any row here can use: time is split as far as it goes


@pytest.fixture
def large_gpu() -> Iterator[None]:
    backends.set_multiprocessors(MANY_MULTIPROCESSORS)
    yield
    backends.set_multiprocessors(backends.MULTIPROCESSORS)


@pytest.fixture(params=[0, MANY_MULTIPROCESSORS], ids=["small", "large"])
def small_or_large_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    backends.set_multiprocessors(request.param)
    yield
    backends.set_multiprocessors(backends.MULTIPROCESSORS)


def from_nothing(op: OpCase, inputs: Inputs) -> Inputs:
    """Without the history that would make a long convolution longer."""
    return {k: t for k, t in inputs.items() if op is not LONG or k != "initial_state"}


Run = Callable[[torch.dtype], dict[str, Tensor]]


def case(op: OpCase, *shape: int, across: Sequence[str] = (), **options: Any) -> Run:
    """Results and gradients of an op. across: inputs whose second-last axis is dense."""

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = from_nothing(op, op.draw(*shape, dtype=dtype))
        inputs = changed(inputs, transposed, across)
        return with_gradients(lambda **t: op.call(**t, **op.options | options), inputs)

    return run


def packed_case(op: OpCase, lengths: tuple[int, ...], *sizes: int) -> Run:
    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        inputs, documents = op.packed(lengths, *sizes, dtype=dtype), op.documents(lengths)
        return with_gradients(lambda **t: op.call(**t, **op.options, **documents), from_nothing(op, inputs))

    return run


def attention_steps(heads: int, kv_heads: int, head_dim: int) -> Run:
    """Two sequences, of which one takes two blocks a head."""

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = (2, heads, head_dim), *[(2, 300, kv_heads, head_dim)] * 2, *[(2, kv_heads, head_dim)] * 2
        q, k_cache, v_cache, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        lengths = torch.tensor([40, 299], dtype=torch.int32)
        out, lse = attention_step(q, k_cache, v_cache, k, v, cache_seqlens=lengths, return_lse=True)
        return {"out": out, "lse": lse, "k_cache": k_cache, "v_cache": v_cache}

    return run


def on_one_multiprocessor(run: Run) -> Run:
    """On a GPU so small that a block takes several sequences."""

    def small(dtype: torch.dtype) -> dict[str, Tensor]:
        backends.set_multiprocessors(1)
        return run(dtype)

    return small


def routing(**options: Any) -> Run:
    """Of 70 tokens to 3 of 40 experts and back: the plan, what comes back, and gradients."""

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        def there_and_back(logits: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            plan = moe_route(logits, 3, **options)
            return *plan, moe_combine(moe_dispatch(x, plan), plan)

        generator = torch.Generator().manual_seed(0)
        inputs = {k: torch.randn(70, n, generator=generator).to(dtype) for k, n in (("logits", 40), ("x", 24))}
        return with_gradients(there_and_back, inputs)

    return run


# Small, and together they go through every kernel and every barrier.
CASES: dict[str, Run] = {
    "scan of two blocks": case(SCAN, 1, 41, 67, 19, 1),
    "scan of full chunks": case(SCAN, 2, 100, 70, 16, 1),
    "scan of three segments": case(SCAN, 1, 780, 3, 2, 1),
    "scan of segments and many states": case(SCAN, 1, 800, 5, 19, 1),
    "scan of documents, few states": packed_case(SCAN, (5, 1, 0, 64, 33), 20, 6, 2),
    "scan of documents, 16 states": packed_case(SCAN, (5, 1, 0, 64, 33), 20, 16, 1),
    "chunks of heads of two tiles": case(SSD, 1, 130, 70, 2, 66, 1),
    "chunks of documents": packed_case(SSD, (5, 1, 0, 64, 33), 20, 4, 6, 2),
    "convolution along time": case(CONV, 2, 70, 5, 4, across=CONV.names("batch", "seqlen")),
    "convolution of pairs": case(CONV, 2, 300, 8, 4),
    "wide convolution": case(CONV, 2, 80, 8, 9),
    "long convolution of 200": on_one_multiprocessor(case(LONG, 3, 200, 5, 1, 150)),
    "long convolution of 2200": on_one_multiprocessor(case(LONG, 3, 2200, 3, 1, 2150)),
    "long convolution of two levels": on_one_multiprocessor(case(LONG, 3, 16500, 1, 1, 16450)),
    "attention of 20": case(ATTENTION, 1, 130, 20, 2, 1, 20),
    "attention of 70": case(ATTENTION, 1, 70, 70, 1, 1, 65),
    "attention of 130": case(ATTENTION, 1, 70, 130, 1, 1, 5),
    "attention of documents": packed_case(ATTENTION, (5, 1, 0, 64, 33), 20, 2, 2, 20),
    "attention step of one head": attention_steps(2, 2, 20),
    "attention step of four heads": attention_steps(4, 1, 70),
    "attention step of six heads": attention_steps(6, 1, 40),
    "groups": case(GEMM, 1, 200, 150, 70, 2),
    "groups, transposed and gathered": case(GEMM, 1, 200, 150, 70, 2, transpose=True, gathered=True),
    "experts": case(MOE, 1, 150, 140, 70, 2, 1),
    "experts, transposed": case(MOE, 1, 150, 140, 70, 2, 1, across=("gate_up", "down")),
    "routing": routing(),
    "routing to groups": routing(score="sigmoid", groups=(20, 4), capacity=6),
    "long convolution of documents": on_one_multiprocessor(packed_case(LONG, (80, 800, 20), 2, 2, 500)),
}
SEEDED = (("reverse", 0), ("warps", 7), ("lanes", 11), ("lanes", 12))


@pytest.fixture
def in_order() -> Iterator[None]:
    yield
    backends.set_schedule("order")


@pytest.mark.usefixtures("large_gpu", "in_order")
@pytest.mark.parametrize("case", CASES)
def test_same_bits_whatever_the_schedule(case: str) -> None:
    """And no race in any."""
    backends.set_schedule("order")
    first = CASES[case](torch.float32)
    for schedule in SEEDED:
        backends.set_schedule(*schedule)
        for name, value in CASES[case](torch.float32).items():
            assert torch.equal(value, first[name]), f"{name} differs with schedule {schedule}"


def is_missed(kernel: str, barrier: int, case: str, dtype: torch.dtype, right: dict[str, Tensor]) -> bool:
    """Whether leaving out a barrier is reported, or seen in the results."""
    with backends.without_barrier(kernel, barrier):
        try:
            found = CASES[case](dtype)
        except RuntimeError:
            return True
    return any(not torch.equal(value, right[name]) for name, value in found.items())


@pytest.mark.usefixtures("large_gpu")
def test_every_barrier_is_missed() -> None:
    """Each of every kernel, of blocks and of warps, left out in turn."""
    right = {(case, dtype): CASES[case](dtype) for case in CASES for dtype in DTYPES}
    launching: dict[str, list[tuple[str, torch.dtype]]] = {}
    for case, dtype in right:
        backends.launched()
        CASES[case](dtype)
        for kernel in backends.launched():
            launching.setdefault(kernel, []).append((case, dtype))
    barriers = {kernel: found for kernel in backends.kernels() if (found := backends.barriers(kernel))}
    assert set(barriers) <= set(launching), "kernels with barriers that no case launches"
    unneeded = [
        f"{kernel}: {place}"
        for kernel, found in barriers.items()
        for barrier, place in found.items()
        if not any(is_missed(kernel, barrier, *key, right[key]) for key in launching[kernel])
    ]
    assert unneeded == []


@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize("dstate", [3, 18])
def test_time_is_split(dstate: int) -> None:
    SCAN.check(SCAN.draw(1, 1100, 9, dstate, 1))


@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize(
    "lengths",
    [
        (288, 288, 288, 36),  # documents end where segments do
        (287, 1, 0, 612),
        (1, 898, 1),  # one document through all segments but for a step on both sides
    ],
)
def test_time_is_split_across_documents(lengths: tuple[int, ...]) -> None:
    SCAN.check(SCAN.packed(lengths, 6, 2, 2), cu_seqlens=offsets_of(lengths))


@pytest.mark.usefixtures("small_or_large_gpu")  # stretches of 128 steps, or of 32
@pytest.mark.parametrize("dim", [3, 8])  # by single channels, or by pairs
@pytest.mark.parametrize("lengths", [(300,), (31, 1, 0, 97, 171)])
def test_stretches_of_time(dim: int, lengths: tuple[int, ...]) -> None:
    for width in (2, 4):
        CONV.check(CONV.packed(lengths, dim, width), cu_seqlens=offsets_of(lengths))


MALFORMED = [
    [0, 60],  # ends before the row
    [0, 120],
    [5, 100],
    [0, 70, 30, 100],
    [-5, 50, 100],
    [0, 0],
    [100, 0],
    [-(2**31), 2**31 - 1],
    [2**31 - 1, -(2**31), 40],
]


@pytest.mark.backends("ptx", "cuda")
@pytest.mark.parametrize("offsets", MALFORMED, ids=str)
@pytest.mark.parametrize("op", [op for op in CASES_OF_OPS.values() if op.has_documents], ids=lambda op: op.name)
def test_malformed_offsets_end_and_stay_inside(op: OpCase, offsets: list[int]) -> None:
    """Nobody looks at them before the kernels do. What comes out is anything, and documents that overlap write the same
    places; the simulator sees what is touched outside."""
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=backends.device())
    inputs = op.draw(1, 120, *op.little, docs=len(offsets) - 1)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    with backends.without_races() if backends.device().type == "cpu" else contextlib.nullcontext():
        outputs = op.call(**leaves, **dict.fromkeys(op.offsets, cu_seqlens))
        torch.autograd.grad([o.sum() for o in outputs], list(leaves.values()))


INDICES = [-1, 2, -(2**31), 2**31 - 1, 1, 50, 49, 0, 3, 51]


@pytest.mark.backends("ptx", "cuda")
@pytest.mark.parametrize("offsets", MALFORMED, ids=str)
def test_malformed_groups_end_and_stay_inside(offsets: list[int]) -> None:
    """Nor at indices and plans: what is none of a tensor's rows is a row of zeros, or left out."""
    device = backends.device()
    some, index = (torch.tensor(v, dtype=torch.int32, device=device) for v in (offsets, INDICES * 10))
    groups, weights = len(offsets) - 1, torch.rand(50, 2, device=device)
    x, gate_up, down = (torch.randn(shape, device=device) for shape in ((50, 6), (groups, 10, 6), (groups, 6, 5)))
    pairs = index.view(50, 2)
    plan = RoutingPlan(weights, pairs, some, some[1:], index, pairs, weights.sum(), weights.sum())
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    with backends.without_races() if device.type == "cpu" else contextlib.nullcontext():
        y = grouped_gemm(x, gate_up, some, gather=index, activation="swiglu")
        torch.autograd.grad(grouped_gemm(y, down, some).sum(), leaves[:3])
        torch.autograd.grad(moe_mlp(x, plan, gate_up, down).sum(), leaves)


def test_groups_whose_rows_are_not_aligned() -> None:
    """Views of tensors, and widths that are no whole chunks: element by element, with the same bits."""
    whole = GEMM.draw(1, 40, 32, 16, 2)
    apart = {k: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for k, t in whole.items()}
    plain, found = (with_gradients(lambda **t: GEMM.call(**t, **GEMM.options), given) for given in (whole, apart))
    for name, value in found.items():
        assert torch.equal(value, plain[name]), name


def test_no_document_of_some_steps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cu_seqlens has no document; the seqlen is 5"):
        causal_conv(torch.zeros(1, 5, 2), torch.zeros(2, 3), cu_seqlens=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(("seqlen", "taps"), [(8193, 8193), (16384, 64)])
def test_long_convolutions_where_blocks_have_99_kilobytes(seqlen: int, taps: int) -> None:
    """As on compute capability 8.6, 8.9 and 12.0."""
    with backends.shared_memory(99 << 10):
        LONG.check(from_nothing(LONG, LONG.draw(1, seqlen, 3, 3, taps)))


def by_torch_fft(u: Tensor, taps: Tensor) -> tuple[Tensor]:
    points = u.shape[1] + taps.shape[1]
    product = torch.fft.rfft(u, points, dim=1) * torch.fft.rfft(taps.T, points, dim=0)
    return (torch.fft.irfft(product, points, dim=1)[:, : u.shape[1]],)


@pytest.mark.slow
@pytest.mark.parametrize("log2", range(13, 24))
def test_convolutions_of_all_lengths(log2: int) -> None:
    """Transforms of 2^13 .. 2^23 points: all column levels, the longest rows. Of the longest, races would take gigabytes."""
    half = 2 ** (log2 - 1)
    inputs = {"u": torch.randn(1, half, 1), "taps": torch.randn(1, half) / half**0.5}
    exact = with_gradients(by_torch_fft, {k: t.double() for k, t in inputs.items()})
    with backends.without_races() if log2 > 18 else contextlib.nullcontext():
        found = with_gradients(lambda u, taps: (fft_conv(u, taps),), inputs)
    for name, value in found.items():
        assert relative_rms(value, exact[name]) < 1e-6, name


@pytest.mark.parametrize(("kilobytes", "most"), [(99, 22), (163, 23), (227, 23)])
def test_the_longest_convolution_follows_the_shared_memory(kilobytes: int, most: int) -> None:
    u = torch.zeros(1, 1, 1).expand(1, 2**most, 1)
    message = rf"this GPU takes sequences and filters of up to 2\^{most} samples together; got {2**most} and 2$"
    with backends.shared_memory(kilobytes << 10), pytest.raises(RuntimeError, match=message):
        fft_conv(u, torch.zeros(1, 2))


def test_refuses_what_a_gpu_does_not_take() -> None:
    with pytest.raises(RuntimeError, match="u has dtype float64, which the CPU takes; a GPU takes float32, bfloat16"):
        selective_scan(**SCAN.draw(1, 3, 2, 2, 1, dtype=torch.float64))
    huge = torch.zeros(1).expand(1, 2**31, 1)
    with pytest.raises(RuntimeError, match="x has an axis of 2147483648; a GPU takes up to 2147483647"):
        causal_conv(huge, torch.zeros(1, 3))
