"""Sparse mixture of SwiGLU experts (Shazeer et al. 2017, arXiv 1701.06538; routing as in Mixtral, arXiv 2401.04088)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels import RoutingPlan, grouped_gemm, moe_combine, moe_dispatch, moe_mlp, moe_route
from madkernels.models.layers.base import Layer, State, cast_once, check_positive
from madkernels.models.layers.grouped import grouped_linear
from madkernels.models.layers.swiglu import SwiGLU
from madkernels.reference.moe_route import (
    moe_combine as combine_by_torch,
    moe_dispatch as dispatch_by_torch,
    moe_route as route_by_torch,
)

DEVICES = {"cpu", "meta"}  # where the ops are used; their CUDA kernels have not run on a GPU yet


class MoE(Layer):
    """Each token goes to its `top_k` experts of hidden width `hidden`, weighted by a softmax over their router scores.

    Only the chosen experts compute, none is ever full, and no token is dropped. Scores and weights are in float32 at least.
    Of equal scores the lower expert's comes first.

    Args:
        experts, top_k, hidden: see above.
        shared: so many further experts see every token (DeepSeekMoE: Dai et al. 2024, arXiv 2401.06066); together one
            SwiGLU.
        sigmoid: scores are sigmoids, and weights those of the chosen over their sum (DeepSeek-V3, arXiv 2412.19437).
        balance: how far, at each step of training, a bias that is added to scores for choosing alone moves towards experts
            that fewer than the mean of tokens chose (Wang et al. 2024, arXiv 2408.15664; they take 0.001, with `sigmoid`).
            0: no such bias. A trainer calls :func:`balance_experts` after each step.
        dense: routing as in the code published with MAD: unchosen scores are 0 before a softmax over all experts, so that
            all of them see every token.
    """

    mixes = "channel"
    hidden_option = "hidden"
    packs_states = True
    bias: Tensor  # (experts,): added to scores for choosing, and
    taken: Tensor  # (experts,): tokens of each since it was moved; both with `balance` alone

    # `mix` of tokens, plan, gate_up and down, where experts are sharded over processes (expert_parallel.py).
    over_processes: Callable[[Tensor, RoutingPlan, Tensor, Tensor], Tensor] | None = None

    def __init__(
        self, dim: int, *, experts: int = 8, top_k: int = 2, hidden: int = 128, shared: int = 0, sigmoid: bool = False,
        balance: float = 0.0, dense: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        check_positive(experts=experts, top_k=top_k, hidden=hidden)
        if top_k > experts:
            raise ValueError(f"top_k {top_k} is more than there are experts, {experts}")
        if balance < 0:
            raise ValueError(f"balance is {balance}; expected 0 (none) or above")
        if dense and (sigmoid or balance):
            raise ValueError("dense is a routing of its own: it takes neither sigmoid nor balance")
        self.experts, self.top_k, self.hidden = experts, top_k, hidden
        self.sigmoid, self.balance, self.dense = sigmoid, balance, dense
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))
        for weight in (self.gate_up, self.down):  # each expert as torch.nn.Linear would be
            nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[2]), 1 / math.sqrt(weight.shape[2]))
        self.shared = SwiGLU(dim, hidden=shared * hidden) if shared else None
        if balance:
            self.register_buffer("bias", torch.zeros(experts))
            self.register_buffer("taken", torch.zeros(experts))

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        tokens = cast_once(x).reshape(-1, self.dim)
        y = self.mix(tokens, self.route(tokens))
        if self.shared is not None:
            y = y + self.shared(tokens.view(x.shape)).view(y.shape)
        return y.view(x.shape)

    def route(self, tokens: Tensor) -> RoutingPlan:
        """Which of the tokens (tokens, dim) goes to which expert."""
        logits = self.router(tokens)
        if self.dense:
            return dense_plan(logits, self.top_k)
        bias = self.bias.to(torch.promote_types(logits.dtype, torch.float32)) if self.balance else None
        plan = routed(logits, self.top_k, score="sigmoid" if self.sigmoid else "softmax", bias=bias)
        if self.balance and self.training:
            self.taken += plan.counts
        return plan

    def mix(self, tokens: Tensor, plan: RoutingPlan) -> Tensor:
        """Tokens (tokens, dim) through their experts, and summed."""
        if self.over_processes is not None:
            return self.over_processes(tokens, plan, self.gate_up, self.down)
        if tokens.device.type in DEVICES:
            return moe_mlp(tokens, plan, self.gate_up, self.down)
        return combined(through_experts(dispatched(tokens, plan), plan.offsets, self.gate_up, self.down), plan)

    def flops(self, seqlen: int) -> int:
        """Router 2 L D E, and 6 L D F for each of a token's experts."""
        shared = 0 if self.shared is None else self.shared.flops(seqlen)
        return 2 * seqlen * self.dim * self.experts + self.working * 6 * seqlen * self.dim * self.hidden + shared

    def active_params(self) -> int:
        shared = 0 if self.shared is None else self.shared.active_params()
        return self.router.weight.numel() + self.working * 3 * self.dim * self.hidden + shared

    @property
    def working(self) -> int:
        """How many of the routed experts see a token."""
        return self.experts if self.dense else self.top_k


def routed(logits: Tensor, top_k: int, **options: Any) -> RoutingPlan:
    """A plan of scores (tokens, experts): by the op, or by torch where it is not used."""
    return (moe_route if logits.device.type in DEVICES else route_by_torch)(logits, top_k, **options)


def dispatched(x: Tensor, plan: RoutingPlan) -> Tensor:
    """Tokens (tokens, dim) into the rows of a plan (rows, dim), likewise."""
    return (moe_dispatch if x.device.type in DEVICES else dispatch_by_torch)(x, plan)


def through_experts(x: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor, order: Tensor | None = None) -> Tensor:
    """Rows of x (rows, dim), taken in an `order` by expert if there is one, each through its expert, likewise.

    offsets: (experts + 1,) int32, of the rows of each expert.
    """
    if x.device.type in DEVICES:
        return grouped_gemm(grouped_gemm(x, gate_up, offsets, activation="swiglu", gather=order), down, offsets)
    x, ends = x if order is None else x[order], offsets[1:]
    gate, up = grouped_linear(x, gate_up.to(x.dtype), ends).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate) * up, down.to(x.dtype), ends)


def combined(y: Tensor, plan: RoutingPlan) -> Tensor:
    """Rows of a plan (rows, dim) into their tokens' weighted sums, likewise."""
    return (moe_combine if y.device.type in DEVICES else combine_by_torch)(y, plan)


@torch.no_grad()
def balance_experts(model: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> None:
    """Moves the biases of those MoE layers that have one, towards experts that took fewer tokens than the mean, over all
    processes: call it after each step of the optimizer.

    Args:
        model: any, with such layers or without.
        buffers: those of `model` by their names, where they are not its own, with any axes before (torch.func).
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, MoE) or not layer.balance:
            continue
        bias, taken = (getattr(layer, key) if buffers is None else buffers[f"{name}.{key}"] for key in ("bias", "taken"))
        if dist.is_initialized():
            dist.all_reduce(taken)
        bias += layer.balance * (taken.mean(-1, keepdim=True) - taken).sign()
        taken.zero_()


def dense_plan(logits: Tensor, top_k: int) -> RoutingPlan:
    """All tokens to all experts, weighted by a softmax over scores (tokens, experts), of the unchosen 0 in their place."""
    tokens, experts = logits.shape
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.zeros_like(wide).scatter(1, chosen, wide.gather(1, chosen)).softmax(-1)
    numbers = torch.arange(tokens * experts, device=logits.device, dtype=torch.int32)
    of_tokens = torch.arange(experts, device=logits.device, dtype=torch.int32)
    return RoutingPlan(
        weights=weights,
        experts=of_tokens.expand(tokens, experts),
        offsets=torch.arange(experts + 1, device=logits.device, dtype=torch.int32) * tokens,
        counts=torch.full_like(of_tokens, tokens),
        slots=numbers.view(tokens, experts).T.flatten(),
        rows=numbers.view(experts, tokens).T.contiguous(),
        mean_probs=weights.mean(0),
        z_loss=wide.logsumexp(-1).square().mean(),
    )
