"""What a GPU needs in place of the CPU's clock and memory profile: events, the caching allocator, rates, and its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from madkernels import cuda
from madkernels.cli.doctor import nvidia_driver

AHEAD = 1_000_000  # cycles of the pause that work is queued behind
SIDE = 8192  # of the square matrices whose product gives the rate of tensor cores
# Reasons for a lower clock, as NVML's bits; idling, an application's own setting and a display are none.
SLOWDOWNS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def seconds(call: Callable[[], Any]) -> float:
    """Seconds that the GPU spends on a call. It is queued behind a pause, so that the CPU is ahead of the GPU, as in a busy
    stream; a call whose launches take longer than the pause and the work is timed at the pace of its launches."""
    torch_cuda: Any = torch.cuda  # these have no types
    begin, end = (torch_cuda.Event(enable_timing=True) for _ in range(2))
    torch_cuda._sleep(AHEAD)
    begin.record()
    out = call()
    end.record()
    end.synchronize()
    del out
    return float(begin.elapsed_time(end)) * 1e-3


def peak_memory(call: Callable[[], Any]) -> int:
    """Peak bytes that torch's allocator gave out during a call, beyond those it had given out before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before


def l2_bytes(device: torch.device) -> int:
    """The size of the cache that all of the GPU shares."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def describe(device: torch.device) -> dict[str, str]:
    """The GPU, its driver, and the build that runs on it."""
    properties = torch.cuda.get_device_properties(device)
    part, _ = cuda.load()
    info: dict[str, str] = part.build_info() if part else {}
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "gpu_memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "l2_cache": f"{l2_bytes(device) >> 20} MiB",
        "driver": nvidia_driver() or "unknown",
        "cuda_of_torch": str(torch.version.cuda),
        "nvcc": info.get("nvcc", ""),
        "cuda_archs": info.get("archs", ""),
    }


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power, temperature and what lowers the clocks, now; `failure` where NVML does not tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "slowdowns": [name for bit, name in SLOWDOWNS.items() if reasons & bit],
        }
    except pynvml.NVMLError as error:
        return {"failure": str(error)}


class Rates:
    """As `machine.Rates`, of a GPU. A copy reads and writes buffers that together are eight times its L2. Products are those
    of torch's matrix product in the dtype, as it is set up: of float32 without TF32, unless somebody allowed it."""

    def __init__(self, device: torch.device, multiplied: Sequence[str] = ()):
        self.multiply: dict[str, list[float]] = {name: [] for name in multiplied}
        self.exp2: list[float] = []
        self.copy: list[float] = []
        self.states: list[dict[str, Any]] = []
        self._device = device
        self._source = torch.ones(4 * l2_bytes(device), dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        # Normal numbers: on zeros a GPU draws less power, and so keeps a higher clock than on what is timed.
        self._factors = {name: torch.randn(SIDE, SIDE, dtype=getattr(torch, name), device=device) for name in self.multiply}
        for factor in self._factors.values():
            torch.matmul(factor, factor)  # loads the library

    def measure(self) -> None:
        """Adds one measurement of each, and the state of the GPU."""
        self.copy.append(2 * self._source.nbytes / seconds(lambda: self._target.copy_(self._source)))
        part, reason = cuda.load()
        if part is None:
            raise RuntimeError(reason)
        self.exp2.append(part.exp2_rate(self._device.index))
        for name, factor in self._factors.items():
            self.multiply[name].append(2 * SIDE**3 / seconds(partial(torch.matmul, factor, factor)))
        self.states.append(state(self._device))
