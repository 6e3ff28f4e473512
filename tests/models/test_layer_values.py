"""Layers against definitions written out here, position by position, in float64."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator

import pytest
import torch
from checks import relative_error
from torch import Tensor

from madkernels import reference
from madkernels.models.layers import LAYERS, Layer

DIM, SEQLEN = 24, 13


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def build(name: str, **options: int) -> Layer:
    torch.manual_seed(3)
    return LAYERS[name](DIM, **options).double()


def row() -> Tensor:
    return torch.randn(SEQLEN, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def expert(layer: Layer, i: int, x: Tensor) -> Tensor:
    gate, up = (x @ layer.gate_up[i].T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up @ layer.down[i].T


def rotated(vector: Tensor, position: int) -> Tensor:
    """Rotary embedding as multiplication of complex numbers: channel i the real part, i + half the imaginary one."""
    half = len(vector) // 2
    turned = [complex(vector[i], vector[i + half]) * cmath.exp(1j * position * 10000.0 ** (-i / half)) for i in range(half)]
    return torch.tensor([c.real for c in turned] + [c.imag for c in turned], dtype=torch.float64)


@pytest.mark.parametrize(("name", "reach"), [("attention", SEQLEN), ("sliding-attention", 4)])
@torch.no_grad()
def test_attention(name: str, reach: int) -> None:
    layer = build(name, heads=3) if name == "attention" else build(name, heads=3, window=reach)
    x, size = row(), DIM // 3
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(DIM, 1)
    mixed = torch.zeros(SEQLEN, DIM, dtype=torch.float64)
    for head in range(3):
        part = slice(head * size, (head + 1) * size)
        for t in range(SEQLEN):
            seen = range(max(0, t - reach), t + 1)
            query = rotated(q[t, part], t)
            scores = torch.stack([query @ rotated(k[s, part], s) / math.sqrt(size) for s in seen])
            mixed[t, part] = scores.softmax(0) @ v[seen.start : t + 1, part]
    assert relative_error(layer(x[None])[0], mixed @ layer.out.weight.T + layer.out.bias) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize(("turns", "frequency"), [(1.0, 10.0), (0.25, 2)])
def test_hyena(turns: float, frequency: float) -> None:
    layer = build("hyena", expand=2, groups=1, order=3, horizon=5, turns=turns, frequency=frequency)
    assert layer.filter.frequency.tolist() == [frequency] * 3
    x, inner = row(), 2 * DIM
    projected = x @ layer.in_proj.weight.T + layer.in_proj.bias
    short = torch.zeros_like(projected) + layer.conv_bias
    for t in range(SEQLEN):
        for back in range(min(3, t + 1)):
            short[t] += layer.conv_weight[:, 2 - back] * projected[t - back]
    q, k, v = short.split(inner, 1)
    kv = k * v

    taps = []
    for t in range(SEQLEN):
        time = t / 5
        angle = 2 * math.pi * turns * time
        h = torch.tensor([time, math.cos(angle), math.sin(angle)], dtype=torch.float64)
        for linear in layer.filter.layers:
            h = torch.sin(layer.filter.frequency * (linear.weight @ h + linear.bias))
        rates = torch.linspace(1 / 1.5, 1 / 0.3, inner, dtype=torch.float64) * math.log(100)
        taps.append((layer.filter.out.weight @ h) * torch.exp(-time * rates))
    mixed = torch.stack([sum(taps[t - s] * kv[s] for s in range(t + 1)) + layer.skip * kv[t] for t in range(SEQLEN)])
    # The rates of the layer are rounded to float32.
    assert relative_error(layer(x[None])[0], (q * mixed) @ layer.out.weight.T + layer.out.bias) < 1e-6


@torch.no_grad()
def test_hyena_groups_repeat_the_projection() -> None:
    layer = build("hyena", expand=2, groups=2)
    ungrouped = build("hyena", expand=2, groups=1)
    ungrouped.load_state_dict(layer.state_dict() | {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in (
        ("in_proj.weight", layer.in_proj.weight), ("in_proj.bias", layer.in_proj.bias),
    )})  # fmt: skip
    assert relative_error(layer(row()[None]), ungrouped(row()[None])) < 1e-12


@torch.no_grad()
def test_mamba() -> None:
    layer = build("mamba", dstate=5, width=3)
    x, inner, rank = row()[None], 2 * DIM, math.ceil(DIM / 16)
    u, z = (x @ layer.in_proj.weight.T).split(inner, 2)
    u = reference.causal_conv(u, layer.conv_weight, layer.conv_bias, activation="silu")
    low, B, C = (u @ layer.x_proj.weight.T).split([rank, 5, 5], 2)
    delta = torch.nn.functional.softplus(low @ layer.delta_weight.T + layer.delta_bias)
    state, ys = torch.zeros(inner, 5, dtype=torch.float64), []
    for t in range(SEQLEN):
        decay = torch.exp(-delta[0, t, :, None] * torch.exp(layer.A_log))
        state = decay * state + (delta[0, t] * u[0, t])[:, None] * B[0, t]
        ys.append(state @ C[0, t] + layer.D * u[0, t])
    y = torch.stack(ys) * torch.nn.functional.silu(z[0])
    assert relative_error(layer(x)[0], y @ layer.out_proj.weight.T) < 1e-12


@torch.no_grad()
def test_swiglu() -> None:
    layer, x = build("swiglu", hidden=10), row()
    gate, up = layer.gate_up.weight[:10] @ x.T, layer.gate_up.weight[10:] @ x.T
    wanted = layer.down.weight @ (gate / (1 + torch.exp(-gate)) * up)
    assert relative_error(layer(x[None])[0], wanted.T) < 1e-12


@torch.no_grad()
def test_mlp() -> None:
    layer, x = build("mlp", expand=2), row()
    h = layer.up.weight @ x.T
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert relative_error(layer(x[None])[0], (layer.down.weight @ h).T) < 1e-12


def test_moe_takes_the_lower_expert_of_equal_scores() -> None:
    layer = build("moe", experts=40, top_k=3, hidden=8)
    torch.nn.init.zeros_(layer.router.weight)
    y = layer(row()[None])
    wanted = sum(expert(layer, i, row()) for i in range(3)) / 3
    assert relative_error(y[0], wanted) < 1e-12
    y.sum().backward()
    used = layer.down.grad.abs().amax((1, 2)) > 0
    assert used.tolist() == [True] * 3 + [False] * 37


def test_moe_gives_the_same_bits_with_many_threads(threads: None) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS["moe"](64, experts=8, top_k=8, hidden=16), torch.randn(4, 512, 64, requires_grad=True)
    torch.use_deterministic_algorithms(False)
    first, *others = ([y := layer(x), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])] for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def short_conv(layer: Layer, x: Tensor) -> Tensor:
    projected = x @ layer.in_proj.weight.T + layer.in_proj.bias
    out: Tensor = reference.causal_conv(projected[None], layer.conv_weight, layer.conv_bias)
    return out[0]


@torch.no_grad()
@pytest.mark.parametrize("taps", [0, 5, 20])
def test_multi_head_hyena(taps: int) -> None:
    layer, size = build("mh-hyena", heads=3, horizon=5, taps=taps), DIM // 3
    x = row()
    q, k, v = (t.view(SEQLEN, 3, size) for t in short_conv(layer, x).split(DIM, 1))
    filters, y = layer.filter(SEQLEN, torch.float64), torch.zeros(SEQLEN, 3, size, dtype=torch.float64)
    for t in range(SEQLEN):
        for head in range(3):
            state = layer.skip[head] * torch.outer(k[t, head], v[t, head])
            for s in range(max(0, t + 1 - filters.shape[1]), t + 1):
                state += filters[head, t - s] * torch.outer(k[s, head], v[s, head])
            y[t, head] = q[t, head] @ state
    assert relative_error(layer(x[None])[0], y.view(SEQLEN, DIM) @ layer.out.weight.T + layer.out.bias) < 1e-12


@pytest.mark.parametrize("taps", [0, 5, 20])
def test_multi_head_hyena_by_pairs_of_steps_and_by_convolutions(taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build("mh-hyena", heads=3, horizon=5, taps=taps), row()[None].requires_grad_()
    results = []
    for pairs in (True, False):
        monkeypatch.setattr("madkernels.models.layers.mh_hyena.pairs_pay", lambda seqlen, size, pairs=pairs: pairs)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(relative_error(a, b) < 1e-11 for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_hyena_experts() -> None:
    layer = build("hyena-experts", experts=4, top_k=2, hidden=3, horizon=5)
    x = row()
    q, k, v = (t.view(SEQLEN, 4, 3) for t in short_conv(layer, x).split(12, 1))
    filters, skip = layer.filter(SEQLEN, torch.float64).view(4, 3, SEQLEN), layer.skip.view(4, 3)
    for t in range(SEQLEN):
        scores = layer.router.weight @ x[t]
        chosen = scores.argsort(descending=True)[:2]
        y = torch.zeros(3, dtype=torch.float64)
        for weight, e in zip(scores[chosen].softmax(0), chosen, strict=True):
            mixed = skip[e] * k[t, e] * v[t, e] + sum(filters[e, :, t - s] * k[s, e] * v[s, e] for s in range(t + 1))
            y += weight * q[t, e] * mixed
        assert relative_error(layer(x[None])[0, t], layer.out.weight @ y + layer.out.bias) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize(("order", "horizon", "taps"), [(4, 16, 0), (4, 2048, 0), (16, 128, 0), (2, 1, 0), (4, 1, 100)])
def test_hyena_filters_start_with_a_norm_of_one(order: int, horizon: int, taps: int) -> None:
    filters = build("hyena", order=order, horizon=horizon, taps=taps).filter(4 * horizon)
    assert 0.5 < filters.square().sum(1).mean().sqrt() < 1.6
