"""The GPU's side of the benchmarks, as far as it goes without one."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import FixedRates
from rich.console import Console

from madkernels import cuda
from madkernels.benchmarks import gpu, report
from madkernels.benchmarks.causal_conv import BENCHMARK as CONV
from madkernels.benchmarks.harness import Measured
from madkernels.benchmarks.selective_scan import BENCHMARK as SCAN
from madkernels.cli import bench

DEVICE = torch.device("cuda", 0)


class NVMLError(Exception):
    """As pynvml's."""


def nvml(reasons: int, error: Exception | None = None) -> Any:
    """A stand-in for pynvml."""

    def handle(uuid: str) -> str:
        if error:
            raise error
        return uuid

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
        nvmlDeviceGetPowerUsage=lambda handle: 350_500,
        nvmlDeviceGetTemperature=lambda handle, kind: 55,
    )


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    part = SimpleNamespace(device_problem=lambda device: "GPU 0 is too old" if device == 0 else "")
    monkeypatch.setattr(cuda, "load", lambda: (part, ""))
    monkeypatch.setattr(cuda, "ops_with_kernels", lambda: frozenset({"causal_conv"}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))


@pytest.mark.usefixtures("one_gpu")
def test_rates_are_those_of_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in the GPU's place, with every call a microsecond."""
    called: list[Any] = []

    def seconds(call: Callable[[], Any]) -> float:
        called.append(call())
        return 1e-6

    part = SimpleNamespace(exp2_rate=lambda index: 5e12)
    monkeypatch.setattr(cuda, "load", lambda: (part, ""))
    monkeypatch.setattr(gpu, "seconds", seconds)
    monkeypatch.setattr(gpu, "l2_bytes", lambda device: 16)
    monkeypatch.setattr(gpu, "state", lambda device: {})
    monkeypatch.setattr(gpu, "SIDE", 8)
    rates = gpu.Rates(torch.device("cpu"), ["bfloat16", "float32"])
    for _ in range(2):
        rates.measure()
    assert rates.multiply == {name: [pytest.approx(2 * 8**3 * 1e6)] * 2 for name in ("bfloat16", "float32")}
    assert [out.dtype for out in called[1:3]] == [torch.bfloat16, torch.float32]
    assert called[1].shape == (8, 8)
    assert rates.exp2 == [5e12] * 2


def text_of(states: list[dict[str, Any]]) -> str:
    measured = Measured(CONV.cases[0], {}, FixedRates())  # type: ignore[arg-type]
    measured.rates.measure()
    measured.rates.states = states
    console = Console(file=io.StringIO(), width=200)
    report.show(measured, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("one_gpu")
def test_state_says_what_slows_the_gpu_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(0x1 | 0x4 | 0x40))
    state = gpu.state(DEVICE)
    assert state["slowdowns"] == ["power cap", "hardware thermal slowdown"]
    text = text_of([state, {**state, "sm_clock_mhz": 1500, "slowdowns": []}])
    assert "GPU clock 1000 to 1500 MHz, memory 2000 to 2000 MHz, 350 to 350 W" in text
    assert "slowed down by: hardware thermal slowdown, power cap" in text


@pytest.mark.usefixtures("one_gpu")
def test_state_that_is_not_told_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(0, NVMLError("Not Found")))
    assert "GPU clocks and power are not known: Not Found" in text_of([gpu.state(DEVICE)])
    assert "GPU clock" not in text_of([])


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("op", "device", "dtype", "message"),
    [
        ("selective_scan", "cuda", torch.float32, "selective_scan has no CUDA kernel here"),
        ("causal_conv", "cuda", torch.float64, "causal_conv takes float64 on the CPU only"),
        ("causal_conv", "cuda:1", torch.float32, "torch sees 1 GPUs"),
        ("causal_conv", "cuda", torch.float32, "GPU 0 is too old"),
    ],
)
def test_devices_that_cannot_be_used(op: str, device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench._device(op, device, [dtype])


def test_peers_by_device() -> None:
    """Peers that need a GPU are looked for where there is one, so that they are listed as absent there."""
    on_gpu = {peer.name for benchmark in (CONV, SCAN) for peer in bench._peers(benchmark, "auto", "cuda")}
    on_cpu = {peer.name for benchmark in (CONV, SCAN) for peer in bench._peers(benchmark, "auto", "cpu")}
    assert on_gpu - on_cpu == {"mamba-ssm", "causal-conv1d", "causal-conv1d-channel-first"}
