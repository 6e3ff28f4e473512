"""What every layer promises at the edges: precision, empty inputs, gradients across cuts, one graph, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import relative_error
from torch import Tensor

from madkernels.models.layers import LAYERS, Layer

DIM, SEQLEN = 32, 19
SMALL: dict[str, dict[str, Any]] = {
    "attention": {"heads": 4},
    "sliding-attention": {"heads": 4, "window": 5},
    "hyena": {"horizon": 12},  # shorter than the sequences
    "mh-hyena": {"heads": 4, "horizon": 12},
    "hyena-experts": {"experts": 5, "top_k": 3, "hidden": 8, "horizon": 12},
    "linear-attention": {"heads": 4, "normalise": False},  # whose sum may be near zero
    "gated-linear-attention": {"heads": 4},
    "deltanet": {"heads": 4},
    "gated-deltanet": {"heads": 4},
    "hyena-se": {"groups": 4},
    "hyena-mr": {"groups": 4, "taps": 12},
    "mamba": {"dstate": 4},
    "mamba2": {"dstate": 8, "head_dim": 16},
    "rwkv5-time-mixer": {"head_dim": 8},
    "rwkv6-time-mixer": {"head_dim": 8},
    "moe": {"experts": 5, "top_k": 3, "hidden": 16},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


def build(name: str, dtype: torch.dtype = torch.float64) -> Layer:
    torch.manual_seed(1)
    return LAYERS[name](DIM, **SMALL.get(name, {})).to(dtype)


def sequence(batch: int = 2, seqlen: int = SEQLEN, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, seqlen, DIM, generator=generator, dtype=torch.float64).to(dtype)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(params=list(LAYERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    """Forward, and forward of a part followed by steps, in one dtype throughout."""
    layer, x = build(name, dtype), sequence(dtype=dtype)
    whole = layer(x)
    assert whole.dtype == dtype
    with torch.no_grad():
        state = layer.init_state(2)
        parts = [layer(x[:, :9], state=state)]
        parts += [layer.step(x[:, t], state).unsqueeze(1) for t in range(9, SEQLEN)]
    assert relative_error(torch.cat(parts, 1), whole) < TOLERANCE[dtype]
    exact = layer.double()(x.double())  # of the same, rounded, parameters and inputs
    assert relative_error(whole, exact) < TOLERANCE[dtype]


def test_autocast(name: str) -> None:
    """Nearly float32's result, and decoding agrees with it."""
    layer, x = build(name, torch.float32), sequence(dtype=torch.float32)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            whole = layer(x)
            state = layer.init_state(2)
            steps = torch.stack([layer.step(x[:, t], state) for t in range(SEQLEN)], 1)
    assert whole.dtype == torch.bfloat16
    assert relative_error(whole, exact) < 0.03
    assert relative_error(steps, whole) < 0.01


def test_an_optimiser_step_under_autocast_goes_downhill(name: str) -> None:
    layer, x = build(name, torch.float32), sequence(dtype=torch.float32)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (layer(x) - 1).float().square().mean()

    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize(("batch", "seqlen"), [(0, 3), (1, 1), (2, 0)])
def test_small_and_empty(name: str, batch: int, seqlen: int) -> None:
    y = build(name)(sequence(batch, seqlen))
    assert y.shape == (batch, seqlen, DIM)
    assert y.isfinite().all()


@pytest.mark.parametrize("parts", [[9, 10], [1, 18], [2, 0, 1, 9, 7]], ids=str)
def test_cuts_pass_gradients_on(name: str, parts: list[int]) -> None:
    layer, x = build(name), sequence().requires_grad_()
    whole, state = layer(x), layer.init_state(2)
    cut = torch.cat([layer(part, state=state) for part in x.split(parts, 1)], 1)
    weights = torch.randn_like(whole)
    assert relative_error(cut, whole) < 1e-12
    assert relative_error(*(torch.autograd.grad(y, x, weights)[0] for y in (cut, whole))) < 1e-12


@pytest.mark.parametrize("lengths", [[7, 12], [1, 11, 0, 7], [0, 19, 0], [1] * 19], ids=str)
def test_packed_gradients(name: str, lengths: list[int]) -> None:
    layer, x = build(name), sequence(batch=1).requires_grad_()
    packed = layer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())
    apart = torch.cat([layer(document) for document in x.split(lengths, 1) if document.shape[1]], 1)
    weights, leaves = torch.randn_like(packed), [x, *layer.parameters()]
    assert relative_error(packed, apart) < 1e-12
    pairs = zip(*(torch.autograd.grad(y, leaves, weights) for y in (packed, apart)), strict=True)
    assert all(relative_error(found, wanted) < 1e-12 for found, wanted in pairs)


def test_rows_of_a_batch_do_not_mix(name: str) -> None:
    layer, x = build(name), sequence(batch=3)
    assert relative_error(layer(x), torch.cat([layer(row) for row in x.split(1)])) < 1e-12


def test_gradients_by_finite_differences(name: str) -> None:
    layer, x = build(name), sequence(batch=1, seqlen=5)
    values = {k: v.detach().requires_grad_() for k, v in layer.named_parameters()}
    direction = {k: torch.randn_like(v) for k, v in values.items()}

    def loss(distance: float) -> Tensor:
        moved = {k: v + distance * direction[k] for k, v in values.items()}
        y: Tensor = torch.func.functional_call(layer, moved, (x,))
        return y.square().sum()

    grads = torch.autograd.grad(loss(0.0), list(values.values()))
    slope = torch.stack([(g * d).sum() for g, d in zip(grads, direction.values(), strict=True)]).sum()
    torch.testing.assert_close((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "moe"])  # which reads counts on the host
def test_one_graph(name: str) -> None:
    layer, x = build(name), sequence()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < 1e-12


def test_refuses_inputs_that_do_not_fit(name: str) -> None:
    layer, x = build(name), sequence(batch=1)
    with pytest.raises(ValueError, match=r"x has shape \(1, 19, 31\); expected \(batch, seqlen, 32\)"):
        layer(x[..., :31])
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 18\]; expected offsets rising from 0 to the seqlen, 19"):
        layer(x, cu_seqlens=offsets(0, 18))
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 9, 5, 19\]; expected offsets rising"):
        layer(x, cu_seqlens=offsets(0, 9, 5, 19))
    with pytest.raises(ValueError, match=r"dtype torch.int64 and shape \(2,\); expected int32 \(num_docs \+ 1,\)"):
        layer(x, cu_seqlens=offsets(0, 19).long())
    with pytest.raises(ValueError, match="expected batch 1, got 2"):
        layer(sequence(), cu_seqlens=offsets(0, 19))


@pytest.mark.parametrize(
    ("name", "dim", "options", "message"),
    [
        ("attention", 32, {"heads": 0}, "heads is 0; expected a whole number from 1"),
        ("attention", 32, {"heads": True}, "heads is True; expected"),
        ("sliding-attention", 32, {"window": 0}, "window is 0; expected"),
        ("hyena", 32, {"groups": 0}, "groups is 0; expected"),
        ("hyena", 32, {"horizon": 1.5}, "horizon is 1.5; expected"),
        ("hyena", 32, {"taps": -3}, "taps is -3; expected"),
        ("mh-hyena", 32, {"heads": 5}, "dim 32 does not divide into 5 heads"),
        ("hyena-experts", 32, {"top_k": 9}, "top_k 9 is more than there are experts, 8"),
        ("mamba", 32, {"dstate": -1}, "dstate is -1; expected"),
        ("mlp", 0, {}, "dim is 0; expected"),
        ("swiglu", 32, {"hidden": -8}, "hidden is -8; expected"),
        ("moe", 32, {"top_k": 0}, "top_k is 0; expected"),
    ],
)
def test_refuses_sizes_that_do_not_fit(name: str, dim: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYERS[name](dim, **options)
