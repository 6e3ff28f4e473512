"""What only the CUDA kernels do: schedules of threads, and splits of time that follow the size of the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import backends
import op_cases
import pytest
import test_causal_conv as conv
import test_fft_conv as long
import test_selective_scan as scan
import torch
from checks import transposed, with_gradients
from op_cases import OPS
from torch import Tensor

import madkernels
from madkernels import causal_conv, fft_conv, selective_scan

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.backends("emulated")]
SEEDS = range(20)
MANY_MULTIPROCESSORS = 1000  # more than any row here can use: time is split as far as it goes


@pytest.fixture
def large_gpu() -> Iterator[None]:
    backends.set_multiprocessors(MANY_MULTIPROCESSORS)
    yield
    backends.set_multiprocessors(4)


@pytest.fixture(params=[0, MANY_MULTIPROCESSORS], ids=["small", "large"])
def small_or_large_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    backends.set_multiprocessors(request.param)
    yield
    backends.set_multiprocessors(4)


def scan_results(*sizes: int) -> dict[str, Tensor]:
    return with_gradients(lambda **t: scan.whole(selective_scan)(**t, delta_softplus=True), scan.make_inputs(*sizes))


def results_of_seed(seed: int) -> dict[str, Tensor]:
    """Outputs and gradients of small cases that use every barrier."""
    backends.set_seed(seed)
    inputs = conv.make_inputs(2, 70, 5, 4)
    inputs["x"] = transposed(inputs["x"])
    found = {
        "two blocks, chunks and runs of states": scan_results(1, 41, 67, 19),
        "three segments": scan_results(1, 780, 3, 2),
        "convolution": with_gradients(lambda **t: conv.whole(causal_conv)(**t, activation="silu"), inputs),
    }
    backends.set_multiprocessors(1)  # so that a block takes several sequences
    for name, seqlen, dim in (("long convolution", 2200, 3), ("two levels", 16500, 1)):
        found[name] = with_gradients(long.whole(fft_conv), long.make_inputs(3, seqlen, dim, seqlen - 50, groups=1))
    packed = long.make_inputs(1, 900, 2, 500)
    lengths = (80, 800, 20)
    found["documents"] = with_gradients(lambda **t: long.whole(fft_conv)(**t, cu_seqlens=long.offsets_of(lengths)), packed)
    backends.set_multiprocessors(MANY_MULTIPROCESSORS)
    return {f"{case}: {name}": value for case, results in found.items() for name, value in results.items()}


@pytest.mark.usefixtures("large_gpu")
def test_same_bits_whatever_the_schedule() -> None:
    first = results_of_seed(0)
    for seed in SEEDS[1:]:
        for name, value in results_of_seed(seed).items():
            assert torch.equal(value, first[name]), f"{name} differs with seed {seed}"


def barriers() -> list[tuple[str, int]]:
    """Files of csrc and lines of the barriers in kernels."""
    files = sorted([*(backends.ROOT / "csrc").glob("*/*.cu"), *(backends.ROOT / "csrc").glob("*/*_gpu.h")])
    return [
        (str(file.relative_to(backends.ROOT)), number)
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if "__syncthreads()" in line
    ]


@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize(("file", "line"), barriers())
def test_every_barrier_is_missed(file: str, line: int) -> None:
    """Without it, some schedule gives other results."""
    right = results_of_seed(0)

    def is_wrong(seed: int) -> bool:
        found = results_of_seed(seed)
        return any(not torch.equal(found[name], value) for name, value in right.items())

    with backends.without_barrier(file, line):
        assert any(is_wrong(seed) for seed in SEEDS)


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


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("offsets", MALFORMED, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_malformed_offsets_end_and_stay_inside(op: str, offsets: list[int]) -> None:
    """Nobody looks at them before the kernels do. What comes out is anything; a sanitizer sees what is touched outside."""
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=backends.device())
    inputs = op_cases.draw(op, dtype=torch.float32)
    inputs = {k: t[:1].repeat(1, 3, *[1] * (t.dim() - 2)) if t.shape[:2] == (2, 40) else t for k, t in inputs.items()}
    inputs["initial_state"] = inputs["initial_state"][:1].repeat(len(offsets) - 1, 1, 1)
    leaves = {k: t.to(backends.device()).requires_grad_() for k, t in inputs.items()}
    outputs = getattr(madkernels, op)(**leaves, cu_seqlens=cu_seqlens, return_final_state=True)
    torch.autograd.grad([o.sum() for o in outputs], list(leaves.values()))


def test_no_document_of_some_steps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cu_seqlens has no document; the seqlen is 5"):
        causal_conv(torch.zeros(1, 5, 2), torch.zeros(2, 3), cu_seqlens=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(("seqlen", "taps"), [(8193, 8193), (16384, 64)])
def test_long_convolutions_where_blocks_have_99_kilobytes(seqlen: int, taps: int) -> None:
    """As on compute capability 8.6, 8.9 and 12.0."""
    with backends.shared_memory(99 << 10):
        long.check_conv(fft_conv, long.make_inputs(1, seqlen, 1, taps))


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
