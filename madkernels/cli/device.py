"""The device that a command is told to use."""

from __future__ import annotations

import re
from typing import Literal


def check_device(name: str, *, numbered: bool = True) -> None:
    """ValueError where it is no device, or is not here."""
    if (index := gpu_of(name, numbered=numbered)) is not None:
        check_gpu(name, index)


def gpu_of(name: str, *, numbered: bool = True) -> int | None:
    """The number of the GPU that a device is, None for the CPU. ValueError where it is neither."""
    if name == "cpu":
        return None
    if not re.fullmatch("cuda(:[0-9]+)?" if numbered else "cuda", name):
        expected = "cpu, cuda or cuda:<number>" if numbered else "cpu or cuda"
        raise ValueError(f"--device: {name!r} is not known; expected {expected}")
    return int(name.partition(":")[2] or 0)


def check_gpu(name: str, index: int) -> None:
    """ValueError where torch sees no such GPU."""
    import torch

    if index >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {name}: torch sees {f'{count} GPUs' if count else 'no GPU'}; see madkernels doctor")


def compute_dtype(name: Literal["auto", "float32", "bfloat16"], device: str) -> Literal["float32", "bfloat16"]:
    """The dtype of a name: auto is bfloat16 where the device multiplies it faster than float32, else float32."""
    if name != "auto":
        return name
    import torch

    from madkernels import _C

    pays = _C.cpu_bfloat16_dot() if gpu_of(device) is None else torch.cuda.is_bf16_supported()
    return "bfloat16" if pays else "float32"
