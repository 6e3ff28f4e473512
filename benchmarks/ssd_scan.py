"""ssd_scan, and the plain PyTorch ways to write it."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import reference, selective_scan, ssd_scan
from madkernels.benchmarks.cases import Argument, Arguments, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.mamba2 import Mamba2
from madkernels.models.layers.ssd import by_recurrence

MAMBA_SSM = "mamba_ssm.ops.triton.ssd_combined"
HEADS: Axes = ("batch", "seqlen", "heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class SsdCase(Case):
    """A call of ssd_scan."""

    arguments: ClassVar[Arguments] = {
        "x": Argument(HEADS),
        "delta": Argument(("batch", "seqlen", "heads"), "wide"),
        "A": Argument(("heads",), "wide"),
        "B": Argument(("batch", "seqlen", "groups", "dstate")),
        "C": Argument(("batch", "seqlen", "groups", "dstate")),
        "D": Argument(("heads",), "wide", optional=True),
        "initial_state": Argument(("sequences", "heads", "head_dim", "dstate"), "wide", optional=True),
    }
    out: ClassVar[Axes] = HEADS
    formula: ClassVar[str] = "forward 4 head_dim dstate, backward twice as many, for each head and step"
    head_dim: int
    heads: int
    dstate: int
    groups: int = 1
    D: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.groups:
            raise ValueError(f"case {self.name!r}: groups is {self.groups}; expected a divisor of heads, {self.heads}")

    def flops(self, direction: str) -> int:
        """As the recurrence is stated, whatever the chunks."""
        return {"forward": 4, "backward": 8}[direction] * self.tokens * self.heads * self.head_dim * self.dstate

    @property
    def independent(self) -> Axes:
        return ("heads",) if self.groups == 1 else ("groups", "heads")

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """As in a Mamba-2 layer at the start of training: step sizes log-uniform in 0.001 to 0.1, A in -16 to -1."""
        bias = torch.exp(torch.rand(self.heads, generator=generator) * math.log(100) + math.log(0.001)).expm1().log()
        A = -torch.empty(self.heads).uniform_(1, 16, generator=generator)
        scaled = {name: inputs[name] / self.dstate**0.5 for name in "BC"}
        return inputs | scaled | {"delta": F.softplus(inputs["delta"] * 0.1 + bias), "A": A}


def _case(name: str, batch: int, seqlen: int, head_dim: int, heads: int, dstate: int, **further: Any) -> SsdCase:
    return SsdCase(
        name=name, batch=batch, seqlen=seqlen, head_dim=head_dim, heads=heads, dstate=dstate, **further
    )  # fmt: skip


CASES = (
    _case("mamba2-130m", 1, 2048, 64, 24, 128, D=True),
    _case("mamba2-2.7b", 1, 2048, 64, 80, 128, D=True),
    _case("groups", 1, 2048, 64, 32, 128, groups=8, D=True),
    _case("long", 1, 16384, 64, 8, 128, D=True),
    _case("small", 32, 128, 64, 4, 128, D=True),
    _case("one", 1, 1, 1, 1, 1, quick=True),
    _case("odd", 2, 67, 37, 3, 5, quick=True, D=True),
    _case("grouped", 2, 130, 33, 6, 20, groups=3, quick=True, D=True),
)
TRAINING = _case("training", 8, 4096, 64, 80, 128)


def case_of(size: Size) -> SsdCase:
    """The scan of a Mamba-2 layer of a model."""
    layer = size.layer("mamba2")
    assert isinstance(layer, Mamba2)
    return _case(
        size.name, size.batch, size.seqlen, layer.head_dim, layer.heads, layer.dstate, groups=layer.groups, D=True
    )  # fmt: skip


def recurrence(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """In chunks of matrix products, by torch: what the layers do on devices without a kernel."""
    return by_recurrence(x, delta, A, B, C, D)[0]


def by_selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """Every channel by itself, as Mamba has it."""
    head_dim, dstate = x.shape[3], B.shape[3]
    steps, rates = (
        delta.to(x.dtype).repeat_interleave(head_dim, 2),
        A.repeat_interleave(head_dim)[:, None].expand(-1, dstate),
    )
    skip = None if D is None else D.repeat_interleave(head_dim)
    out = selective_scan(x.flatten(2), steps, rates, B, C, skip)
    assert isinstance(out, Tensor)
    return out.view(x.shape)


def mamba_ssm(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """The Triton kernels of mamba-ssm."""
    out: Tensor = importlib.import_module(MAMBA_SSM).mamba_chunk_scan_combined(x, delta, A, B, C, chunk_size=256, D=D)
    return out


BENCHMARK = Benchmark(
    name="ssd_scan",
    function=ssd_scan,
    reference=reference.ssd_scan,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("recurrence", recurrence, backward=True),
        Peer("selective-scan", by_selective_scan, backward=True),
        Peer("reference", reference.ssd_scan, auto=False),
        Peer(
            "mamba-ssm",
            mamba_ssm,
            backward=True,
            needs=f"{MAMBA_SSM}:mamba_chunk_scan_combined",
            devices=("cuda",),
        ),
    ),
)
