"""rms_norm, and torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from madkernels import reference, rms_norm
from madkernels.benchmarks.cases import Argument, Arguments, Axes, Case
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """A call of rms_norm."""

    arguments: ClassVar[Arguments] = {
        "x": Argument(("tokens", "dim")),
        "weight": Argument(("dim",), "parameter"),
        "gate": Argument(("tokens", "dim"), optional=True),
    }
    out: ClassVar[Axes] = ("tokens", "dim")
    dim: int
    gate: bool = False

    def arithmetic(self, direction: str) -> float:
        """Of a channel a square, a sum and two products; backward twice as many."""
        return {"forward": 4, "backward": 8}[direction] * self.tokens * self.dim

    @property
    def exponentials(self) -> int:
        return self.tokens * self.dim if self.gate else 0


CASES = (
    NormCase(name="mad", batch=32, seqlen=128, dim=128),
    NormCase(name="7b", batch=1, seqlen=1024, dim=4096),
    NormCase(name="gated", batch=1, seqlen=1024, dim=1024, gate=True),
    NormCase(name="few", batch=1, seqlen=1, dim=3, quick=True),  # of one alone the gradient is nothing
    NormCase(name="odd", batch=2, seqlen=67, dim=37, gate=True, quick=True),
)
TRAINING = NormCase(name="training", batch=8, seqlen=2048, dim=4096)


def case_of(size: Size) -> NormCase:
    """The norm before a layer of a model."""
    return NormCase(name=size.name, batch=size.batch, seqlen=size.seqlen, dim=size.dim)


def composed(x: Tensor, weight: Tensor, gate: Tensor | None = None, **options: Any) -> Tensor:
    """torch's own, after torch's own gate."""
    return F.rms_norm(x if gate is None else x * F.silu(gate), x.shape[-1:], weight.to(x.dtype), 1e-5)


BENCHMARK = Benchmark(
    name="rms_norm",
    function=rms_norm,
    reference=reference.rms_norm,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(Peer("torch", composed, backward=True), Peer("reference", reference.rms_norm, backward=True, auto=False)),
)
