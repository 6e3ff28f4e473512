"""moe_route and the plain PyTorch way to write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from madkernels import moe_route
from madkernels.benchmarks.cases import Argument, Arguments, Axes, Case
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.moe import MoE
from madkernels.reference.moe_route import moe_route as reference_route


@dataclass(frozen=True, kw_only=True)
class RouteCase(Case):
    """A call of moe_route. Its output is the weights; all of the plan is made."""

    arguments: ClassVar[Arguments] = {"logits": Argument(("tokens", "experts"))}
    out: ClassVar[Axes] = ("tokens", "top_k")
    experts: int
    top_k: int
    sigmoid: bool = False
    groups: int = 1
    top_groups: int = 1

    @property
    def options(self) -> dict[str, Any]:
        groups = (self.groups, self.top_groups)
        return {"top_k": self.top_k, "score": "sigmoid" if self.sigmoid else "softmax", "groups": groups}

    def arithmetic(self, direction: str) -> float:
        """An exponential, a sum and a comparison a score; backward a multiply and add."""
        return {"forward": 3, "backward": 2}[direction] * self.tokens * self.experts

    @property
    def exponentials(self) -> int:
        return self.tokens * self.experts * (2 if self.sigmoid else 1)


CASES = (
    RouteCase(name="mixtral", batch=2, seqlen=2048, experts=8, top_k=2),
    RouteCase(name="32-experts", batch=2, seqlen=2048, experts=32, top_k=4),
    RouteCase(name="128-experts-few-tokens", batch=1, seqlen=512, experts=128, top_k=8),
    RouteCase(name="qwen3-30b-a3b", batch=6, seqlen=4096, experts=128, top_k=8),
    RouteCase(name="deepseek-v3", batch=2, seqlen=2048, experts=256, top_k=8, sigmoid=True, groups=8, top_groups=4),
    RouteCase(name="one", batch=1, seqlen=1, experts=1, top_k=1, quick=True),
    RouteCase(name="odd", batch=1, seqlen=67, experts=37, top_k=5, quick=True),
    RouteCase(name="many", batch=1, seqlen=20, experts=1000, top_k=12, sigmoid=True, quick=True),
    RouteCase(name="groups", batch=1, seqlen=130, experts=24, top_k=3, groups=6, top_groups=2, quick=True),
)
TRAINING = RouteCase(name="training", batch=8, seqlen=2048, experts=128, top_k=8)


def case_of(size: Size) -> RouteCase:
    """The routing of a mixture of experts of a model."""
    layer = size.layer("moe")
    assert isinstance(layer, MoE)
    sizes: dict[str, Any] = {"batch": size.batch, "seqlen": size.seqlen, "experts": layer.experts, "top_k": layer.top_k}
    return RouteCase(name=size.name, **sizes)


def weights_of_op(logits: Tensor, **options: Any) -> Tensor:
    """moe_route."""
    return moe_route(logits, **options).weights


def weights_of_reference(logits: Tensor, **options: Any) -> Tensor:
    """Its reference, which sorts all experts of each token."""
    return reference_route(logits, **options).weights


def topk_and_sort(logits: Tensor, *, top_k: int, score: str, groups: tuple[int, int]) -> Tensor:
    """torch's softmax, topk, stable sort and bincount, and the means for the losses. Of equal scores any comes first."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)
    chosen, experts = scores.topk(top_k, -1)
    weights = chosen / chosen.sum(-1, keepdim=True)
    flat = experts.flatten()
    slots = flat.sort(stable=True).indices
    rows = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    offsets = torch.bincount(flat, minlength=logits.shape[1]).cumsum(0)
    losses = scores.mean(0), wide.logsumexp(-1).square().mean()
    del rows, offsets, losses
    return weights


def _without_groups(case: Case) -> bool:
    return isinstance(case, RouteCase) and case.groups == 1


BENCHMARK = Benchmark(
    name="moe_route",
    function=weights_of_op,
    reference=weights_of_reference,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("reference", weights_of_reference, backward=True),
        Peer("topk-and-sort", topk_and_sort, accepts=_without_groups),
    ),
)
