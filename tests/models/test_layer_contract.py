"""What every layer promises at the edges: precision, empty inputs, gradients across cuts, one graph, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import relative_error
from torch import Tensor

from madkernels.models.layers import LAYERS, Layer, State

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


def test_counts(name: str) -> None:
    """What plans and tables ask of every layer."""
    layer = build(name)
    assert layer.flops(SEQLEN) > 0
    assert layer.state_size(SEQLEN) > 0 or layer.mixes == "channel"


@pytest.mark.parametrize("name", LAYERS)
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
        ("hyena", 32, {"turns": 0.0}, "turns is 0.0; expected a number above 0"),
        ("mh-hyena", 32, {"frequency": float("nan")}, "frequency is nan; expected a number above 0"),
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


def floats(state: State) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if t.is_floating_point()}


@pytest.mark.parametrize("seqlen", [0, 1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_a_state_is_replaced_and_never_written_over(name: str, seqlen: int, grad: bool) -> None:
    layer, x, state = build(name), sequence(), build(name).init_state(2)
    with torch.set_grad_enabled(grad):
        layer(x[:, :7], state=state)
        kept, values = dict(state), {key: t.clone() for key, t in state.items()}
        layer.step(x[:, 7], dict(kept))
        layer(x[:, 7 : 7 + seqlen], state=dict(kept))
    for key, value in values.items():
        assert torch.equal(kept[key], value), key


def test_gradients_of_steps_are_those_of_the_sequence(name: str) -> None:
    """In parameters, inputs and the state that was given."""
    layer, x = build(name), sequence().requires_grad_()
    given = layer.init_state(2)
    with torch.no_grad():
        layer(sequence(seqlen=4), state=given)
    leaves = {key: t.requires_grad_() for key, t in floats(given).items()}

    def steps(state: State) -> Tensor:
        return torch.stack([layer.step(x[:, t], state) for t in range(3)], 1)

    def sequence_of_three(state: State) -> Tensor:
        return layer(x[:, :3], state=state)

    found, wanted = [], []
    for function, gradients in ((steps, found), (sequence_of_three, wanted)):
        state = dict(given)
        y = function(state)
        loss = sum((t.sin().sum() for t in floats(state).values()), start=y.sin().sum())
        gradients += torch.autograd.grad(loss, [x, *leaves.values(), *layer.parameters()])
    for label, a, b in zip(["x", *leaves, *(n for n, _ in layer.named_parameters())], found, wanted, strict=True):
        assert relative_error(a, b) < 1e-11, label


def test_states_keep_their_precision_under_autocast(name: str) -> None:
    layer, x = build(name, torch.float32), sequence(dtype=torch.float32)
    state = layer.init_state(2)
    before = {key: t.dtype for key, t in state.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x[:, :5], state=state)
        assert {key: t.dtype for key, t in state.items()} == before
        layer.step(x[:, 5], state)
    assert {key: t.dtype for key, t in state.items()} == before


def test_nothing_is_lost_on_the_meta_device(name: str) -> None:
    layer, x = build(name, torch.float32), sequence(dtype=torch.float32)
    with torch.device("meta"):
        empty = LAYERS[name](DIM, **SMALL.get(name, {}))
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


def test_a_cast_rounds_parameters_alone(name: str) -> None:
    """What is derived from options is as exact after casts as where the layer was built in float64."""
    cast, x = build(name, torch.float32).to(torch.bfloat16).double(), sequence()
    torch.set_default_dtype(torch.float64)
    try:
        exact = build(name)
    finally:
        torch.set_default_dtype(torch.float32)
    exact.load_state_dict(cast.state_dict())
    assert torch.equal(exact(x), cast(x))


@pytest.mark.parametrize("documents", [1, 2])
def test_a_packed_row_of_no_tokens(name: str, documents: int) -> None:
    layer, x = build(name), sequence(batch=1, seqlen=0).requires_grad_()
    y = layer(x, cu_seqlens=offsets(*[0] * (documents + 1)))
    assert y.shape == (1, 0, DIM)
    gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True)
    assert not any(g.any() for g in gradients if g is not None)


@torch.no_grad()
def test_a_state_may_be_a_view(name: str) -> None:
    """As of one prompt that several continuations share, or of rows of a larger tensor in another order."""
    layer, x, state = build(name), sequence(), build(name).init_state(1)
    layer(x[:1, :7], state=state)
    shared = {key: t.expand(2, *t.shape[1:]) for key, t in state.items()}
    turned = {key: t if t.dim() < 2 else t.mT.contiguous().mT for key, t in shared.items()}
    wanted = layer(torch.cat([x[:1, :7].expand(2, -1, -1), x[:, 7:8]], 1))[:, 7]
    for given in (shared, turned):
        assert relative_error(layer.step(x[:, 7], given), wanted) < 1e-12


# ---- packed documents that leave a state each

DOCUMENTS = (7, 130, 1, 0, 65, 64, 2)  # chunks of recurrences are 16 and 64
VARIANTS = [
    *((name, {}) for name in LAYERS),
    ("hyena", {"taps": 6}),
    ("hyena", {"modal": True}),
    ("mh-hyena", {"taps": 200}),
    ("hyena-experts", {"sparse": True}),
    ("hyena-experts", {"sparse": True, "taps": 6}),
    ("sliding-attention", {"window": 90}),
    ("attention", {"heads": 6, "kv_heads": 2, "head_dim": 10, "bias": False, "rope_factor": 2.0, "original_length": 20}),
    ("sliding-attention", {"heads": 6, "kv_heads": 1, "head_dim": 10, "window": 90, "rope_theta": 100.0}),
    ("swiglu", {"bias": True}),
    ("mamba", {"rank": 3, "bias": True, "conv_bias": False, "projection_norm_eps": 1e-6}),
    ("mamba2", {"groups": 2, "D_per_channel": True, "delta_min": 0.01, "delta_max": 0.1, "norm_before_gate": True}),
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)


def trained(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Layer:
    """Away from its start, by as much as its weights are large."""
    torch.manual_seed(1)
    layer = LAYERS[name](DIM, **SMALL.get(name, {}) | options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * parameter.std(correction=0).clamp_min(0.2) * torch.randn_like(parameter))
        if options.get("modal"):
            layer.filter.log_poles[..., 0].clamp_(max=-0.01)  # whose sums stay finite
    return layer


def packed(layer: Layer, x: Tensor, lengths: tuple[int, ...]) -> tuple[list[Tensor], State]:
    """What comes out for each document of x (1, seqlen, dim), and the state of all."""
    state = layer.init_state(len(lengths))
    y = layer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), state=state)
    return list(y.split(lengths, 1)), state


def alone(layer: Layer, x: Tensor, lengths: tuple[int, ...]) -> tuple[list[Tensor], list[State]]:
    states = [layer.init_state(1) for _ in lengths]
    return [layer(part, state=state) for part, state in zip(x.split(lengths, 1), states, strict=True)], states


def in_use(row: Tensor) -> Tensor:
    """The state of one sequence, without room that it does not use."""
    return row[row.flatten(1).any(1)] if row.dim() > 1 else row


def agree(state: State, alone: list[State], tolerance: float) -> None:
    for key, values in state.items():
        for document, (row, other) in enumerate(zip(values, alone, strict=True)):
            assert row.dtype == other[key].dtype
            assert relative_error(in_use(row), in_use(other[key][0])) < tolerance, (key, document)


@every_variant
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lengths", [DOCUMENTS, (5, 5, 5), (0,), (0, 0)], ids=str)
def test_a_pack_leaves_the_state_of_each_document(
    name: str, options: dict[str, Any], grad: bool, lengths: tuple[int, ...]
) -> None:
    """From which all go on as one batch: five steps, and three tokens at once."""
    layer, x, later = trained(name, options), sequence(1, sum(lengths)), sequence(len(lengths), 8)
    with torch.set_grad_enabled(grad):
        (ys, state), (wanted, states) = packed(layer, x, lengths), alone(layer, x, lengths)
        agree(state, states, 1e-11)
        ys += [layer.step(later[:, t], state) for t in range(5)]
        wanted += [
            torch.cat([layer.step(row, s) for row, s in zip(later[:, t].split(1), states, strict=True)]) for t in range(5)
        ]
        agree(state, states, 1e-11)
        ys.append(layer(later[:, 5:], state=state))
        wanted.append(torch.cat([layer(row, state=s) for row, s in zip(later[:, 5:].split(1), states, strict=True)]))
        agree(state, states, 1e-11)
    for y, other in zip(ys, wanted, strict=True):
        assert relative_error(y, other) < 1e-11


@every_variant
def test_gradients_through_the_states_of_a_pack(name: str, options: dict[str, Any]) -> None:
    layer, x = trained(name, options), sequence(1, sum(DOCUMENTS)).requires_grad_()
    later, found = sequence(len(DOCUMENTS), 2), []
    ys, state = packed(layer, x, DOCUMENTS)
    ys += [layer.step(later[:, t], state).unsqueeze(1) for t in range(2)]
    others, states = alone(layer, x, DOCUMENTS)
    others += [layer(row, state=s) for row, s in zip(later.split(1), states, strict=True)]
    for outputs, kept in ((ys, [state]), (others, states)):
        values = [*outputs, *(t for s in kept for t in floats(s).values())]
        found.append(torch.autograd.grad(sum(t.sin().sum() for t in values), [x, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-10


@every_variant
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float32"])
@torch.no_grad()
def test_packs_in_lower_precision(name: str, options: dict[str, Any], kind: str) -> None:
    torch.manual_seed(1)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    layer = LAYERS[name](DIM, **SMALL.get(name, {}) | options).to(dtype)
    x, later = sequence(1, sum(DOCUMENTS), dtype), sequence(len(DOCUMENTS), 1, dtype)[:, 0]
    tolerance = 1e-5 if kind == "float32" else 0.03
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        (ys, state), (wanted, states) = packed(layer, x, DOCUMENTS), alone(layer, x, DOCUMENTS)
        ys.append(layer.step(later, state))
        wanted.append(torch.cat([layer.step(row, s) for row, s in zip(later.split(1), states, strict=True)]))
    agree(state, states, tolerance)
    assert {key: t.dtype for key, t in state.items()} == {key: t.dtype for key, t in layer.init_state(1).items()}
    for y, other in zip(ys, wanted, strict=True):
        assert y.dtype == other.dtype
        assert relative_error(y, other) < tolerance


@every_variant
@torch.no_grad()
def test_the_state_of_a_pack_is_continued_twice(name: str, options: dict[str, Any]) -> None:
    """And is written over by neither, until long after windows and room are full."""
    layer, x, later = trained(name, options), sequence(1, sum(DOCUMENTS)), sequence(len(DOCUMENTS), 100)
    _, state = packed(layer, x, DOCUMENTS)
    kept = dict(state)
    before = {key: t.clone() for key, t in kept.items()}
    one, other = (torch.stack([layer.step(later[:, t], path) for t in range(100)], 1) for path in (state, dict(kept)))
    assert torch.equal(one, other)
    assert all(torch.equal(kept[key], value) for key, value in before.items())
    documents = [torch.cat(parts, 1) for parts in zip(x.split(DOCUMENTS, 1), later.split(1), strict=True)]
    whole = torch.cat([layer(document)[:, -100:] for document in documents])
    assert relative_error(one, whole) < 1e-9
