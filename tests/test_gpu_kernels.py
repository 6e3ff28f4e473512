"""What only the CUDA kernels do: schedules of threads, and splits of time that follow the size of the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import backends
import pytest
import test_causal_conv as conv
import test_selective_scan as scan
import torch
from checks import transposed, with_gradients
from torch import Tensor

from madkernels import causal_conv, selective_scan

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.backends("emulated")]
SEEDS = range(20)
MANY_MULTIPROCESSORS = 1000  # more than any row here can use: time is split as far as it goes


@pytest.fixture
def large_gpu() -> Iterator[None]:
    backends.set_multiprocessors(MANY_MULTIPROCESSORS)
    yield
    backends.set_multiprocessors(4)


def results_of_seed(seed: int) -> dict[str, Tensor]:
    """Outputs and gradients of small cases that use every barrier: two runs of states, two chunks, two blocks."""
    backends.set_seed(seed)
    scans = with_gradients(
        lambda **t: scan.whole(selective_scan)(**t, delta_softplus=True), scan.make_inputs(1, 41, 67, 19, 1)
    )
    inputs = conv.make_inputs(2, 70, 5, 4)
    inputs["x"] = transposed(inputs["x"])
    convs = with_gradients(lambda **t: conv.whole(causal_conv)(**t, activation="silu"), inputs)
    return {f"scan {k}": v for k, v in scans.items()} | {f"conv {k}": v for k, v in convs.items()}


def test_same_bits_whatever_the_schedule() -> None:
    first = results_of_seed(0)
    for seed in SEEDS[1:]:
        for name, value in results_of_seed(seed).items():
            assert torch.equal(value, first[name]), f"{name} differs with seed {seed}"


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
