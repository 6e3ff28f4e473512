"""Products of groups, and torch's own ways to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from madkernels import grouped_gemm, reference
from madkernels.benchmarks.cases import LARGEST_CHECKED, Argument, Arguments, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.grouped import grouped_linear
from madkernels.models.layers.moe import MoE
from madkernels.reference.activations import GATED, activate


@dataclass(frozen=True, kw_only=True)
class GroupedGemmCase(Case):
    """A call of grouped_gemm. Rows go to groups at random, as a router that has learned nothing sends them."""

    arguments: ClassVar[Arguments] = {
        "x": Argument(("tokens", "inputs")),
        "weight": Argument(("groups", "outputs", "inputs")),
        "bias": Argument(("groups", "outputs"), optional=True),
    }
    out: ClassVar[Axes] = ("tokens", "features")
    formula: ClassVar[str] = "forward 2 inputs outputs, backward twice as many, for each row"
    inputs: int
    outputs: int
    groups: int
    activation: str | None = None
    bias: bool = False

    @property
    def features(self) -> int:
        """Of the output."""
        return self.outputs // 2 if self.activation in GATED else self.outputs

    @property
    def options(self) -> dict[str, Any]:
        chosen = torch.randint(self.groups, (self.tokens,), generator=torch.Generator().manual_seed(2))
        ends = torch.bincount(chosen, minlength=self.groups).cumsum(0)
        return {"offsets": torch.cat([ends.new_zeros(1), ends]).int(), "activation": self.activation}

    def flops(self, direction: str) -> int:
        return {"forward": 2, "backward": 4}[direction] * self.tokens * self.inputs * self.outputs

    @property
    def checked_as(self) -> Case:
        """With fewer groups and rows where the weights are so large that there is no room for them in float64."""
        if self.count(("groups", "outputs", "inputs")) <= LARGEST_CHECKED:
            return self
        groups = max(1, self.groups // 4)
        return replace(self, name="fewer groups and rows", groups=groups, seqlen=min(self.seqlen, 256))

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        return inputs | {"weight": inputs["weight"] / self.inputs**0.5}


def _case(name: str, rows: int, inputs: int, outputs: int, groups: int, **further: Any) -> GroupedGemmCase:
    return GroupedGemmCase(
        name=name, batch=1, seqlen=rows, inputs=inputs, outputs=outputs, groups=groups, **further
    )  # fmt: skip


CASES = (
    _case("32-groups", 16384, 512, 512, 32),
    _case("swiglu", 16384, 512, 512, 32, activation="swiglu"),
    _case("128-groups", 4096, 512, 512, 128, activation="swiglu"),
    _case("one", 1, 1, 1, 1, quick=True),
    _case("odd", 203, 59, 33, 7, bias=True, quick=True),
    _case("gated", 130, 40, 34, 3, activation="geglu", bias=True, quick=True),
    _case("many", 60, 17, 8, 40, activation="silu", quick=True),
)
TRAINING = _case("training", 65536, 2048, 2048, 64, activation="swiglu")


def case_of(size: Size) -> GroupedGemmCase:
    """The first product of a mixture of experts of a model."""
    layer = size.layer("moe")
    assert isinstance(layer, MoE)
    rows = size.batch * size.seqlen * layer.top_k
    return _case(size.name, rows, size.dim, 2 * layer.hidden, layer.experts, activation="swiglu")


def loop(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, offsets: Tensor, activation: str | None = None) -> Tensor:
    """One product after another, between groups that the host knows."""
    biases = [None] * len(weight) if bias is None else bias
    parts = zip(pairwise(offsets.tolist()), weight, biases, strict=True)
    return torch.cat([activate(activation, torch.nn.functional.linear(x[b:e], w, c)) for (b, e), w, c in parts])


def grouped_mm(x: Tensor, weight: Tensor, *, offsets: Tensor, activation: str | None = None) -> Tensor:
    """torch's grouped product, and the activation after it."""
    return activate(activation, grouped_linear(x, weight, offsets[1:]))


BENCHMARK = Benchmark(
    name="grouped_gemm",
    function=grouped_gemm,
    reference=reference.grouped_gemm,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("grouped-mm", grouped_mm, backward=True, accepts=lambda case: not case.has("bias")),
        Peer("loop", loop, backward=True),
        Peer("reference", reference.grouped_gemm, backward=True, auto=False),
    ),
)
