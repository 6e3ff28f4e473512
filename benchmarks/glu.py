"""glu, and its two operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from madkernels import glu, reference
from madkernels.benchmarks.cases import Argument, Arguments, Axes, Case
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.swiglu import SwiGLU


@dataclass(frozen=True, kw_only=True)
class GluCase(Case):
    """A call of glu."""

    arguments: ClassVar[Arguments] = {"h": Argument(("tokens", "channels"))}
    out: ClassVar[Axes] = ("tokens", "dim")
    dim: int
    activation: str = "swiglu"

    @property
    def channels(self) -> int:
        """Of gate and up."""
        return 2 * self.dim

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}

    def arithmetic(self, direction: str) -> float:
        """Of a channel a sum, a quotient and two products beside the exponential; backward five more."""
        return {"forward": 4, "backward": 9}[direction] * self.tokens * self.dim

    @property
    def exponentials(self) -> int:
        return 0 if self.activation == "reglu" else self.tokens * self.dim


CASES = (
    GluCase(name="mad", batch=32, seqlen=128, dim=352),
    GluCase(name="7b", batch=1, seqlen=1024, dim=10928),
    GluCase(name="geglu", batch=1, seqlen=1024, dim=2048, activation="geglu"),
    GluCase(name="one", batch=1, seqlen=1, dim=1, quick=True),
    GluCase(name="odd", batch=2, seqlen=67, dim=37, quick=True),
    GluCase(name="reglu", batch=1, seqlen=20, dim=50, activation="reglu", quick=True),
)
TRAINING = GluCase(name="training", batch=8, seqlen=2048, dim=10928)


def case_of(size: Size) -> GluCase:
    """Of the channel mixer of a model."""
    layer = size.layer("swiglu")
    assert isinstance(layer, SwiGLU)
    return GluCase(name=size.name, batch=size.batch, seqlen=size.seqlen, dim=layer.hidden)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


def composed(h: Tensor, activation: str) -> Tensor:
    """An activation and a product of torch."""
    gate, up = h.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


BENCHMARK = Benchmark(
    name="glu",
    function=glu,
    reference=reference.glu,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(Peer("torch", composed, backward=True), Peer("reference", reference.glu, backward=True, auto=False)),
)
