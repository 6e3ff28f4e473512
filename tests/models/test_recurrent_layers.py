"""Layers with matrix states against their definitions, one token after the other, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from checks import relative_error
from torch import Tensor

from madkernels.models.layers import LAYERS, Layer, matrix_state

DIM, HEADS, SIZE, SEQLEN = 24, 3, 8, 13


def build(name: str, **options: int) -> Layer:
    torch.manual_seed(3)
    layer = LAYERS[name](DIM, **options).double()
    with torch.no_grad():  # away from starts at which a term would not be seen
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def row() -> Tensor:
    return torch.randn(SEQLEN, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def heads(x: Tensor, size: int = SIZE) -> Tensor:
    return x.view(-1, size)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def conv_silu(x: Tensor, conv: torch.nn.Module) -> Tensor:
    """Four taps, the last on the token itself."""
    padded = torch.cat([x.new_zeros(3, x.shape[1]), x])
    y = sum(padded[j : j + len(x)] * conv.weight[:, j] for j in range(4))
    return F.silu(y if conv.bias is None else y + conv.bias)


def agree(layer: Layer, x: Tensor, outputs: list[Tensor]) -> None:
    assert relative_error(layer(x[None])[0], torch.stack(outputs)) < 1e-11


@torch.no_grad()
def test_linear_attention() -> None:
    layer, x = build("linear-attention", heads=HEADS), row()
    q, k, v = (x @ layer.qkv.weight.T).split(DIM, 1)

    def features(t: Tensor, f: torch.nn.Module) -> Tensor:
        return (heads(t) @ f.left.weight.T + f.left.bias) * (heads(t) @ f.right.weight.T + f.right.bias)

    outputs = []
    for t in range(SEQLEN):
        weights = [(features(q[t], layer.q_features) * features(k[s], layer.k_features)).sum(1) for s in range(t + 1)]
        y = sum(w[:, None] * heads(v[s]) for s, w in enumerate(weights)) / (sum(weights)[:, None] + 1e-12)
        outputs.append(layer.out.weight @ y.flatten())
    agree(layer, x, outputs)


@torch.no_grad()
def test_gated_linear_attention() -> None:
    layer, x = build("gated-linear-attention", heads=HEADS, rank=5), row()
    state, outputs = torch.zeros(HEADS, SIZE, SIZE, dtype=torch.float64), []
    for token in x:
        q, k, v, gate = (heads(t) for t in (layer.qkvg.weight @ token).split(DIM))
        decay = heads(
            torch.sigmoid(layer.forget[1].weight @ layer.forget[0].weight @ token + layer.forget[1].bias) ** (1 / 16)
        )
        state = decay[..., None] * state + k[..., None] * v[:, None]
        y = torch.einsum("hk,hkv->hv", q, state) / math.sqrt(SIZE)
        outputs.append(layer.out.weight @ (rms(y, layer.norm.weight) * F.silu(gate)).flatten())
    agree(layer, x, outputs)


def rwkv_output(layer: Layer, y: Tensor, gate: Tensor) -> Tensor:
    y = y / 8
    normed = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed.flatten() * layer.norm.weight + layer.norm.bias
    return layer.out.weight @ (normed * F.silu(layer.g.weight @ gate))


@pytest.mark.parametrize("version", [5, 6])
@torch.no_grad()
def test_rwkv_time_mixers(version: int) -> None:
    layer, x = build(f"rwkv{version}-time-mixer", head_dim=SIZE), row()
    state, outputs = torch.zeros(HEADS, SIZE, SIZE, dtype=torch.float64), []
    for t, token in enumerate(x):
        before = x[t - 1] if t else torch.zeros_like(token)
        if version == 5:
            r, k, v, g = (share * token + (1 - share) * before for share in layer.mix)
            rate = layer.decay
        else:
            low = torch.tanh(layer.mix_down @ (token + (before - token) * layer.first_mix)).view(5, -1)
            r, k, v, g, w = (
                token + (before - token) * (layer.mix[i] + low[i] @ layer.mix_up[i]) for i in range(5)
            )  # fmt: skip
            rate = layer.decay + layer.decay_up @ torch.tanh(layer.decay_down @ w)
        r, k, v = heads(layer.r.weight @ r), heads(layer.k.weight @ k), heads(layer.v.weight @ v)
        new = k[..., None] * v[:, None]
        y = torch.einsum("hk,hkv->hv", r, state + heads(layer.bonus)[..., None] * new)
        state = heads(torch.exp(-torch.exp(rate)))[..., None] * state + new
        outputs.append(rwkv_output(layer, y, g))
    agree(layer, x, outputs)


@torch.no_grad()
def test_rwkv_channel_mixer() -> None:
    layer, x = build("rwkv-channel-mixer"), row()
    outputs = []
    for t, token in enumerate(x):
        before = x[t - 1] if t else torch.zeros_like(token)
        key, receptance = (share * token + (1 - share) * before for share in layer.mix)
        hidden = (layer.key.weight @ key).clamp_min(0) ** 2
        outputs.append(torch.sigmoid(layer.receptance.weight @ receptance) * (layer.value.weight @ hidden))
    agree(layer, x, outputs)


@torch.no_grad()
def test_mamba2() -> None:
    layer, x = build("mamba2", dstate=5, head_dim=16), row()
    z, mixed, delta = (x @ layer.in_proj.weight.T).split([48, 58, 3], 1)
    u, B, C = conv_silu(mixed, layer.conv).split([48, 5, 5], 1)
    state, outputs = torch.zeros(3, 5, 16, dtype=torch.float64), []
    for t in range(SEQLEN):
        step = F.softplus(delta[t] + layer.delta_bias)[:, None, None]
        state = torch.exp(-layer.A_log.exp()[:, None, None] * step) * state + step * B[t][:, None] * heads(u[t], 16)[:, None]
        y = torch.einsum("n,hnv->hv", C[t], state) + layer.D[:, None] * heads(u[t], 16)
        outputs.append(layer.out_proj.weight @ rms(y.flatten() * F.silu(z[t]), layer.norm.weight))
    agree(layer, x, outputs)


@torch.no_grad()
def test_mamba2_with_groups_limits_and_norm_before_gate() -> None:
    layer, x = build("mamba2", dstate=5, head_dim=8, groups=3, D_per_channel=True, delta_min=0.02, delta_max=0.05,
                     norm_before_gate=True, norm_eps=0.1, bias=True, conv_bias=False), row()  # fmt: skip
    z, mixed, delta = layer.in_proj(x).split([48, 48 + 2 * 15, 6], 1)
    assert layer.conv.bias is None
    u, B, C = conv_silu(mixed, layer.conv).split([48, 15, 15], 1)
    state, outputs, limited = torch.zeros(6, 5, 8, dtype=torch.float64), [], set()
    for t in range(SEQLEN):
        free = F.softplus(delta[t] + layer.delta_bias)[:, None, None]
        step = free.clamp(0.02, 0.05)
        limited |= {int(sign) for sign in (free - step).sign().flatten()}
        b, c = (heads(projected[t], 5).repeat_interleave(2, 0) for projected in (B, C))
        state = torch.exp(-layer.A_log.exp()[:, None, None] * step) * state + step * b[:, :, None] * heads(u[t], 8)[:, None]
        y = torch.einsum("hn,hnv->hv", c, state).flatten() + layer.D * u[t]
        groups = heads(y, 16)
        normed = groups / (groups.square().mean(1, keepdim=True) + 0.1).sqrt()
        outputs.append(layer.out_proj(normed.flatten() * layer.norm.weight * F.silu(z[t])))
    assert limited == {-1, 0, 1}  # steps below, between and above the limits
    agree(layer, x, outputs)


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_deltanets(gated: bool) -> None:
    layer, x = build("gated-deltanet" if gated else "deltanet", heads=HEADS), row()
    wide = SIZE * (2 if gated else 1)
    q, k, v = conv_silu(x @ layer.qkv.weight.T, layer.conv).split([DIM, DIM, HEADS * wide], 1)
    state, outputs = torch.zeros(HEADS, SIZE, wide, dtype=torch.float64), []
    for t, token in enumerate(x):
        key, rate = F.normalize(heads(k[t]), dim=-1), torch.sigmoid(layer.rate.weight @ token)[:, None]
        if gated:
            step = F.softplus(layer.delta.weight @ token + layer.delta_bias)
            state = torch.exp(-layer.A_log.exp() * step)[:, None, None] * state
        error = heads(v[t], wide) - torch.einsum("hk,hkv->hv", key, state)
        state = state + key[..., None] * (rate * error)[:, None]
        y = rms(torch.einsum("hk,hkv->hv", F.normalize(heads(q[t]), dim=-1), state) / math.sqrt(SIZE), layer.norm.weight)
        if gated:
            y = y * F.silu(heads(layer.gate.weight @ token, wide))
        outputs.append(layer.out.weight @ y.flatten())
    agree(layer, x, outputs)


@pytest.mark.parametrize(
    "name", ["gated-linear-attention", "rwkv5-time-mixer", "rwkv6-time-mixer", "deltanet", "gated-deltanet"]
)
def test_in_chunks_by_torch_as_by_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel: packed documents, one of them empty, what comes after them, and gradients."""
    layer = build(name, **({"head_dim": SIZE} if "rwkv" in name else {"heads": HEADS}))
    x, later = row()[None], torch.stack([row()] * 3)

    def run() -> list[Tensor]:
        state = layer.init_state(3)
        ys = [layer(x, cu_seqlens=torch.tensor([0, 4, 4, SEQLEN], dtype=torch.int32), state=state)]
        ys += [layer(later, state=state), layer(later), *state.values()]
        weighed = sum((y * (1 + torch.arange(y.shape[-1]))).sum() for y in ys)
        return [*ys, *torch.autograd.grad(weighed, list(layer.parameters()))]

    wanted = run()
    monkeypatch.setattr(matrix_state, "DEVICES", set())
    for found, other in zip(run(), wanted, strict=True):
        assert relative_error(found, other) < 1e-11


@pytest.mark.parametrize("name", ["hyena-se", "hyena-mr"])
@torch.no_grad()
def test_explicit_hyenas(name: str) -> None:
    layer, x = build(name, groups=4, taps=6), row()
    projected = x @ layer.in_proj.weight.T + layer.in_proj.bias
    padded = torch.cat([torch.zeros(2, 3 * DIM, dtype=torch.float64), projected])
    short = sum(padded[j : j + SEQLEN] * layer.conv_weight[:, j] for j in range(3)) + layer.conv_bias
    q, k, v = short.split(DIM, 1)
    taps = layer.filter.weight
    if name == "hyena-mr":
        rates = torch.logspace(math.log10(0.1 / 6), math.log10(0.5), 4, dtype=torch.float64)
        taps = taps * torch.exp(-rates[:, None] * torch.arange(6))
    taps, skip = taps.repeat_interleave(6, 0), layer.skip.repeat_interleave(6)
    outputs = []
    for t in range(SEQLEN):
        y = sum(taps[:, j] * (k * v)[t - j] for j in range(min(6, t + 1))) + skip * (k * v)[t]
        outputs.append(layer.out.weight @ (q[t] * y) + layer.out.bias)
    assert relative_error(layer(x[None])[0], torch.stack(outputs)) < 1e-6  # the rates of the layer are in float32


@torch.no_grad()
@pytest.mark.parametrize("name", ["rwkv6-time-mixer", "gated-linear-attention", "mamba2", "gated-deltanet"])
def test_decoding_under_autocast_does_not_drift(name: str) -> None:
    """600 steps are as near to float32 as the whole sequence at once is: what a state rounds does not add up."""
    torch.manual_seed(0)
    layer, x = LAYERS[name](64), torch.randn(1, 600, 64)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        whole, state = layer(x), layer.init_state(1)
        steps = torch.stack([layer.step(x[:, t], state) for t in range(600)], 1)
    assert relative_error(steps[:, 300:], exact[:, 300:]) < 1.1 * relative_error(whole[:, 300:], exact[:, 300:])
