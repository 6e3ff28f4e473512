"""causal_conv and the plain PyTorch ways to write it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from madkernels import causal_conv, reference
from madkernels.benchmarks.cases import ROWS, Argument, Arguments, Axes, Case
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.mamba import Mamba


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    """A call of causal_conv."""

    arguments: ClassVar[Arguments] = {
        "x": Argument(ROWS),
        "weight": Argument(("dim", "width"), "parameter"),
        "bias": Argument(("dim",), "parameter", optional=True),
        "initial_state": Argument(("sequences", "history", "dim"), optional=True),
    }
    dim: int
    width: int
    bias: bool = False
    activation: str | None = None

    def arithmetic(self, direction: str) -> float:
        """A multiply and add a tap; backward for x and for the taps."""
        return {"forward": 2, "backward": 4}[direction] * self.tokens * self.dim * self.width

    @property
    def independent(self) -> Axes:
        return ("dim",)

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}


CASES = (
    ConvCase(name="mamba-130m", batch=2, seqlen=2048, dim=1536, width=4, bias=True, activation="silu"),
    ConvCase(name="bare", batch=2, seqlen=2048, dim=1536, width=4),
    ConvCase(name="mamba-2.8b", batch=1, seqlen=2048, dim=5120, width=4, bias=True, activation="silu"),
    ConvCase(name="long", batch=1, seqlen=16384, dim=512, width=4, bias=True, activation="silu"),
    ConvCase(name="hyena", batch=2, seqlen=2048, dim=2304, width=3, bias=True),
    ConvCase(name="one", batch=1, seqlen=1, dim=1, width=1, quick=True),
    ConvCase(name="odd", batch=2, seqlen=63, dim=37, width=5, bias=True, activation="silu", quick=True),
    ConvCase(name="short", batch=2, seqlen=3, dim=65, width=4, bias=True, quick=True),
    ConvCase(name="thousand", batch=1, seqlen=1000, dim=130, width=4, activation="silu", quick=True),
)
TRAINING = ConvCase(name="training", batch=8, seqlen=2048, dim=8192, width=4, activation="silu")


def case_of(size: Size) -> ConvCase:
    """The short convolution of a Mamba layer of a model."""
    layer = size.layer("mamba")
    assert isinstance(layer, Mamba)
    sizes: dict[str, Any] = {"batch": size.batch, "seqlen": size.seqlen, "dim": layer.inner, "width": layer.width}
    return ConvCase(name=size.name, bias=True, activation="silu", **sizes)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """torch's convolution, padded on both sides and cut; a copy if `x` does not have its channels first in memory."""
    seqlen, width = x.shape[1], weight.shape[1]
    out = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=weight.shape[0])
    out = out[..., :seqlen]
    return (F.silu(out) if activation == "silu" else out).transpose(1, 2)


def shift_and_add(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """One multiply and add over the whole sequence for each tap."""
    seqlen, width = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = x * weight[:, -1]
    for tap in range(width - 1):
        out.addcmul_(padded[:, tap : tap + seqlen], weight[:, tap])
    if bias is not None:
        out += bias
    return F.silu(out) if activation == "silu" else out


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """The CUDA kernel of causal-conv1d, which takes channels first in shape, and either order in memory."""
    out: Tensor = importlib.import_module("causal_conv1d").causal_conv1d_fn(
        x.transpose(1, 2), weight, bias, activation=activation
    )
    return out.transpose(1, 2)


def _width_2_to_4(case: Case) -> bool:
    return isinstance(case, ConvCase) and 2 <= case.width <= 4


_CAUSAL_CONV1D = Peer(
    "causal-conv1d",
    causal_conv1d,
    backward=True,
    needs="causal_conv1d:causal_conv1d_fn",
    devices=("cuda",),
    accepts=_width_2_to_4,
)

BENCHMARK = Benchmark(
    name="causal_conv",
    function=causal_conv,
    reference=reference.causal_conv,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("reference", reference.causal_conv, backward=True),
        Peer("conv1d", conv1d, backward=True),
        Peer("conv1d-channel-first", conv1d, backward=True, channel_first=True),
        Peer("shift-and-add", shift_and_add, backward=True),
        _CAUSAL_CONV1D,
        replace(_CAUSAL_CONV1D, name="causal-conv1d-channel-first", channel_first=True),
    ),
)
