"""What only the CUDA kernels do: schedules of threads, and splits of time that follow the size of the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import backends
import op_cases
import pytest
import test_causal_conv as conv
import test_fft_conv as long
import test_selective_scan as scan
import torch
from checks import relative_rms, transposed, with_gradients
from op_cases import OPS
from torch import Tensor

import madkernels
from madkernels import causal_conv, fft_conv, selective_scan

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.backends("ptx")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


def scan_case(*sizes: int) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """Outputs and gradients of a scan."""
    op = scan.whole(selective_scan)
    return lambda dtype: with_gradients(lambda **t: op(**t, delta_softplus=True), scan.make_inputs(*sizes, dtype=dtype))


def packed_scan(dtype: torch.dtype, dim: int, dstate: int, groups: int) -> dict[str, Tensor]:
    lengths = (5, 1, 0, 64, 33)
    inputs = scan.make_inputs(1, sum(lengths), dim, dstate, groups, docs=len(lengths), dtype=dtype)
    options = {"delta_softplus": True, "cu_seqlens": scan.offsets_of(lengths)}
    return with_gradients(lambda **t: scan.whole(selective_scan)(**t, **options), inputs)


def conv_case(*sizes: int, by_time: bool = False) -> Callable[[torch.dtype], dict[str, Tensor]]:
    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = conv.make_inputs(*sizes, dtype=dtype)
        if by_time:
            inputs["x"] = transposed(inputs["x"])
        return with_gradients(lambda **t: conv.whole(causal_conv)(**t, activation="silu"), inputs)

    return run


def long_case(seqlen: int, dim: int) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """On a GPU so small that a block takes several sequences."""

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        backends.set_multiprocessors(1)
        return with_gradients(long.whole(fft_conv), long.make_inputs(3, seqlen, dim, seqlen - 50, groups=1, dtype=dtype))

    return run


def packed_long(dtype: torch.dtype) -> dict[str, Tensor]:
    backends.set_multiprocessors(1)
    lengths = (80, 800, 20)
    inputs = long.make_inputs(1, sum(lengths), 2, 500, dtype=dtype)
    return with_gradients(lambda **t: long.whole(fft_conv)(**t, cu_seqlens=long.offsets_of(lengths)), inputs)


# Small, and together they go through every kernel and every barrier.
CASES: dict[str, Callable[[torch.dtype], dict[str, Tensor]]] = {
    "scan of two blocks": scan_case(1, 41, 67, 19),
    "scan of full chunks": scan_case(2, 100, 70, 16),
    "scan of three segments": scan_case(1, 780, 3, 2),
    "scan of segments and many states": scan_case(1, 800, 5, 19),
    "scan of documents, few states": lambda dtype: packed_scan(dtype, 20, 6, 2),
    "scan of documents, 16 states": lambda dtype: packed_scan(dtype, 20, 16, 1),
    "convolution along time": conv_case(2, 70, 5, 4, by_time=True),
    "convolution of pairs": conv_case(2, 300, 8, 4),
    "wide convolution": conv_case(2, 80, 8, 9),
    "long convolution of 200": long_case(200, 5),
    "long convolution of 2200": long_case(2200, 3),
    "long convolution of two levels": long_case(16500, 1),
    "long convolution of documents": packed_long,
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
    scan.check_scan(selective_scan, scan.make_inputs(1, 1100, 9, dstate))


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
    inputs = scan.make_inputs(1, sum(lengths), 6, 2, 2, docs=len(lengths))
    scan.check_scan(selective_scan, inputs, cu_seqlens=scan.offsets_of(lengths))


@pytest.mark.usefixtures("small_or_large_gpu")  # stretches of 128 steps, or of 32
@pytest.mark.parametrize("dim", [3, 8])  # by single channels, or by pairs
@pytest.mark.parametrize("lengths", [(300,), (31, 1, 0, 97, 171)])
def test_stretches_of_time(dim: int, lengths: tuple[int, ...]) -> None:
    for width in (2, 4):
        inputs = conv.make_inputs(1, sum(lengths), dim, width, docs=len(lengths))
        conv.check_conv(causal_conv, inputs, cu_seqlens=conv.offsets_of(lengths), activation="silu")


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
@pytest.mark.parametrize("op", OPS)
def test_malformed_offsets_end_and_stay_inside(op: str, offsets: list[int]) -> None:
    """Nobody looks at them before the kernels do. What comes out is anything, and documents that overlap write the same
    places; the simulator sees what is touched outside."""
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=backends.device())
    inputs = op_cases.draw(op, dtype=torch.float32)
    inputs = {k: t[:1].repeat(1, 3, *[1] * (t.dim() - 2)) if t.shape[:2] == (2, 40) else t for k, t in inputs.items()}
    inputs["initial_state"] = inputs["initial_state"][:1].repeat(len(offsets) - 1, 1, 1)
    leaves = {k: t.to(backends.device()).requires_grad_() for k, t in inputs.items()}
    with backends.without_races() if backends.device().type == "cpu" else contextlib.nullcontext():
        outputs = getattr(madkernels, op)(**leaves, cu_seqlens=cu_seqlens, return_final_state=True)
        torch.autograd.grad([o.sum() for o in outputs], list(leaves.values()))


def test_no_document_of_some_steps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cu_seqlens has no document; the seqlen is 5"):
        causal_conv(torch.zeros(1, 5, 2), torch.zeros(2, 3), cu_seqlens=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(("seqlen", "taps"), [(8193, 8193), (16384, 64)])
def test_long_convolutions_where_blocks_have_99_kilobytes(seqlen: int, taps: int) -> None:
    """As on compute capability 8.6, 8.9 and 12.0."""
    with backends.shared_memory(99 << 10):
        long.check_conv(fft_conv, long.make_inputs(1, seqlen, 3, taps))


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
        selective_scan(**scan.make_inputs(1, 3, 2, 2, dtype=torch.float64))
    huge = torch.zeros(1).expand(1, 2**31, 1)
    with pytest.raises(RuntimeError, match="x has an axis of 2147483648; a GPU takes up to 2147483647"):
        causal_conv(huge, torch.zeros(1, 3))
