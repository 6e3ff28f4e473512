"""The mixture of experts: its options, one by one, against the plain sum over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.models import HybridLM
from madkernels.models.layers import moe as moe_layer
from madkernels.models.layers.moe import MoE, balance_experts

DIM, EXPERTS, TOP_K, HIDDEN = 12, 5, 2, 7


def build(**options: Any) -> MoE:
    torch.manual_seed(1)
    return MoE(DIM, experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, **options).double()


def tokens(count: int = 40) -> Tensor:
    return torch.randn(2, count // 2, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plain(layer: MoE, x: Tensor) -> Tensor:
    """Every expert sees every token; what its weights say is summed."""
    flat = x.view(-1, DIM)
    logits = layer.router(flat)
    scores = logits.sigmoid() if layer.sigmoid else logits.softmax(-1)
    order = scores + layer.bias if layer.balance else scores
    chosen = torch.zeros_like(scores).scatter(1, order.topk(TOP_K).indices, 1.0)
    weights = scores * chosen / (scores * chosen).sum(-1, keepdim=True)
    if layer.dense:
        weights = (logits * chosen).softmax(-1)
    y = torch.zeros_like(flat)
    for e in range(EXPERTS):
        gate, up = (flat @ layer.gate_up[e].T).chunk(2, -1)
        y = y + weights[:, e : e + 1] * (F.silu(gate) * up @ layer.down[e].T)
    if layer.shared is not None:
        gate, up = layer.shared.gate_up(flat).chunk(2, -1)
        y = y + layer.shared.down(F.silu(gate) * up)
    return y.view(x.shape)


OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"shared": 3}, {"sigmoid": True}, {"dense": True}, {"balance": 0.1}, {"sigmoid": True, "balance": 0.1, "shared": 1},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("by_op", [True, False])
def test_it_is_the_weighted_sum_of_its_experts(
    options: dict[str, Any], by_op: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_op:  # as on a GPU
        monkeypatch.setattr(moe_layer, "DEVICES", set())
    layer, x = build(**options), tokens().requires_grad_()
    if layer.balance:
        layer.bias += torch.randn(EXPERTS) / 5
    y, wanted = layer(x), plain(layer, x)
    torch.testing.assert_close(y, wanted)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(y.sin().sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(wanted.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counts_are_those_of_its_modules(options: dict[str, Any]) -> None:
    layer = build(**options)
    experts = EXPERTS if layer.dense else TOP_K
    extra = 3 * HIDDEN * DIM * options.get("shared", 0)
    assert layer.active_params() == EXPERTS * DIM + experts * 3 * HIDDEN * DIM + extra
    assert layer.flops(10) == 2 * 10 * layer.active_params()


def loads(layer: MoE, x: Tensor) -> Tensor:
    return layer.route(x.view(-1, DIM)).counts


def test_balance_evens_out_what_experts_take() -> None:
    layer, x = build(balance=0.005, sigmoid=True), tokens(400)
    x = x + 0.5  # so that some experts are favoured
    before, weights = loads(layer, x), layer.router.weight.clone()
    layer.taken.zero_()
    for _ in range(200):
        layer(x)
        balance_experts(layer)
    assert loads(layer, x).float().std() < before.float().std() / 4
    assert torch.equal(layer.router.weight, weights)


def test_balance_counts_in_training_alone_and_starts_anew_after_a_step() -> None:
    layer, x = build(balance=0.25), tokens()
    layer.eval()
    layer(x)
    assert not layer.taken.any()
    layer.train()
    layer(x)
    layer(x)  # as micro-batches do
    assert torch.equal(layer.taken, 2 * loads(layer.eval(), x).double())
    more = layer.taken > layer.taken.mean()
    balance_experts(layer)
    assert not layer.taken.any()
    assert torch.equal(layer.bias[more], torch.full_like(layer.bias[more], -0.25))


def test_balance_is_saved_with_the_model() -> None:
    lm = HybridLM("moe:balance=0.1", vocab_size=8, dim=DIM)
    lm(torch.arange(8).view(1, 8))
    balance_experts(lm)
    other = HybridLM("moe:balance=0.1", vocab_size=8, dim=DIM)
    other.load_state_dict(lm.state_dict())
    assert any(t.any() for name, t in other.named_buffers() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": -0.1}, "balance is -0.1; expected 0"),
        ({"dense": True, "sigmoid": True}, "dense is a routing of its own"),
        ({"dense": True, "balance": 0.1}, "dense is a routing of its own"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
