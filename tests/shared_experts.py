"""What each of several processes that share experts looks at; tests/models/test_expert_parallel.py starts them.

Every process makes the tokens of all, so it knows what one process with all tokens and experts finds: outputs, gradients and
gradients of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from checks import relative_error
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from madkernels import RoutingPlan, moe_mlp, moe_route
from madkernels.models import HybridLM
from madkernels.models.layers import moe
from madkernels.models.layers.expert_parallel import expert_parallel_mlp, shard_experts
from madkernels.scaling.training.trainer import processes

DIM, HIDDEN, EXPERTS = 6, 5, 8


def same(value: Tensor, exact: Tensor, what: object) -> None:
    assert relative_error(value, exact) <= 1e-12, what


@dataclass(frozen=True)
class Case:
    """Tokens of each process, and where they go."""

    tokens: Sequence[int]
    top_k: int = 2
    favourite: int | None = None  # expert that all tokens choose
    capacity: int | None = None

    def inputs(self, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """x and scores of each process, and the matrices of all experts."""
        torch.manual_seed(seed)
        x, logits = ([torch.randn(n, width) for n in self.tokens] for width in (DIM, EXPERTS))
        if self.favourite is not None:
            for scores in logits:
                scores[:, self.favourite] += 20
        return x, logits, torch.randn(EXPERTS, 2 * HIDDEN, DIM) / DIM**0.5, torch.randn(EXPERTS, DIM, HIDDEN) / HIDDEN**0.5

    def plan(self, logits: Tensor) -> RoutingPlan:
        return moe_route(logits, self.top_k, capacity=self.capacity)


def cases(ranks: int) -> list[Case]:
    uneven = [(7, 0, 3, 12)[rank] for rank in range(ranks)]
    return [
        Case([16] * ranks),
        Case(uneven),
        Case(uneven, top_k=1, favourite=EXPERTS - 1),
        Case(uneven, top_k=EXPERTS),
        Case([9] * ranks, favourite=0, capacity=2),
        Case([0] * ranks),
    ]


def derivatives(y: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """y, its gradients, and theirs."""
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    squares = torch.stack([g.square().sum() for g in first]).sum()
    return y, *first, *torch.autograd.grad(squares, leaves)


def own(rank: int, ranks: int, t: Tensor) -> Tensor:
    """The part of this process, of a tensor of all experts."""
    return t.chunk(ranks)[rank]


def in_one_process(case: Case) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Outputs and derivatives: by process of x, scores; and by matrix."""
    x, logits, gate_up, down = case.inputs()
    leaves = [t.requires_grad_() for t in (*x, *logits, gate_up, down)]
    if case.capacity is None:
        y = moe_mlp(torch.cat(x), case.plan(torch.cat(logits)), gate_up, down)
    else:  # which is of each process
        y = torch.cat([moe_mlp(part, case.plan(scores), gate_up, down) for part, scores in zip(x, logits, strict=True)])
    _, *found = derivatives(y, leaves)
    return list(y.split(list(case.tokens))), [found[: len(leaves)], found[len(leaves) :]]


def over_processes(case: Case, rank: int, ranks: int) -> tuple[Tensor, ...]:
    x, logits, gate_up, down = case.inputs()
    leaves = [t.clone().requires_grad_() for t in (x[rank], logits[rank], own(rank, ranks, gate_up), own(rank, ranks, down))]
    group = dist.group.WORLD
    assert group is not None
    y = expert_parallel_mlp(leaves[0], case.plan(leaves[1]), leaves[2], leaves[3], group)
    return derivatives(y, leaves)


def check_function(case: Case, rank: int, ranks: int) -> None:
    outputs, orders = in_one_process(case)
    y, *found = over_processes(case, rank, ranks)
    same(y, outputs[rank], case)
    for of_order, given in zip(orders, (found[:4], found[4:]), strict=True):
        gate_up, down = (own(rank, ranks, t) for t in of_order[-2:])
        for a, b in zip(given, (of_order[rank], of_order[ranks + rank], gate_up, down), strict=True):
            same(a, b, case)
    again = over_processes(case, rank, ranks)
    assert all(map(torch.equal, again, (y, *found)))


def check_model(rank: int, ranks: int) -> None:
    """A model whose experts are sharded: the same outputs and gradients, and its weights in one piece."""
    torch.manual_seed(1)
    whole = HybridLM(f"moe:experts={EXPERTS},shared=1 swiglu:hidden=4 moe:experts={EXPERTS},top_k=3", vocab_size=9, dim=DIM)
    sharded = HybridLM(whole.arch, vocab_size=9, dim=DIM)
    sharded.load_state_dict(whole.state_dict())
    shard_experts(sharded, init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)))
    tokens = torch.randint(0, 9, (2 * ranks, 5))
    y, wanted = sharded(tokens.chunk(ranks)[rank]), whole(tokens)
    same(y, wanted.chunk(ranks)[rank], "logits")
    y.sin().sum().backward()
    wanted.sin().sum().backward()
    for (name, ours), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        for mine, other in ((ours.detach(), theirs.detach()), (ours.grad, theirs.grad)):
            if isinstance(mine, DTensor):
                assert mine.to_local().shape[0] == EXPERTS // ranks
                same(mine.full_tensor(), other, name)
            elif mine is ours.grad:
                dist.all_reduce(mine)
                same(mine, other, name)


def check_refusals(rank: int, ranks: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    x, logits, gate_up, down = Case([4] * ranks).inputs()
    mesh = init_device_mesh("cpu", (ranks,))
    with pytest.raises(ValueError, match="gate_up has 8 experts; expected"):
        expert_parallel_mlp(x[0], moe_route(logits[0], 2), gate_up, down, group)
    with pytest.raises(ValueError, match=f"{ranks + 1} experts do not divide among {ranks}"):
        shard_experts(moe.MoE(DIM, experts=ranks + 1), mesh)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    with processes("cpu"):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        check_refusals(rank, ranks)
        check_model(rank, ranks)
        for devices in (moe.DEVICES, set[str]()):  # by the ops, and by torch as on a GPU
            moe.DEVICES = devices
            for case in cases(ranks):
                check_function(case, rank, ranks)


if __name__ == "__main__":
    main()
