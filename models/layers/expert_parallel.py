"""Experts of MoE layers over processes, each of which holds a part (GShard: Lepikhin et al. 2020, arXiv 2006.16668).

    process p of P holds experts p E / P to (p + 1) E / P - 1
    tokens -> rows of the plan -> all-to-all -> rows by expert -> MLP -> rows by process -> all-to-all -> sums of tokens

A plan's rows are sorted by expert, so those that go to one process lie together and are sent from where they are. A
collective asks the host how many they are, so the host waits once for the device, for the counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from madkernels import RoutingPlan
from madkernels.models.layers.moe import MoE, combined, dispatched, through_experts


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each process of a mesh its part of the experts of every MoE layer.

    `gate_up` and `down` become DTensors, sharded along their first axis, and layers call :func:`expert_parallel_mlp`. All
    else is left to FSDP or DDP.

    Args:
        model: the same in all processes; not sharded yet.
        mesh: of one axis, such as ``init_device_mesh("cuda", (dp, ep), mesh_dim_names=("dp", "ep"))["ep"]``.

    Raises:
        ValueError: a layer's experts do not divide among the processes.
    """
    for layer in model.modules():
        if not isinstance(layer, MoE):
            continue
        if layer.experts % mesh.size():
            raise ValueError(f"{layer.experts} experts do not divide among {mesh.size()} processes")
        layer.gate_up, layer.down = _own(layer.gate_up, mesh), _own(layer.down, mesh)
        mlp = cast("Callable[..., Tensor]", expert_parallel_mlp)  # the decorator leaves it no type
        layer.over_processes = partial(mlp, group=mesh.get_group())


def _own(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """The experts of this process, in memory of their own."""
    part = weight.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    return nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False), weight.requires_grad)


@torch.compiler.disable  # a graph would end where the counts are read
def expert_parallel_mlp(x: Tensor, plan: RoutingPlan, gate_up: Tensor, down: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What :func:`madkernels.moe_mlp` says of all experts, where each process of a group holds a part of them.

    All processes call it, and its backward, each with its own tokens: any number, none too. Gradients of experts are sums
    over the tokens of all. Differentiable in x, the plan's weights and the matrices, to any order. Deterministic.

    Args:
        x: (tokens, dim), of this process.
        plan: of these tokens, over the experts of all processes.
        gate_up: (experts / processes, 2 hidden, dim), of the experts of this process; a DTensor of them, too.
        down: (experts / processes, dim, hidden), likewise.
        group: the processes, in the order of their experts.

    Returns:
        y (tokens, dim), dtype of `x`.

    Raises:
        ValueError: a number of experts that is not this process's part of the plan's.
    """
    gate_up, down = (w.to_local() if isinstance(w, DTensor) else w for w in (gate_up, down))
    experts, processes = plan.counts.shape[0], group.size()
    if gate_up.shape[0] * processes != experts:
        held = gate_up.shape[0]
        raise ValueError(f"gate_up has {held} experts; expected those of one of {processes} processes, of {experts}")
    to_experts, of_processes = _counts(plan, group)
    sent, received = torch.stack([to_experts.sum(1), of_processes.sum(1)]).tolist()
    rows = _exchange(dispatched(x, plan)[: sum(sent)], sent, received, group)
    order = _by_expert(of_processes, sum(received))
    y = through_experts(rows, _offsets(of_processes.sum(0)), gate_up, down, order)
    back = _exchange(y[order.argsort()], received, sent, group)
    dropped = plan.slots.shape[0] - sum(sent)
    return combined(F.pad(back, (0, 0, 0, dropped)) if dropped else back, plan)


def _counts(plan: RoutingPlan, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Rows that go to each process's experts, and that come from each process for the experts of this one; both are
    (processes, experts / processes)."""
    sent = plan.offsets.diff().view(group.size(), -1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return sent, received


def _by_expert(counts: Tensor, rows: int) -> Tensor:
    """From rows that are sorted by process, then by expert, their order by expert, then by process: (rows,) int32.

    counts: (processes, experts), of rows.
    """
    experts = torch.arange(counts.shape[1], device=counts.device).expand_as(counts)
    of_rows = experts.flatten().repeat_interleave(counts.flatten(), output_size=rows)
    return of_rows.argsort(stable=True).int()


def _offsets(counts: Tensor) -> Tensor:
    """Where the rows of each expert begin, and where the last end: (experts + 1,) int32."""
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Of x (rows, dim) the first sent[0] rows to the first process, and so on; received[p] rows come from process p."""
    y: Tensor = _Exchange.apply(x, sent, received, group)  # type: ignore[no-untyped-call]
    return y


class _Exchange(torch.autograd.Function):
    """Gradients go the other way, by the same function: so there are derivatives of any order."""

    @staticmethod
    def forward(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        y = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.sent, ctx.received, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        return _exchange(dy, ctx.received, ctx.sent, ctx.group), None, None, None
