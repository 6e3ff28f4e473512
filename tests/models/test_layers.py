"""What every layer promises: causal, the same step by step, packed and cut in two."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from madkernels.models import HybridLM
from madkernels.models.layers import LAYERS, Layer, attention as attention_layer
from madkernels.models.layers.attention import attend
from madkernels.models.layers.rotary import Rope, rotate

DIM, SEQLEN = 32, 21
SEES_THE_TOKEN_BEFORE = "rwkv-channel-mixer"  # which is one all the same
CHANNEL_MIXERS = {name for name, layer in LAYERS.items() if layer.mixes == "channel"} - {SEES_THE_TOKEN_BEFORE}


def build(name: str) -> Layer:
    torch.manual_seed(1)
    options: dict[str, dict[str, Any]] = {
        "attention": {"heads": 4},
        "sliding-attention": {"heads": 4, "window": 5},
        "mh-hyena": {"heads": 4},
        "linear-attention": {"normalise": False},
        "mamba2": {"dstate": 8, "head_dim": 16},
    }
    return LAYERS[name](DIM, **options.get(name, {}))


def sequence(batch: int = 2, seqlen: int = SEQLEN) -> Tensor:
    return torch.randn(batch, seqlen, DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=sorted(LAYERS))
def layer(request: pytest.FixtureRequest) -> Layer:
    return build(request.param)


def test_is_causal(layer: Layer) -> None:
    x = sequence()
    y = layer(x)
    x[:, 10:] += 1
    assert torch.allclose(layer(x)[:, :10], y[:, :10], atol=1e-5)
    assert not torch.allclose(layer(x)[:, 10:], y[:, 10:], atol=1e-2)


@pytest.mark.parametrize("name", sorted(set(LAYERS) - CHANNEL_MIXERS))
def test_sees_the_past(name: str) -> None:
    layer, x = build(name), sequence()
    y = layer(x)
    x[:, 10] += 1
    seen = 11 if name == SEES_THE_TOKEN_BEFORE else 12  # which sees the token before and no further
    assert not torch.allclose(layer(x)[:, seen], y[:, seen], atol=1e-5)


def test_says_what_it_mixes(layer: Layer) -> None:
    """A channel mixer sees at most the token before."""
    x = sequence()
    y = layer(x)
    x[:, 10] += 1
    assert (layer.mixes == "channel") == torch.allclose(layer(x)[:, 12:], y[:, 12:], atol=1e-5)


def test_window_ends_where_it_says() -> None:
    layer, x = build("sliding-attention"), sequence()
    y = layer(x)
    x[:, 0] += 1
    changed = (layer(x) - y).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [t <= 5 for t in range(SEQLEN)]


@torch.no_grad()
def test_step_by_step(layer: Layer) -> None:
    x = sequence()
    state = layer.init_state(2)
    steps = torch.stack([layer.step(x[:, t], state) for t in range(SEQLEN)], dim=1)
    torch.testing.assert_close(steps, layer(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cut_in_two(layer: Layer) -> None:
    x = sequence()
    state = layer.init_state(2)
    halves = torch.cat([layer(x[:, :8], state=state), layer(x[:, 8:], state=state)], dim=1)
    torch.testing.assert_close(halves, layer(x), rtol=1e-4, atol=1e-5)


def test_packed_documents(layer: Layer) -> None:
    x = sequence(batch=1)
    bounds = [0, 7, 7, 8, SEQLEN]
    packed = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    apart = [layer(x[:, a:b]) for a, b in pairwise(bounds) if b > a]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(LAYERS) - CHANNEL_MIXERS))
def test_refuses_documents_with_a_state_that_is_not_fresh(name: str) -> None:
    layer = build(name)
    state = layer.init_state(2)
    with pytest.raises(ValueError, match=r"is of 2 sequences; expected init_state\(1\), of the documents"):
        layer(sequence(1), cu_seqlens=torch.tensor([0, SEQLEN], dtype=torch.int32), state=state)
    layer(sequence(2), state=state)
    with pytest.raises(ValueError, match=r"has seen tokens; with cu_seqlens a fresh one is expected, init_state\(2\)"):
        layer(sequence(1), cu_seqlens=torch.tensor([0, 9, SEQLEN], dtype=torch.int32), state=state)


class Unpacked(LAYERS["mamba"]):  # type: ignore[misc]
    packs_states = False


def test_a_layer_that_does_not_pack_refuses_both() -> None:
    layer = Unpacked(DIM)
    with pytest.raises(ValueError, match="Unpacked takes cu_seqlens or state, not both: it does not say packs_states"):
        layer(sequence(1), cu_seqlens=torch.tensor([0, SEQLEN], dtype=torch.int32), state=layer.init_state(1))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_one_step_of_training(layer: Layer, bfloat16: bool) -> None:
    x = sequence()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = layer(x).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def expert(layer: Layer, i: int, x: Tensor) -> Tensor:
    gate, up = (x @ layer.gate_up[i].T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up @ layer.down[i].T


def test_moe_is_the_weighted_sum_of_its_experts() -> None:
    layer, x = build("moe"), sequence().view(-1, DIM)
    scores = layer.router(x)
    expected = torch.zeros_like(x)
    for t, row in enumerate(scores):
        chosen = row.argsort(descending=True)[: layer.top_k]
        for weight, i in zip(row[chosen].softmax(0), chosen, strict=True):
            expected[t] += weight * expert(layer, int(i), x[t : t + 1])[0]
    torch.testing.assert_close(layer(x.unsqueeze(0))[0], expected, rtol=1e-4, atol=1e-6)


def test_hyena_filter_does_not_depend_on_the_length() -> None:
    layer = build("hyena")
    assert torch.allclose(layer.filter(300)[:, :40], layer.filter(40), atol=1e-6)


@pytest.mark.parametrize("name", ["hyena", "mh-hyena", "hyena-experts"])
@torch.no_grad()
def test_explicit_filters_keep_a_finite_state(name: str) -> None:
    torch.manual_seed(1)
    layer, x = LAYERS[name](DIM, taps=6), sequence()
    whole, state = layer(x), layer.init_state(2)
    parts = [layer(x[:, :9], state=state), *(layer.step(x[:, t], state).unsqueeze(1) for t in range(9, SEQLEN))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert state["past"].shape[1] == 5
    assert state["past"][0].numel() == layer.state_size(SEQLEN)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_by_torch_is_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the op is not used."""
    q, k, v = torch.randn(3, 1, 12, 2, 8)
    for queries, offsets in ((12, None), (5, None), (12, torch.tensor([0, 5, 5, 12], dtype=torch.int32))):
        with monkeypatch.context() as elsewhere:
            wanted = attend(q[:, -queries:], k, v, window, offsets)
            elsewhere.setattr(attention_layer, "DEVICES", set())
            torch.testing.assert_close(attend(q[:, -queries:], k, v, window, offsets), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "sliding-attention"])
@torch.no_grad()
def test_a_pack_is_continued_by_torch_as_by_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where values are not looked at either."""
    layer, x, later = build(name).double(), sequence(1).double(), sequence(3, 12).double()

    def run() -> list[Tensor]:
        state = layer.init_state(3)
        ys = [layer(x, cu_seqlens=torch.tensor([0, 1, 9, SEQLEN], dtype=torch.int32), state=state)]
        ys += [layer.step(later[:, t], state) for t in range(8)]
        return [*ys, layer(later[:, 8:], state=state), *state.values()]

    wanted = run()
    monkeypatch.setattr(attention_layer, "DEVICES", set())
    monkeypatch.setattr(attention_layer, "can_look", lambda t: False)
    for found, other in zip(run(), wanted, strict=True):
        torch.testing.assert_close(found, other)


def test_rotary_positions_are_relative() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16)
    pairs = [(rotate(q, torch.tensor([t + 3]), Rope()), rotate(k, torch.tensor([t]), Rope())) for t in (0, 5, 100)]
    scores = [(turned_q * turned_k).sum() for turned_q, turned_k in pairs]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-4)


def test_mamba_starts_with_steps_in_range() -> None:
    layer = LAYERS["mamba"](64)
    step = torch.nn.functional.softplus(layer.delta_bias)
    assert 0.9e-3 < step.min() < 3e-3
    assert 0.03 < step.max() < 0.11
    assert torch.allclose(layer.A()[0], -torch.arange(1.0, 17.0))


def test_models_do_not_touch_the_layers_initialisation() -> None:
    model = HybridLM("mamba", vocab_size=8, dim=64)
    assert torch.nn.functional.softplus(model.backbone.layers[0].delta_bias).max() < 0.11
    assert 0.01 < model.embedding.weight.std() < 0.03


@pytest.mark.parametrize("name", ["attention", "sliding-attention"])
@pytest.mark.parametrize("first", [0, 1, 70])
@torch.no_grad()
def test_decoding_beyond_the_room_of_a_cache(name: str, first: int) -> None:
    """And with two continuations of each state, of which one goes on."""
    layer, x = build(name).double(), torch.randn(2, 300, DIM, dtype=torch.float64)
    whole, state = layer(x), layer.init_state(2)
    layer(x[:, :first], state=state)
    for t in range(first, 300):
        aside = dict(state)
        y = layer.step(x[:, t], state)
        kept = {key: value.clone() for key, value in state.items()}
        layer.step(-x[:, t], aside)
        assert all(torch.equal(state[key], value) for key, value in kept.items())
        torch.testing.assert_close(y, whole[:, t], rtol=1e-11, atol=1e-12)


SPARSE = {"experts": 5, "top_k": 2, "hidden": 4, "sparse": True, "horizon": 12}


def sparse_experts(**options: Any) -> Any:
    torch.manual_seed(1)
    return LAYERS["hyena-experts"](DIM, **SPARSE | options).double()


def test_sparse_hyena_experts_see_the_tokens_that_chose_them() -> None:
    """Each expert alone: a layer of one expert, on its tokens."""
    layer, x = sparse_experts(), sequence(1).double().requires_grad_()
    scores = layer.router(x[0])
    chosen = scores.topk(2).indices
    wanted = torch.zeros_like(x[0])
    for e in range(5):
        one = sparse_experts(experts=1, top_k=1, sparse=False)
        own = torch.arange(4) + e * 4
        of_all = torch.cat([own, own + 20, own + 40])  # of q, k and v
        state = {k: v[of_all] if len(v) == 60 else v for k, v in layer.state_dict().items() if not k.startswith("filter")}
        one.load_state_dict(one.state_dict() | state | {"router.weight": scores.new_zeros(1, DIM), "skip": layer.skip[own]})
        del one.filter
        one.__dict__["filter"] = lambda length, dtype, own=own: layer.filter(length, dtype)[own]
        kept = (chosen == e).any(1)
        weight = torch.where(chosen == e, scores.gather(1, chosen).softmax(-1), 0).sum(1)[kept]
        y = one(x[:, kept])[0] - one.out.bias
        wanted = wanted.index_put((kept.nonzero().squeeze(1),), weight.unsqueeze(1) * y, accumulate=True)
    torch.testing.assert_close(layer(x)[0], wanted + layer.out.bias)


@pytest.mark.parametrize("taps", [0, 6])
def test_sparse_hyena_experts_in_parts_and_packed(taps: int) -> None:
    layer, x = sparse_experts(taps=taps), sequence().double()
    whole, state = layer(x), layer.init_state(2)
    parts = [layer(x[:, :9], state=state), *(layer.step(x[:, t], state).unsqueeze(1) for t in range(9, SEQLEN))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    offsets = torch.tensor([0, 8, 8, SEQLEN], dtype=torch.int32)
    packed = layer(x[:1], cu_seqlens=offsets)
    apart = torch.cat([layer(x[:1, a:b]) for a, b in pairwise(offsets.tolist()) if a < b], 1)
    torch.testing.assert_close(packed, apart)
    whole.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.flops(100) < 0.6 * sparse_experts(taps=taps, sparse=False).flops(100)  # two experts of five
