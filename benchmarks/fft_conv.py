"""fft_conv and the ways to write it with torch."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

from madkernels import fft_conv
from madkernels.benchmarks.cases import ROWS, Argument, Arguments, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.hyena import LongConvLayer

Gate = Tensor | None


@dataclass(frozen=True, kw_only=True)
class LongConvCase(Case):
    """A call of fft_conv, each channel with a filter of its own that decays to 1 % at its end."""

    arguments: ClassVar[Arguments] = {
        "u": Argument(ROWS),
        "filter": Argument(("groups", "filter_len"), "parameter"),
        "skip": Argument(("dim",), "parameter", optional=True),
        "pre_gate": Argument(ROWS, optional=True),
        "post_gate": Argument(ROWS, optional=True),
        "initial_state": Argument(("sequences", "history", "dim"), "wide", optional=True),
    }
    dim: int
    filter_len: int
    skip: bool = False
    gates: bool = False

    def arithmetic(self, direction: str) -> float:
        """10 L log2 L a channel, as the layers count a convolution; backward twice as many."""
        by_row = 10 * self.seqlen * math.log2(max(self.seqlen, 2))
        return {"forward": 1, "backward": 2}[direction] * self.batch * self.dim * by_row

    @property
    def independent(self) -> Axes:
        return ("dim",)

    def shortened(self) -> Case:
        return replace(self, seqlen=max(self.seqlen // 8, 1), filter_len=max(self.filter_len // 8, 1))

    def has(self, argument: str) -> bool:
        return self.gates if argument in ("pre_gate", "post_gate") else super().has(argument)

    def axes_of(self, argument: str) -> Axes:
        return ("dim", "filter_len") if argument == "filter" else super().axes_of(argument)

    def dtype_of(self, argument: str, activations: torch.dtype) -> torch.dtype:
        """Filters, which a model computes, in float32 at the least."""
        parameter = self.arguments[argument].kind == "parameter"
        return torch.promote_types(activations, torch.float32) if parameter else super().dtype_of(argument, activations)

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        window = torch.exp(torch.linspace(0, math.log(0.01), self.filter_len))
        return inputs | {"filter": inputs["filter"] * window / window.norm()}


CASES = (
    LongConvCase(name="1k", batch=2, seqlen=1024, dim=512, filter_len=1024),
    LongConvCase(name="4k", batch=2, seqlen=4096, dim=512, filter_len=4096),
    LongConvCase(name="4099", batch=2, seqlen=4099, dim=512, filter_len=4099),
    LongConvCase(name="16k", batch=2, seqlen=16384, dim=512, filter_len=16384),
    LongConvCase(name="hyena", batch=2, seqlen=2048, dim=768, filter_len=2048, skip=True, gates=True),
    LongConvCase(name="medium", batch=2, seqlen=4096, dim=512, filter_len=128),
    LongConvCase(name="short", batch=2, seqlen=4096, dim=512, filter_len=16),
    LongConvCase(name="one", batch=1, seqlen=1, dim=1, filter_len=1, quick=True),
    LongConvCase(name="odd", batch=2, seqlen=63, dim=37, filter_len=63, skip=True, gates=True, quick=True),
    LongConvCase(name="longer", batch=2, seqlen=65, dim=5, filter_len=100, quick=True),
    LongConvCase(name="thousand", batch=1, seqlen=1000, dim=33, filter_len=1000, gates=True, quick=True),
)
TRAINING = LongConvCase(name="training", batch=8, seqlen=8192, dim=2048, filter_len=8192, gates=True)


def case_of(size: Size) -> LongConvCase:
    """The long convolution of a Hyena layer of a model, as long as the sequence."""
    layer = size.layer("hyena")
    assert isinstance(layer, LongConvLayer)
    sizes: dict[str, Any] = {"batch": size.batch, "seqlen": size.seqlen, "dim": layer.channels, "filter_len": size.seqlen}
    return LongConvCase(name=size.name, skip=True, gates=True, **sizes)


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
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("torch.fft", torch_fft, backward=True),
        Peer("torch.fft-last", torch_fft_last, backward=True),
        Peer("torch.fft-channel-first", torch_fft_last, backward=True, channel_first=True),
        Peer("ours-channel-first", fft_conv, backward=True, channel_first=True),
        Peer("conv1d", conv1d, backward=True, accepts=_takes_conv1d),
        _FLASH,
    ),
)
