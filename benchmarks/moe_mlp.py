"""A mixture of experts, and torch's own ways to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import madkernels
from madkernels import reference
from madkernels.benchmarks.cases import LARGEST_CHECKED, Argument, Arguments, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.grouped import grouped_linear
from madkernels.models.layers.moe import MoE
from madkernels.reference.activations import GATED


class Plan(NamedTuple):
    """Which token goes to which expert, as moe_mlp takes it."""

    weights: Tensor  # (tokens, top_k)
    offsets: Tensor  # (experts + 1,)
    slots: Tensor  # (tokens * top_k,)
    rows: Tensor  # (tokens, top_k)


def plan_of(weights: Tensor, chosen: Tensor, experts: int) -> Plan:
    """The plan of `chosen` (tokens, top_k): the expert of each choice, or `experts` for one that is dropped."""
    expert, order = chosen.flatten().sort(stable=True)
    count = torch.arange(len(order), dtype=torch.int32, device=chosen.device)
    kept = expert < experts
    offsets = torch.searchsorted(expert, torch.arange(experts + 1, device=chosen.device)).int()
    rows = torch.where(kept, count, -1)[order.argsort()].view(chosen.shape)
    return Plan(weights, offsets, torch.where(kept, order, -1).int(), rows)


@dataclass(frozen=True, kw_only=True)
class MoeCase(Case):
    """A call of moe_mlp. Tokens go to experts at random, as a router that has learned nothing sends them."""

    arguments: ClassVar[Arguments] = {
        "x": Argument(("tokens", "dim")),
        "weights": Argument(("tokens", "top_k"), "wide"),
        "gate_up": Argument(("experts", "outputs", "dim")),
        "down": Argument(("experts", "dim", "hidden")),
        "gate_up_bias": Argument(("experts", "outputs"), optional=True),
        "down_bias": Argument(("experts", "dim"), optional=True),
    }
    out: ClassVar[Axes] = ("tokens", "dim")
    formula: ClassVar[str] = "forward 2 dim (outputs + hidden), backward twice as many, for each token and choice"
    dim: int
    hidden: int
    experts: int
    top_k: int
    activation: str | None = "swiglu"
    gate_up_bias: bool = False
    down_bias: bool = False

    @property
    def outputs(self) -> int:
        """Of the first product."""
        return 2 * self.hidden if self.activation in GATED else self.hidden

    @property
    def options(self) -> dict[str, Any]:
        scores = torch.rand(self.tokens, self.experts, generator=torch.Generator().manual_seed(2))
        plan = plan_of(scores, scores.topk(self.top_k).indices, self.experts)
        return {"offsets": plan.offsets, "slots": plan.slots, "rows": plan.rows, "activation": self.activation}

    def flops(self, direction: str) -> int:
        products = {"forward": 2, "backward": 4}[direction]
        return products * self.tokens * self.top_k * self.dim * (self.outputs + self.hidden)

    @property
    def checked_as(self) -> Case:
        """With fewer experts and tokens where the weights are so large that there is no room for them in float64."""
        if self.count(("experts", "outputs", "dim")) <= LARGEST_CHECKED:
            return self
        experts = max(self.top_k, self.experts // 4)
        return replace(self, name="fewer experts and tokens", experts=experts, seqlen=min(self.seqlen, 256))

    @property
    def exponentials(self) -> int:
        return self.tokens * self.top_k * self.hidden if self.activation in ("silu", "swiglu") else 0

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """Matrices as torch.nn.Linear has them, and weights that sum to 1."""
        scaled = {name: inputs[name] / inputs[name].shape[2] ** 0.5 for name in ("gate_up", "down")}
        return inputs | scaled | {"weights": inputs["weights"].softmax(-1)}


def _case(name: str, tokens: int, dim: int, hidden: int, experts: int, top_k: int, **further: Any) -> MoeCase:
    return MoeCase(
        name=name, batch=1, seqlen=tokens, dim=dim, hidden=hidden, experts=experts, top_k=top_k, **further
    )  # fmt: skip


CASES = (
    _case("32-experts", 4096, 512, 256, 32, 4),
    _case("128-experts", 512, 512, 256, 128, 8),
    _case("8-experts", 2048, 512, 1024, 8, 2),
    _case("one", 1, 1, 1, 1, 1, activation="relu2", quick=True),
    _case("plain", 90, 24, 16, 6, 2, quick=True),
    _case("odd", 203, 59, 33, 7, 3, gate_up_bias=True, down_bias=True, quick=True),
    _case("many", 60, 17, 8, 40, 2, activation="gelu", quick=True),
    _case("all", 20, 40, 24, 4, 4, activation="reglu", down_bias=True, quick=True),
)
TRAINING = _case("training", 16384, 2048, 1024, 64, 8)


def case_of(size: Size) -> MoeCase:
    """A mixture of experts of a model."""
    layer = size.layer("moe")
    assert isinstance(layer, MoE)
    return _case(size.name, size.batch * size.seqlen, size.dim, layer.hidden, layer.experts, layer.top_k)


def moe_mlp(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, offsets: Tensor, slots: Tensor, rows: Tensor, **rest: Any
) -> Tensor:
    """The op, its plan in pieces."""
    y: Tensor = madkernels.moe_mlp(x, Plan(weights, offsets, slots, rows), gate_up, down, **rest)
    return y


def plainly(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, offsets: Tensor, slots: Tensor, rows: Tensor, **rest: Any
) -> Tensor:
    """Its reference, likewise."""
    y: Tensor = reference.moe_mlp(x, Plan(weights, offsets, slots, rows), gate_up, down, **rest)
    return y


def loop(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, offsets: Tensor, slots: Tensor, rows: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """One expert after another, as transformers has it: its tokens gathered, and what it makes of them added to the sum."""
    y = torch.zeros_like(x)
    weights = weights.flatten().to(x.dtype)
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin == end:
            continue
        slot = slots[begin:end].long()
        token = slot // rows.shape[1]
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y.index_add_(0, token, F.linear(F.silu(gate) * up, down[expert]) * weights[slot, None])
    return y


def grouped_mm(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, offsets: Tensor, slots: Tensor, rows: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """Copies of tokens, sorted by expert, through torch's grouped product, back into place, and summed."""
    tokens, top_k = weights.shape
    copies = x.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, -1)
    gate, up = grouped_linear(copies[slots.long()], gate_up, offsets[1:]).chunk(2, dim=-1)
    mixed = grouped_linear(F.silu(gate) * up, down, offsets[1:])
    return (mixed[rows.flatten().long()].view(tokens, top_k, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def scattermoe(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, offsets: Tensor, slots: Tensor, rows: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """ScatterMoE's products (Tan et al. 2024, arXiv 2403.08245), of its version 0.3: the first gathers, the second scatters
    and weighs."""
    parallel_linear = import_module("scattermoe.parallel_experts").parallel_linear
    experts = torch.arange(len(gate_up), device=x.device).repeat_interleave(offsets.diff(), output_size=len(slots))
    plan = (experts, slots.long(), offsets[1:].long())
    gate, up = parallel_linear(x, gate_up.mT, weights.shape[1], *plan, grouped_out=True).chunk(2, dim=-1)
    mixed = F.silu(gate) * up
    y: Tensor = parallel_linear(mixed, down.mT, 1, *plan, gates=weights.to(x.dtype), grouped_in=True)
    return y


def _plain(case: Case) -> bool:
    return isinstance(case, MoeCase) and case.activation == "swiglu" and not (case.gate_up_bias or case.down_bias)


BENCHMARK = Benchmark(
    name="moe_mlp",
    function=moe_mlp,
    reference=plainly,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("grouped-mm", grouped_mm, backward=True, accepts=_plain),
        Peer("loop", loop, backward=True, accepts=_plain),
        Peer(
            "scattermoe",
            scattermoe,
            backward=True,
            needs="scattermoe.parallel_experts:parallel_linear",
            devices=("cuda",),
            accepts=_plain,
        ),
        Peer("reference", plainly, backward=True, auto=False),
    ),
)
