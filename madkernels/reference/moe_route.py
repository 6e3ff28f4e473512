"""Routing of tokens to experts, and the way there and back.

    s = softmax(logits) over the experts, or sigmoid(logits);  chosen: the top_k highest of s + bias
    weights = s of the chosen, over their sum with `renormalize`

Softmax renormalised is softmax over the chosen, and computed as such. Where there is neither a bias nor groups, the order is
that of the logits, of which s is monotonic: it tells apart scores that round to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid")


class RoutingPlan(NamedTuple):
    """Which expert sees which token, and with which weight: what :func:`madkernels.moe_route` returns.

    A (token, k) pair that its expert takes has a row. Rows are sorted by expert, those of an expert by token: so expert e
    works on rows ``offsets[e]`` to ``offsets[e + 1] - 1``, one matrix product each.
    """

    weights: Tensor
    """(tokens, top_k): float32 (float64 with float64); 0 where dropped. Differentiable."""
    experts: Tensor
    """(tokens, top_k) int32: the experts that each token chose, in falling order of what it chose by."""
    offsets: Tensor
    """(experts + 1,) int32: where the rows of each expert begin, and where the last end."""
    counts: Tensor
    """(experts,) int32: the tokens that chose each expert, those that it dropped too."""
    slots: Tensor
    """(tokens * top_k,) int32: of each row, token * top_k + k; -1 from ``offsets[-1]`` on."""
    rows: Tensor
    """(tokens, top_k) int32: the inverse of `slots`; -1 where dropped."""
    mean_probs: Tensor
    """(experts,): the mean over tokens of the scores over their sum. Dtype of `weights`; differentiable."""
    z_loss: Tensor
    """(): the mean of the square of logsumexp of a token's logits (ST-MoE, arXiv 2202.08906). As `mean_probs`."""

    @property
    def load_balance_loss(self) -> Tensor:
        """(): experts times the sum of share of pairs times mean score; 1 where all are equal (Switch, arXiv 2101.03961)."""
        pairs = max(self.experts.numel(), 1)
        return self.counts.shape[0] / pairs * (self.counts * self.mean_probs).sum()

    @property
    def dropped(self) -> Tensor:
        """() int32: how many pairs found no room. A tensor, so that nobody waits for it."""
        return self.experts.numel() - self.offsets[-1]


def plan_of(weights: Tensor, aux: Tensor, *indices: Tensor, drops: bool) -> RoutingPlan:
    """A plan of the results of :func:`route`. drops: whether some pairs may have no row."""
    experts, counts, offsets, slots, rows = indices
    if drops:
        weights = weights.masked_fill(rows < 0, 0)
    return RoutingPlan(weights, experts, offsets, counts, slots, rows, aux[:-1], aux[-1])


def jittered(logits: Tensor, jitter: float) -> Tensor:
    """Each logit times a random number between 1 - jitter and 1 + jitter, in float32 at least."""
    if jitter < 0:
        raise ValueError(f"moe_route: jitter is {jitter}; expected 0 (none) or above")
    if jitter == 0:
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide * torch.empty_like(wide).uniform_(1 - jitter, 1 + jitter)


def is_sigmoid(score: str) -> bool:
    if score not in SCORES:
        raise ValueError(f"moe_route: score is {score!r}; it takes {' or '.join(map(repr, SCORES))}")
    return score == "sigmoid"


def moe_route(
    logits: Tensor,  # (tokens, experts)
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,  # (experts,)
    groups: tuple[int, int] | None = None,
    capacity: int | None = None,
    jitter: float = 0.0,
) -> RoutingPlan:
    """The meaning of :func:`madkernels.moe_route`; computes in the dtype of `logits`, at least float32."""
    found = route(jittered(logits, jitter), bias, top_k, is_sigmoid(score), renormalize, *(groups or (1, 1)), capacity)
    return plan_of(*found, drops=capacity is not None)


def route(
    logits: Tensor,  # (tokens, experts)
    bias: Tensor | None,  # (experts,)
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
    groups: int,
    top_groups: int,
    capacity: int | None,
) -> Sequence[Tensor]:
    """The results of the dispatcher's op: weights, dropped pairs' too; aux, which is mean_probs and z_loss; experts, counts,
    offsets, slots and rows."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = max(wide.shape[0], 1)
    scores = wide.sigmoid() if sigmoid else wide.softmax(-1)
    plain = bias is None and top_groups == groups
    order = wide if plain else scores if bias is None else scores + bias.to(wide.dtype)
    experts = choose(order.detach(), top_k, groups, top_groups)
    if renormalize and not sigmoid:
        weights = wide.gather(1, experts).softmax(-1)
    else:
        weights = scores.gather(1, experts)
        weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    mean = (scores / scores.sum(-1, keepdim=True) if sigmoid else scores).sum(0) / tokens
    highest = wide.detach().amax(-1, keepdim=True)
    lse = (highest + (wide - highest).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    aux = torch.cat([mean, lse.square().sum(0, keepdim=True) / tokens])
    return weights, aux, experts.int(), *places(experts, wide.shape[1], capacity)


def falling(values: Tensor) -> Tensor:
    """The order from the highest down along the last axis, NaN first; of equals the first comes first."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def choose(order: Tensor, top_k: int, groups: int, top_groups: int) -> Tensor:
    """The experts that each token chooses: (tokens, top_k), int64."""
    tokens, experts = order.shape
    ranked = falling(order)
    if top_groups < groups:
        size = experts // groups
        of_groups = order.view(tokens, groups, size)
        best = falling(of_groups)[..., :2]
        allowed = falling(of_groups.gather(2, best).sum(-1))[:, :top_groups]
        outside = (ranked.unsqueeze(-1) // size != allowed.unsqueeze(1)).all(-1)
        ranked = ranked.gather(1, outside.int().sort(dim=-1, stable=True).indices)
    return ranked[:, :top_k]


def places(experts: Tensor, count: int, capacity: int | None) -> tuple[Tensor, ...]:
    """counts, offsets, slots and rows, int32, of pairs whose experts, of `count`, are (tokens, top_k)."""
    flat, pairs = experts.flatten(), experts.numel()
    counts = (flat.unsqueeze(-1) == torch.arange(count, device=flat.device)).sum(0)
    kept = counts if capacity is None else counts.clamp(max=capacity)
    offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
    by_expert = flat.argsort(dim=0, stable=True)
    rank = by_expert.argsort() - (counts.cumsum(0) - counts)[flat]
    rows = torch.where(rank < kept[flat], offsets[flat] + rank, -1)
    numbers = torch.arange(pairs, device=flat.device)
    slots = rows.new_full((pairs + 1,), -1).scatter(0, torch.where(rows < 0, pairs, rows), numbers)[:-1]
    slots = torch.where(numbers < offsets[-1], slots, -1)
    return counts.int(), offsets.int(), slots.int(), rows.int().view_as(experts)


def moe_dispatch(x: Tensor, plan: RoutingPlan) -> Tensor:
    """The meaning of :func:`madkernels.moe_dispatch`: (tokens, dim) -> (tokens * top_k, dim)."""
    return dispatch(x, None, plan.slots, plan.rows)


def moe_combine(y: Tensor, plan: RoutingPlan) -> Tensor:
    """The meaning of :func:`madkernels.moe_combine`: (tokens * top_k, dim) -> (tokens, dim)."""
    return combine(y, plan.weights, plan.slots, plan.rows)


def dispatch(x: Tensor, weights: Tensor | None, slots: Tensor, rows: Tensor) -> Tensor:
    """out[row] = weights[slot] x[slot // top_k], slot = slots[row]; 0 where that is -1."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    slot = slots.long().clamp(min=0)
    found = wide[slot // rows.shape[1]]
    if weights is not None:
        found = found * weights.flatten()[slot].unsqueeze(-1)
    return torch.where((slots < 0).unsqueeze(-1), 0, found).to(x.dtype)


def combine(y: Tensor, weights: Tensor | None, slots: Tensor, rows: Tensor) -> Tensor:
    """out[token] = sum_k weights[token, k] y[rows[token, k]], without the rows that are -1."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    found = wide[rows.long().clamp(min=0)]
    if weights is not None:
        found = found * weights.unsqueeze(-1)
    return torch.where((rows < 0).unsqueeze(-1), 0, found).sum(1).to(y.dtype)


def dot(x: Tensor, y: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """out[token, k] = x[token] y[rows[token, k]], 0 where that is -1."""
    wide = torch.promote_types(x.dtype, torch.float32)
    found = (x.to(wide).unsqueeze(1) * y.to(wide)[rows.long().clamp(min=0)]).sum(-1)
    return torch.where(rows < 0, 0, found)
