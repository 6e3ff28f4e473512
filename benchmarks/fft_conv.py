"""fft_conv and the ways to write it with torch."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

from madkernels import fft_conv
from madkernels.benchmarks.cases import LONG_CONV_CASES, Case, LongConvCase
from madkernels.benchmarks.harness import Benchmark, Peer

Gate = Tensor | None


def _gated(v: Tensor, y: Tensor, skip: Gate, post_gate: Gate) -> Tensor:
    y = y if skip is None else y + v * skip.to(v.dtype)
    return y if post_gate is None else y * post_gate


def _sizes(u: Tensor, filter: Tensor) -> tuple[int, torch.dtype]:
    """The size that torch.fft likes and that nothing wraps around in, and the dtype that it computes in."""
    samples = u.shape[1] + min(filter.shape[1], u.shape[1]) - 1
    size: int = next_fast_len(samples, real=True)  # pyright: ignore[reportAssignmentType]
    return size, torch.promote_types(u.dtype, torch.float32)


def torch_fft(u: Tensor, filter: Tensor, skip: Gate = None, pre_gate: Gate = None, post_gate: Gate = None) -> Tensor:
    """The formula by torch.fft along the sequence as it lies."""
    (size, wide), seqlen = _sizes(u, filter), u.shape[1]
    v = u if pre_gate is None else u * pre_gate
    spectrum = torch.fft.rfft(v.to(wide), n=size, dim=1) * torch.fft.rfft(filter[:, :seqlen].to(wide), n=size).T
    return _gated(v, torch.fft.irfft(spectrum, n=size, dim=1)[:, :seqlen].to(u.dtype), skip, post_gate)


def torch_fft_last(u: Tensor, filter: Tensor, skip: Gate = None, pre_gate: Gate = None, post_gate: Gate = None) -> Tensor:
    """The same along the last axis, for which torch.fft is faster; a copy unless `u` has its channels first in memory."""
    (size, wide), seqlen = _sizes(u, filter), u.shape[1]
    v = u if pre_gate is None else u * pre_gate
    spectrum = torch.fft.rfft(v.transpose(1, 2).to(wide), n=size) * torch.fft.rfft(filter[:, :seqlen].to(wide), n=size)
    return _gated(v, torch.fft.irfft(spectrum, n=size)[..., :seqlen].to(u.dtype).transpose(1, 2), skip, post_gate)


def conv1d(u: Tensor, filter: Tensor, skip: Gate = None, pre_gate: Gate = None, post_gate: Gate = None) -> Tensor:
    """torch's direct depthwise convolution."""
    seqlen, taps = u.shape[1], filter.shape[1]
    v = u if pre_gate is None else u * pre_gate
    padded = F.pad(v.transpose(1, 2), (taps - 1, 0))
    y = F.conv1d(padded, filter.to(u.dtype).flip(1).unsqueeze(1), groups=u.shape[2])[..., :seqlen]
    return _gated(v, y.transpose(1, 2), skip, post_gate)


@cache
def _flash_module(size: int, dtype: torch.dtype, device: torch.device) -> Any:
    return importlib.import_module("flashfftconv").FlashFFTConv(size, dtype=dtype).to(device)


def flash_fft_conv(u: Tensor, filter: Tensor, skip: Gate = None, pre_gate: Gate = None, post_gate: Gate = None) -> Tensor:
    """FlashFFTConv, padded so that nothing wraps around; it takes (batch, dim, seqlen), contiguous."""
    size = 1 << (2 * u.shape[1] - 1).bit_length()
    rows = [None if t is None else t.transpose(1, 2).contiguous() for t in (u, pre_gate, post_gate)]
    module = _flash_module(size, u.dtype, u.device)
    gates = rows[1:] if pre_gate is not None and post_gate is not None else []
    y: Tensor = module(rows[0], filter, *gates).transpose(1, 2)
    if skip is None:
        return y
    v = u * skip.to(u.dtype)
    return y + (v * pre_gate * post_gate if pre_gate is not None and post_gate is not None else v)


def _takes_conv1d(case: Case) -> bool:
    return isinstance(case, LongConvCase) and case.filter_len <= 1024


def _takes_flash(case: Case) -> bool:
    return isinstance(case, LongConvCase) and case.filter_len <= case.seqlen and case.seqlen >= 128 and case.seqlen % 4 == 0


_FLASH = Peer(
    "flash-fft-conv",
    flash_fft_conv,
    backward=True,
    channel_first=True,
    needs="flashfftconv:FlashFFTConv",
    devices=("cuda",),
    accepts=_takes_flash,
)

BENCHMARK = Benchmark(
    name="fft_conv",
    function=fft_conv,
    reference=torch_fft,  # in float64; that of the op takes a step for each lag
    cases=LONG_CONV_CASES,
    peers=(
        Peer("torch.fft", torch_fft, backward=True),
        Peer("torch.fft-last", torch_fft_last, backward=True),
        Peer("torch.fft-channel-first", torch_fft_last, backward=True, channel_first=True),
        Peer("ours-channel-first", fft_conv, backward=True, channel_first=True),
        Peer("conv1d", conv1d, backward=True, accepts=_takes_conv1d),
        _FLASH,
    ),
)
