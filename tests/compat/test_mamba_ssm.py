"""mamba_ssm's functions against its documented semantics, step by step in float64."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, relative_error
from torch import Tensor

from madkernels.compat import mamba_ssm as compat
from madkernels.compat.mamba_ssm import (
    LayerNorm,
    RMSNorm,
    layernorm_fn,
    mamba_chunk_scan_combined,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
    selective_scan_fn,
    selective_state_update,
)

SIGNATURES = {
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "mamba_inner_fn": "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D "
    "delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight "
    "b_c_dt_rms_eps",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit "
    "return_final_states return_varlen_states state_dtype",
    "mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states seq_idx "
    "dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim ngroups "
    "norm_before_gate state_dtype",
    "layernorm_fn": "x weight bias z eps group_size norm_before_gate is_rms_norm",
    "rmsnorm_fn": "x weight bias z eps group_size norm_before_gate",
    "LayerNorm": "hidden_size eps group_size norm_before_gate device dtype",
    "RMSNorm": "hidden_size eps group_size norm_before_gate device dtype",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_order_of_parameters(name: str) -> None:
    assert list(inspect.signature(getattr(compat, name)).parameters) == SIGNATURES[name].split()
    assert sorted(SIGNATURES) == sorted(compat.__all__)


def at_step(t: Tensor, step: int, dim: int) -> Tensor:
    """B or C of every channel at a step: (dim, dstate) or (batch, dim, dstate)."""
    if t.dim() == 2:
        return t
    now = t[..., step] if t.dim() == 4 else t[:, None, :, step]
    return now.repeat_interleave(dim // now.shape[1], 1)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the last state. Variable B and C of a complex A are complex here."""
    wide = torch.complex128 if A.is_complex() else torch.float64
    A, B, C = (t.to(wide) for t in (A, B, C))
    step = delta.double() if delta_bias is None else delta.double() + delta_bias.double()[:, None]
    step = F.softplus(step) if delta_softplus else step
    h, out = torch.zeros(u.shape[0], *A.shape, dtype=wide), []
    for t in range(u.shape[2]):
        now, given = step[:, :, t, None], u[:, :, t, None].double()
        h = torch.exp(now * A) * h + now * at_step(B, t, len(A)) * given
        seen = (at_step(C, t, len(A)) * h).sum(-1)
        out.append(2 * seen.real if A.is_complex() else seen)
    y = torch.stack(out, 2)
    y = y if D is None else y + D.double()[:, None] * u.double()
    y = y if z is None else y * F.silu(z.double())
    return y.to(u.dtype), h.to(torch.complex64 if A.is_complex() else torch.float32)


def draw_scan(
    seqlen: int, dstate: int = 8, groups: int | None = 1, dtype: torch.dtype = torch.float32, dim: int = 4
) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    shape = (2, dstate, seqlen) if groups is None else (2, groups, dstate, seqlen)
    rows = {name: torch.randn(2, dim, seqlen).to(dtype) for name in ("u", "delta", "z")}
    inputs: dict[str, Tensor | None] = {**rows, "A": -torch.rand(dim, dstate)}
    inputs |= {"B": torch.randn(shape).to(dtype), "C": torch.randn(shape).to(dtype)}
    return inputs | {"D": torch.randn(dim), "delta_bias": torch.rand(dim) - 4}


def scan_fn(**options: Any) -> Any:
    return selective_scan_fn(**options, return_last_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize(("seqlen", "dstate"), [(1, 16), (8, 64), (151, 8), (372, 16), (1134, 8)])
def test_scan_and_its_gradients(seqlen: int, dstate: int, groups: int | None, dtype: torch.dtype) -> None:
    check(scan_fn, scan, draw_scan(seqlen, dstate, groups, dtype), delta_softplus=True, slack=1e-6)


def test_what_may_be_left_out() -> None:
    inputs = draw_scan(30)
    bare = {name: inputs[name] for name in ("u", "delta", "A", "B", "C")}
    bare["delta"] = 0.5 * torch.rand(2, 4, 30)
    check(lambda **t: (selective_scan_fn(**t),), lambda **t: scan(**t)[:1], bare)


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
@pytest.mark.parametrize("groups", [None, 2])
def test_constant_projections(constant: str, groups: int | None) -> None:
    inputs = draw_scan(151, groups=groups)
    check(scan_fn, scan, inputs | {name: torch.randn(4, 8) for name in constant}, delta_softplus=True, slack=1e-6)


@pytest.mark.parametrize("wider", ["delta", "B", "C", "z", "A", "D"])
def test_dtypes_may_differ(wider: str) -> None:
    """Nothing is rounded on the way: the error is that of the output alone."""
    inputs = draw_scan(60, dtype=torch.bfloat16)
    value = torch.randn_like(inputs[wider], dtype=torch.float32)
    inputs[wider] = -value.abs().bfloat16() if wider == "A" else value.bfloat16() if wider == "D" else value
    check(scan_fn, scan, inputs, delta_softplus=True, slack=1e-6)


def in_turn(t: Tensor) -> Tensor:
    """Real and imaginary parts in turn along the last axis."""
    return torch.view_as_real(t).flatten(-2)


@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("seqlen", [1, 8, 372])
def test_complex_states(seqlen: int, groups: int | None, constant: str) -> None:
    inputs = draw_scan(seqlen, groups=groups) | {name: torch.randn(4, 8) for name in constant}
    for name in "ABC":
        inputs[f"{name}_imaginary"] = torch.randn_like(inputs[name]) * (3 if name == "A" else 1)

    def as_complex(options: dict[str, Any]) -> dict[str, Any]:
        return options | {name: torch.complex(options[name], options.pop(f"{name}_imaginary")) for name in "ABC"}

    def op(**options: Any) -> tuple[Tensor, Tensor]:
        options = as_complex(options)
        out, state = scan_fn(**options | {k: in_turn(options[k]) for k in "BC" if k not in constant})
        assert state.dtype == torch.complex64
        return out, torch.view_as_real(state)

    def told(**options: Any) -> tuple[Tensor, Tensor]:
        out, state = scan(**as_complex(options))
        return out, torch.view_as_real(state)

    check(op, told, inputs, delta_softplus=True, slack=1e-5)  # the rotation costs a digit


def test_autocast_is_ignored_and_layouts_kept() -> None:
    inputs = draw_scan(20)
    out, state = selective_scan_fn(**inputs, return_last_state=True)
    assert out.is_contiguous()

    def step() -> Tensor:
        return selective_state_update(**draw_update(4, (4, 8), 2, torch.float32, False))

    with torch.autocast("cpu", torch.bfloat16):
        again, state_again = selective_scan_fn(**inputs, return_last_state=True)
        chunks_again, steps_again = in_chunks(**draw_chunks(70, 2, torch.float32)), step()
    assert torch.equal(again, out)
    assert torch.equal(state_again, state)
    assert all(map(torch.equal, chunks_again, in_chunks(**draw_chunks(70, 2, torch.float32))))
    assert torch.equal(steps_again, step())


# ---- the layer ----

DIM, RANK, STATES = 6, 3, 4


def draw_layer(
    *, is_complex: bool = False, constant: str = "", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    states = STATES * (2 if is_complex else 1)
    projected = states * (2 - len(constant))
    inputs = {"xz": torch.randn(2, 2 * DIM, 40), "x_proj_weight": torch.randn(RANK + projected, DIM) / DIM**0.5}
    inputs |= {
        "delta_proj_weight": torch.randn(DIM, RANK),
        "out_proj_weight": torch.randn(5, DIM),
        "out_proj_bias": torch.randn(5),
    }
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    inputs |= {"conv1d_weight": torch.randn(DIM, 1, 3), "conv1d_bias": torch.randn(DIM), "D": torch.randn(DIM)}
    inputs |= {"delta_bias": torch.rand(DIM) - 3, "A": -torch.rand(DIM, STATES)}
    inputs |= {f"{name}_proj_bias": torch.randn(states) for name in "BC" if name not in constant}
    return {**inputs, **{name: torch.randn(DIM, STATES) for name in constant}}


def layer(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool = True,
    b_c_dt_rms_eps: float = 1e-6, **further: Any,
) -> Tensor:  # fmt: skip
    x, z = xz.double().chunk(2, 1)
    before = F.pad(x, (2, 0))
    taps = [conv1d_weight.double()[:, 0, tap, None] * before[:, :, tap : tap + x.shape[2]] for tap in range(3)]
    u = F.silu(sum(taps) + conv1d_bias.double()[:, None])
    projected = torch.einsum("bdl,pd->bpl", u, x_proj_weight.double())
    delta = torch.einsum("brl,dr->bdl", projected[:, :RANK], delta_proj_weight.double())

    def normed(t: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return t
        return t * torch.rsqrt(t.square().mean(1, keepdim=True) + b_c_dt_rms_eps) * weight.double()[:, None]

    states, matrices = A.shape[1] * (2 if A.is_complex() else 1), {}
    for name, part in (("B", projected[:, RANK : RANK + states]), ("C", projected[:, -states:])):
        matrices[name] = further.get(name)
        if matrices[name] is None:
            bias = further.get(f"{name}_proj_bias")
            part = part if bias is None else part + bias.double()[:, None]
            part = normed(part, further.get(f"{name.lower()}_rms_weight"))
            matrices[name] = torch.complex(part[:, ::2], part[:, 1::2]) if A.is_complex() else part
    delta = normed(delta, further.get("dt_rms_weight"))
    y, _ = scan(u, delta, A, **matrices, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return (torch.einsum("bdl,od->blo", y, out_proj_weight.double()) + out_proj_bias.double()).to(xz.dtype)


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
def test_layer_and_its_gradients(constant: str, checkpoint_lvl: int) -> None:
    def op(**options: Any) -> tuple[Tensor]:
        return (mamba_inner_fn(**options, checkpoint_lvl=checkpoint_lvl),)

    check(op, lambda **t: (layer(**t),), draw_layer(constant=constant), slack=1e-6)


def test_layer_with_norms_and_without_softplus() -> None:
    inputs = draw_layer() | {"b_rms_weight": torch.rand(STATES), "c_rms_weight": torch.rand(STATES)}
    inputs |= {"dt_rms_weight": 0.1 * torch.rand(DIM), "delta_bias": torch.rand(DIM)}
    options = {"delta_softplus": False, "b_c_dt_rms_eps": 1e-2}
    check(lambda **t: (mamba_inner_fn(**t),), lambda **t: (layer(**t),), inputs, slack=1e-6, **options)


@pytest.mark.parametrize("constant", ["", "BC"])
def test_layer_with_complex_states(constant: str) -> None:
    inputs = draw_layer(is_complex=True, constant=constant)
    for name in ("A", *constant):
        inputs[name] = torch.complex(inputs[name], torch.randn(DIM, STATES))
    assert relative_error(mamba_inner_fn(**inputs), layer(**inputs)) < 3e-6


def test_layer_under_autocast() -> None:
    """Its projections are cast, and the rest takes what comes."""
    inputs = draw_layer()
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**inputs)
    assert out.dtype == torch.bfloat16
    assert 1e-5 < relative_error(out, layer(**inputs)) < 3e-2


def test_autocast_leaves_the_convolution_and_the_scan_of_a_layer_alone() -> None:
    """Where no projection makes steps, B and C, and the last one changes nothing, its output is all that is rounded."""
    inputs = draw_layer(constant="BC") | {"delta_proj_weight": torch.zeros(DIM, RANK)}
    inputs |= {"out_proj_weight": torch.eye(DIM), "out_proj_bias": None}
    told = mamba_inner_fn(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mamba_inner_fn(**inputs), told.bfloat16())


# ---- decoding ----


def update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the state after, in float64."""
    state, x, dt, A, B, C = (t.double() for t in (state, x, dt, A, B, C))
    if B.dim() == 3:
        B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], 1) if state.dim() == 4 else t for t in (B, C))
    B, C = (t.unsqueeze(-2) if t.dim() < state.dim() else t for t in (B, C))
    step = dt if dt_bias is None else dt + dt_bias.double()
    step = (F.softplus(step) if dt_softplus else step).unsqueeze(-1)
    state = torch.exp(step * A) * state + step * B * x.unsqueeze(-1)
    out = (state * C).sum(-1)
    out = out if D is None else out + x * D.double()
    return out if z is None else out * F.silu(z.double()), state


def draw_update(
    entries: int, channels: tuple[int, ...], groups: int | None, dtype: torch.dtype, tied: bool
) -> dict[str, Any]:
    """tied: one step size and decay a head, as expanded views."""
    torch.manual_seed(0)
    batch, dstate, rows = 4, 16, channels[:-1] if tied else channels

    def each(*shape: int) -> Tensor:
        t = torch.randn(*shape, *rows)
        return t.unsqueeze(-1).expand(*t.shape, channels[-1]) if tied else t

    A = -torch.rand(*rows, *([] if tied else [dstate])) - 1
    A = A[..., None, None].expand(*channels, dstate) if tied else A
    shape = (batch, dstate) if groups is None else (batch, groups, dstate)
    inputs: dict[str, Any] = {"state": torch.randn(entries, *channels, dstate).to(dtype), "A": A, "D": each()}
    inputs |= {
        "x": torch.randn(batch, *channels).to(dtype),
        "dt": each(batch).to(dtype),
        "z": torch.randn(batch, *channels).to(dtype),
    }
    return inputs | {"B": torch.randn(shape), "C": torch.randn(shape), "dt_bias": each() - 4, "dt_softplus": True}


ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("indices", [None, [5, 0, 8, 3], [-1, 5, -1, 0], [-1] * 4])
@pytest.mark.parametrize("case", ["no heads", "one group", "groups, tied", "a group a head"])
def test_update(case: str, indices: list[int] | None, dtype: torch.dtype) -> None:
    channels, groups = {"no heads": ((24,), None), "one group": ((4, 8), 1), "groups, tied": ((4, 8), 2)}.get(
        case, ((4, 8), 4)
    )
    inputs = draw_update(4 if indices is None else 9, channels, groups, dtype, "tied" in case)
    rows = torch.tensor([row for row in range(4) if indices is None or indices[row] >= 0], dtype=torch.long)
    entries = torch.tensor([row if indices is None else indices[row] for row in rows], dtype=torch.long)
    before = inputs["state"].clone()
    batched = {"x", "dt", "B", "C", "z"}
    told, after = update(
        **{k: v[rows] if k in batched else before[entries] if k == "state" else v for k, v in inputs.items()}
    )
    where = None if indices is None else torch.tensor(indices, dtype=torch.int32)
    out = selective_state_update(**inputs, state_batch_indices=where)
    assert (out.shape, out.dtype) == (inputs["x"].shape, dtype)
    assert relative_error(out[rows], told) < ROUNDING[dtype]
    assert relative_error(inputs["state"][entries], after) < ROUNDING[dtype]
    others = torch.ones(len(before), dtype=torch.bool).index_fill(0, entries, False)
    assert torch.equal(inputs["state"][others], before[others])
    padding = torch.ones(4, dtype=torch.bool).index_fill(0, rows, False)
    assert not out[padding].any()


def test_update_of_a_strided_state_and_of_the_bare_arguments() -> None:
    inputs = draw_update(4, (4, 8), 2, torch.float32, False)
    told, after = update(**inputs | {"D": None, "z": None, "dt_bias": None, "dt_softplus": False})
    wide = torch.zeros(4, 4, 16, 8)
    state = wide.transpose(2, 3).copy_(inputs["state"])
    out = selective_state_update(state, *(inputs[name] for name in ("x", "dt", "A", "B", "C")))
    assert relative_error(out, told) < 1e-6
    assert relative_error(wide.transpose(2, 3), after) < 1e-6


def test_update_goes_on_where_the_scan_ended() -> None:
    inputs = draw_scan(12, groups=2)
    whole = selective_scan_fn(**inputs, delta_softplus=True)
    along = ("u", "delta", "B", "C", "z")
    part = inputs | {name: inputs[name][..., :7] for name in along}
    _, state = selective_scan_fn(**part, delta_softplus=True, return_last_state=True)
    state = state.view(2, 2, 2, 8)  # two heads of two channels
    for t in range(7, 12):
        u, delta, B, C, z = (inputs[name][..., t] for name in along)
        headed = [v.view(2, 2, 2) for v in (u, delta, z)]
        A, D, bias = inputs["A"].view(2, 2, 8), inputs["D"].view(2, 2), inputs["delta_bias"].view(2, 2)
        out = selective_state_update(state, headed[0], headed[1], A, B, C, D, headed[2], bias, True)
        torch.testing.assert_close(out.flatten(1), whole[:, :, t])


# ---- Mamba-2 ----


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, initial_states: Tensor | None = None, *, seq_idx: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, seqlen, heads, headdim = x.shape
    B, C = (t.double().repeat_interleave(heads // t.shape[2], 2).unsqueeze(3) for t in (B, C))
    step = dt.double() if dt_bias is None else dt.double() + dt_bias.double()
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)[..., None, None]
    zeros = torch.zeros(batch, heads, headdim, B.shape[-1], dtype=torch.float64)
    h, out = zeros if initial_states is None else initial_states.double(), []
    for t in range(seqlen):
        if seq_idx is not None and t:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        h = torch.exp(step[:, t] * A.double()[:, None, None]) * h + step[:, t] * B[:, t] * x[:, t].double().unsqueeze(-1)
        out.append((h * C[:, t]).sum(-1))
    y = torch.stack(out, 1)
    y = y if D is None else y + x.double() * (D.double() if D.dim() == 2 else D.double()[:, None])
    y = y if z is None else y * F.silu(z.double())
    return y.to(x.dtype), h.float()


def draw_chunks(seqlen: int, groups: int, dtype: torch.dtype, batch: int = 2) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    inputs: dict[str, Tensor | None] = {"A": -torch.rand(4) - 0.5, "dt_bias": torch.randn(4) - 2, "D": torch.randn(4, 6)}
    inputs |= {"x": torch.randn(batch, seqlen, 4, 6).to(dtype), "z": torch.randn(batch, seqlen, 4, 6).to(dtype)}
    inputs |= {name: torch.randn(batch, seqlen, groups, 8).to(dtype) for name in "BC"}
    return inputs | {"dt": torch.randn(batch, seqlen, 4).to(dtype)}


def in_chunks(**options: Any) -> Any:
    return mamba_chunk_scan_combined(**options, chunk_size=32, return_final_states=True)


# By the dtype of x: a CPU may multiply pairs of bfloat16, to which states and scores are rounded before, as in the package.
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seqlen", [1, 8, 151])
def test_chunks_and_their_gradients(seqlen: int, groups: int, dtype: torch.dtype) -> None:
    inputs = draw_chunks(seqlen, groups, dtype)
    check(in_chunks, chunk_scan, inputs, dt_softplus=True, slack=SLACK[dtype])
    inputs |= {"initial_states": torch.randn(2, 4, 6, 8), "D": torch.randn(4)}
    check(in_chunks, chunk_scan, inputs, dt_softplus=True, dt_limit=(0.05, 0.2), slack=SLACK[dtype])


def test_step_sizes_below_zero_are_zero() -> None:
    inputs = draw_chunks(20, 1, torch.float32)
    bare = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    check(lambda **t: (mamba_chunk_scan_combined(**t, chunk_size=8),), lambda **t: chunk_scan(**t)[:1], bare, slack=1e-6)


@pytest.mark.parametrize("continued", [False, True])
def test_chunks_of_several_sequences(continued: bool) -> None:
    inputs = draw_chunks(150, 2, torch.float32)
    seq_idx = torch.stack([torch.arange(150) // 40, torch.arange(150) // 149]).int()
    if continued:
        inputs["initial_states"] = torch.randn(2, 4, 6, 8)
    check(in_chunks, chunk_scan, inputs, dt_softplus=True, seq_idx=seq_idx, slack=1e-6)


@pytest.mark.parametrize("offsets", [[0, 3, 70, 70, 130, 150], [0, 0, 100, 140]])
def test_states_of_packed_sequences(offsets: list[int]) -> None:
    """The last may end before the row does."""
    inputs, cu_seqlens = draw_chunks(150, 2, torch.float32, batch=1), torch.tensor(offsets, dtype=torch.int32)
    seq_idx = torch.bucketize(torch.arange(150), cu_seqlens[1:], right=True)[None].int()
    asked: dict[str, Any] = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "dt_softplus": True, "return_varlen_states": True}
    out, final, states = mamba_chunk_scan_combined(**inputs, chunk_size=64, return_final_states=True, **asked)
    again = mamba_chunk_scan_combined(**inputs, chunk_size=64, **asked)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], states)
    told, final_told = chunk_scan(**inputs, seq_idx=seq_idx, dt_softplus=True)
    assert relative_error(out, told) < 1e-6
    assert relative_error(final, final_told) < 1e-6
    for i, (start, end) in enumerate(pairwise(offsets)):
        part = {k: v[:, start:end] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        state = torch.zeros_like(states[i]) if start == end else chunk_scan(**part, dt_softplus=True)[1][0]
        assert relative_error(states[i], state) < 1e-6


def chunk_by_chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None, *, chunk_size: int,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As mamba_ssm cuts a row into chunks: within one, positions of one number see each other; a border passes on the state
    of the last number before it, which is 0 before the row. And states of packed sequences. Pair by pair."""
    batch, seqlen, heads, headdim = x.shape
    dtype, numbers = x.dtype, torch.zeros(batch, seqlen) if seq_idx is None else seq_idx
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    step = F.softplus(dt)
    written = torch.einsum("blhp,blhn->blhpn", step.unsqueeze(-1) * x, B)
    border = torch.zeros(batch, heads, headdim, B.shape[3], dtype=dtype) if initial_states is None else initial_states
    last, out, borders, sums = numbers.new_zeros(batch), [], [], []

    def seen(begin: int, at: int, number: Tensor) -> Tensor:
        """The state that positions of this number see, in the chunk that begins there."""
        h = sums[at].exp()[..., None, None] * border * (number == last)[:, None, None, None]
        for before in range(begin, at + 1):
            same = (numbers[:, before] == number)[:, None, None, None]
            h = h + (sums[at] - sums[before]).exp()[..., None, None] * written[:, before] * same
        return h

    for begin in range(0, seqlen, chunk_size):
        end = min(begin + chunk_size, seqlen)
        sums += (step[:, begin:end] * A).cumsum(1).unbind(1)
        borders.append(border)
        for at in range(begin, end):
            out.append(torch.einsum("bhpn,bhn->bhp", seen(begin, at, numbers[:, at]), C[:, at]))
        border, last = seen(begin, end - 1, numbers[:, end - 1]), numbers[:, end - 1]
    found = [torch.stack(out, 1), border]
    if cu_seqlens is not None:
        states = []
        for begin, end in pairwise(cu_seqlens.tolist()):
            chunk = max(end - 1, 0) // chunk_size
            h = torch.zeros_like(border[0])
            if begin < chunk * chunk_size:
                h = sums[end - 1][0].exp()[..., None, None] * borders[chunk][0]
            for at in range(max(begin, chunk * chunk_size), end):
                h = h + (sums[end - 1] - sums[at])[0].exp()[..., None, None] * written[0, at]
            states.append(h)
        found.append(torch.stack(states))
    return tuple(found)


BACK = [0] * 5 + [1] * 6 + [0] * 2 + [2] * 9 + [1] + [2] * 3 + [0] * 12 + [3] + [0]  # 40 positions


@pytest.mark.parametrize("chunk_size", [1, 8, 16, 64])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("continued", [False, True])
def test_numbers_that_come_back(continued: bool, first: int, chunk_size: int) -> None:
    """first: what the package takes for the sequence before the row is 0, so that initial states may be of none."""
    drawn = draw_chunks(40, 2, torch.float32)
    inputs = {name: drawn[name] for name in ("x", "dt", "A", "B", "C")}
    if continued:
        inputs["initial_states"] = torch.randn(2, 4, 6, 8)
    back = torch.tensor(BACK)
    seq_idx = torch.stack([(back + first) % 4, torch.arange(40) // 15 + first]).int()
    options = {"seq_idx": seq_idx, "chunk_size": chunk_size}

    def op(**given: Any) -> Any:
        return mamba_chunk_scan_combined(**given, dt_softplus=True, return_final_states=True)

    check(op, chunk_by_chunk, inputs, **options, slack=1e-6)


@pytest.mark.parametrize("chunk_size", [8, 16, 64])
@pytest.mark.parametrize("numbers", [None, "in order", "coming back", "not from 0"])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("offsets", [[0, 5, 11, 13, 22, 23, 26, 38, 39, 40], [0, 5, 5, 40], [0, 40]])
def test_states_of_packed_sequences_that_something_enters(
    offsets: list[int], continued: bool, numbers: str | None, chunk_size: int
) -> None:
    drawn = draw_chunks(40, 2, torch.float32, batch=1)
    inputs = {name: drawn[name] for name in ("x", "dt", "A", "B", "C")}
    if continued:
        inputs["initial_states"] = torch.randn(1, 4, 6, 8)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    order = torch.bucketize(torch.arange(40), cu_seqlens[1:], right=True)
    run = (order[1:] != order[:-1]).cumsum(0)
    back = torch.tensor([0, 1, 0, 2, 1, 2, 0, 3, 0])[F.pad(run, (1, 0))]
    seq_idx = {"in order": order, "coming back": back, "not from 0": order + 1}.get(numbers or "")
    options = {"seq_idx": None if seq_idx is None else seq_idx[None].int(), "cu_seqlens": cu_seqlens}

    def op(**given: Any) -> Any:
        asked = {"dt_softplus": True, "return_final_states": True, "return_varlen_states": True}
        return mamba_chunk_scan_combined(**given, **asked)

    check(op, chunk_by_chunk, inputs, **options, chunk_size=chunk_size, slack=1e-6)


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_states(state_dtype: torch.dtype | None) -> None:
    """Those of packed sequences have the dtype that is asked for, or that of C; nothing else is rounded to it."""
    inputs, cu_seqlens = draw_chunks(40, 2, torch.bfloat16, batch=1), torch.tensor([0, 11, 40], dtype=torch.int32)
    seq_idx = (torch.arange(40) >= 11).int()[None]
    asked: dict[str, Any] = {"chunk_size": 8, "seq_idx": seq_idx, "dt_softplus": True, "return_final_states": True}
    asked |= {"cu_seqlens": cu_seqlens, "return_varlen_states": True}
    out, final, states = mamba_chunk_scan_combined(**inputs, **asked, state_dtype=state_dtype)
    told = mamba_chunk_scan_combined(**inputs, **asked, state_dtype=torch.float32)
    assert torch.equal(out, told[0])
    assert torch.equal(final, told[1])
    assert final.dtype == torch.float32
    assert torch.equal(states, told[2].to(state_dtype or torch.bfloat16))
    assert states.dtype == (state_dtype or torch.bfloat16)


# ---- norms with a gate, and the layer of Mamba-2 ----


def gated_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, z: Tensor | None = None, *, eps: float = 1e-6,
    group_size: int | None = None, norm_before_gate: bool = True, is_rms_norm: bool = False,
) -> Tensor:  # fmt: skip
    """In float32 at least, group by group."""
    wide = torch.promote_types(x.dtype, torch.float32)
    given, gate = x.to(wide), 1 if z is None else z.to(wide) * torch.sigmoid(z.to(wide))
    given = given if norm_before_gate else given * gate
    parts = []
    for group in given.split(group_size or x.shape[-1], -1):
        centred = group if is_rms_norm else group - group.mean(-1, keepdim=True)
        parts.append(centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps))
    y = torch.cat(parts, -1) * weight.to(wide) + (0 if bias is None else bias.to(wide))
    return (y * gate if norm_before_gate else y).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("given", ["z bias", "bias", "z", ""])
def test_gated_norms_and_their_gradients(
    given: str, group_size: int | None, norm_before_gate: bool, is_rms_norm: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    inputs: dict[str, Tensor | None] = {"x": torch.randn(3, 5, 24).to(dtype) + 1, "weight": torch.randn(24), "bias": None}
    if "bias" in given:
        inputs["bias"] = torch.randn(24)
    if "z" in given:
        inputs["z"] = torch.randn(24, 5, 3).to(dtype).transpose(0, 2)
    options: dict[str, Any] = {"eps": 1e-3, "group_size": group_size, "norm_before_gate": norm_before_gate}
    named = rmsnorm_fn if is_rms_norm else layernorm_fn

    def told(**given: Any) -> tuple[Tensor]:
        return (gated_norm(**given, is_rms_norm=is_rms_norm),)

    check(lambda **t: (named(**t),), told, inputs, **options, slack=1e-6)
    check(lambda **t: (layernorm_fn(**t, is_rms_norm=is_rms_norm),), told, inputs, **options, slack=1e-6)


@pytest.mark.parametrize(("kind", "names"), [(LayerNorm, ["weight", "bias"]), (RMSNorm, ["weight"])])
def test_norms_as_modules(kind: Any, names: list[str]) -> None:
    norm = kind(24, group_size=8, norm_before_gate=False, dtype=torch.bfloat16)
    assert list(norm.state_dict()) == names
    assert norm.bias is None or not norm.bias.any()
    torch.nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    options: dict[str, Any] = {"eps": 1e-5, "group_size": 8, "is_rms_norm": kind is RMSNorm}
    for gate in (None, z):
        told = gated_norm(x, norm.weight, norm.bias, gate, norm_before_gate=False, **options)
        assert relative_error(norm(x, gate), told) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(x, gate), norm(x, z=gate))
            assert norm(x, gate).dtype == torch.float32


HEADS, HEADDIM, DSTATE = 4, 6, 5


def draw_split(groups: int, dtype: torch.dtype, of_mlp: int = 0) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    dim, channels = HEADS * HEADDIM, HEADS * HEADDIM + 2 * groups * DSTATE
    inputs: dict[str, Tensor | None] = {"zxbcdt": torch.randn(2, 70, 2 * of_mlp + dim + channels + HEADS).to(dtype)}
    inputs |= {"conv1d_weight": torch.randn(channels, 4), "conv1d_bias": torch.randn(channels)}
    return inputs | {"dt_bias": torch.randn(HEADS) - 2, "A": -torch.rand(HEADS) - 0.5, "D": torch.randn(HEADS, HEADDIM)}


def split_layer(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    initial_states: Tensor | None = None, rmsnorm_weight: Tensor | None = None, outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None, *, groups: int, seq_idx: Tensor | None = None, activation: str | None = "silu",
    dt_limit: tuple[float, float] = (0.0, float("inf")), rmsnorm_eps: float = 1e-6, norm_before_gate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, dim, channels = zxbcdt.dtype, HEADS * HEADDIM, conv1d_weight.shape[0]
    of_mlp = (zxbcdt.shape[2] - dim - channels - HEADS) // 2
    mlp, z, xBC, dt = zxbcdt.split([2 * of_mlp, dim, channels, HEADS], -1)
    wide = torch.promote_types(dtype, torch.float32)
    before = F.pad(xBC.to(wide), (0, 0, 3, 0))
    numbers = torch.zeros(xBC.shape[:2]) if seq_idx is None else seq_idx
    padded = F.pad(numbers, (3, 0), value=-1)
    xBC = torch.zeros_like(before[:, 3:]) + (0 if conv1d_bias is None else conv1d_bias)
    for tap in range(4):
        same = (padded[:, tap : tap + 70] == numbers).unsqueeze(2)
        xBC = xBC + before[:, tap : tap + 70] * conv1d_weight[:, tap] * same
    xBC = (xBC if activation is None else F.silu(xBC)).to(dtype)
    x, B, C = xBC.split([dim, groups * DSTATE, groups * DSTATE], -1)
    x, gate = (t.unflatten(2, (HEADS, HEADDIM)) for t in (x, z))
    B, C = (t.unflatten(2, (groups, DSTATE)) for t in (B, C))
    options: dict[str, Any] = {"seq_idx": seq_idx, "dt_softplus": True, "dt_limit": dt_limit}
    gate = gate if rmsnorm_weight is None else None
    out, states = chunk_scan(x, dt, A, B, C, D, gate, dt_bias, initial_states, **options)
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        norm = {"eps": rmsnorm_eps, "group_size": dim // groups, "norm_before_gate": norm_before_gate, "is_rms_norm": True}
        out = gated_norm(out, rmsnorm_weight, None, z, **norm)  # type: ignore[arg-type]
    opened, values = mlp.to(wide).chunk(2, -1)
    out = torch.cat([(F.silu(opened) * values).to(dtype), out], -1)
    return out if outproj_weight is None else F.linear(out, outproj_weight, outproj_bias), states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["bare", "sequences", "norm", "norm behind the gate", "projection", "all, with an MLP", "no activation"]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_split_layer_and_its_gradients(groups: int, case: str, dtype: torch.dtype) -> None:
    of_mlp = 3 if "MLP" in case else 0
    inputs, options = draw_split(groups, dtype, of_mlp), {}
    if case == "bare":
        inputs["conv1d_bias"] = None
    if case in ("sequences", "all, with an MLP"):
        options["seq_idx"] = (torch.arange(70) // torch.tensor([[25], [50]])).int()
        inputs["initial_states"] = torch.randn(2, HEADS, HEADDIM, DSTATE)
        options["dt_limit"] = (0.05, 0.3)
    if case.startswith(("norm", "all")):
        inputs["rmsnorm_weight"] = torch.randn(HEADS * HEADDIM)
        options |= {"norm_before_gate": case == "norm", "rmsnorm_eps": 1e-3}
    if case.startswith(("projection", "all")):
        inputs["outproj_weight"] = torch.randn(5, HEADS * HEADDIM + of_mlp).to(dtype) / 5
        inputs["outproj_bias"] = torch.randn(5).to(dtype)
    if case == "no activation":
        options["activation"] = None

    def op(**given: Any) -> Any:
        return mamba_split_conv1d_scan_combined(**given, ngroups=groups, chunk_size=32, return_final_states=True)

    check(op, lambda **t: split_layer(**t, groups=groups), inputs, **options, slack=SLACK[dtype])


def test_split_layer_compiled_in_one_graph() -> None:
    inputs = draw_split(2, torch.bfloat16, 3) | {"rmsnorm_weight": torch.randn(HEADS * HEADDIM)}
    options: dict[str, Any] = {"chunk_size": 32, "ngroups": 2, "return_final_states": True}
    compiled = torch.compile(mamba_split_conv1d_scan_combined, backend="aot_eager", fullgraph=True)
    told = mamba_split_conv1d_scan_combined(**inputs, **options)
    assert all(map(torch.equal, compiled(**inputs, **options), told))


def test_split_layer_with_one_skip_a_head_and_under_autocast() -> None:
    inputs = draw_split(2, torch.float32) | {"outproj_weight": torch.randn(5, HEADS * HEADDIM) / 5}
    told, _ = split_layer(**inputs | {"D": inputs["D"][:, :1].expand(-1, HEADDIM)}, groups=2)
    options: dict[str, Any] = {"chunk_size": 32, "headdim": HEADDIM, "ngroups": 2}
    inputs["D"] = inputs["D"][:, 0]
    out = mamba_split_conv1d_scan_combined(**inputs, **options)
    assert relative_error(out, told) < 3e-6
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mamba_split_conv1d_scan_combined(**inputs, **options)
    assert rounded.dtype == torch.bfloat16
    assert 1e-5 < relative_error(rounded, told) < 1e-2, "the last projection alone is cast"


def test_tensors_without_memory() -> None:
    """Shapes and dtypes are found without numbers."""

    def bare(inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def alike(found: Any, told: Any) -> None:
        for f, t in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, told)), strict=True):
            assert (f.shape, f.dtype, f.device.type) == (t.shape, t.dtype, "meta")

    scans = draw_scan(9, dtype=torch.bfloat16)
    alike(scan_fn(**bare(scans)), scan_fn(**scans))
    turning = scans | {"A": torch.complex(scans["A"], scans["A"]), "B": torch.randn(2, 8, 18), "C": torch.randn(2, 8, 18)}
    alike(scan_fn(**bare(turning)), scan_fn(**turning))
    layers = draw_layer(dtype=torch.bfloat16)
    alike(mamba_inner_fn(**bare(layers)), mamba_inner_fn(**layers))
    steps = draw_update(4, (4, 8), 2, torch.bfloat16, False)
    alike(selective_state_update(**bare(steps)), selective_state_update(**steps))
    chunks = draw_chunks(9, 2, torch.bfloat16)
    alike(in_chunks(**bare(chunks)), in_chunks(**chunks))
    layers = draw_split(2, torch.bfloat16, 3) | {"ngroups": 2, "chunk_size": 8, "rmsnorm_weight": torch.randn(24)}
    alike(mamba_split_conv1d_scan_combined(**bare(layers)), mamba_split_conv1d_scan_combined(**layers))


# ---- what is refused ----

_scan, _layer, _chunks = draw_scan(6, dim=4), draw_layer(), draw_chunks(6, 2, torch.float32)
_step = draw_update(4, (4, 8), 2, torch.float32, False)
_split = draw_split(2, torch.float32) | {"ngroups": 2}
_normed = {"x": torch.randn(2, 24), "weight": torch.randn(24), "bias": None}
_complex = torch.complex(_scan["A"], _scan["A"])
REFUSED: list[tuple[Any, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (selective_scan_fn, _scan, {"B": torch.randn(2, 8, 5)}, RuntimeError, r"B has shape \(2, 1, 8, 5\)"),
    (selective_scan_fn, _scan, {"C": _complex}, RuntimeError, "C has dtype torch.complex64"),
    (selective_scan_fn, _scan, {"A": _complex, "B": torch.randn(4, 8)}, RuntimeError, "B has dtype torch.float32"),
    (selective_scan_fn, _scan, {"A": _complex}, RuntimeError, r"expected \(2, groups, 8, 12\)"),
    (selective_scan_fn, _scan, {"z": torch.randn(2, 6, 4)}, RuntimeError, r"z has shape .* expected \(2, 4, 6\)"),
    (selective_scan_fn, _scan, {"B": torch.randn(2, 3, 8, 6)}, RuntimeError, "3 groups; expected a divisor of dim, 4"),
    (selective_scan_fn, _scan, {"u": _scan["u"].int()}, RuntimeError, "int32"),
    (mamba_inner_fn, _layer, {"checkpoint_lvl": 2}, AssertionError, "checkpoint_lvl is 2"),
    (mamba_inner_fn, _layer, {"B": _layer["A"], "b_rms_weight": torch.rand(4)}, ValueError, "b_rms_weight"),
    (selective_state_update, _step, {"B": torch.randn(4, 3, 16), "C": torch.randn(4, 3, 16)}, AssertionError, "3 groups"),
    (selective_state_update, _step, {"A": torch.complex(_step["A"], _step["A"])}, RuntimeError, "complex64"),
    (selective_state_update, _step, {"dt": torch.randn(4, 4)}, RuntimeError, r"dt has shape \(4, 4\)"),
    (selective_state_update, _step, {"state_batch_indices": torch.tensor([0, 1, 2, 4])}, IndexError, "4"),
    (mamba_chunk_scan_combined, _chunks, {"return_varlen_states": True}, AssertionError, "cu_seqlens must be given"),
    (mamba_chunk_scan_combined, _chunks, {"state_dtype": torch.int32}, RuntimeError, "state_dtype is torch.int32"),
    (mamba_chunk_scan_combined, _chunks, {"dt": torch.randn(2, 6, 3)}, RuntimeError, "dt has shape"),
    (mamba_split_conv1d_scan_combined, _split, {"activation": "gelu"}, AssertionError, "activation is 'gelu'"),
    (mamba_split_conv1d_scan_combined, _split, {"D": torch.randn(4)}, AssertionError, "headdim must be given"),
    (mamba_split_conv1d_scan_combined, _split, {"ngroups": 3}, AssertionError, "4 heads do not divide into 3"),
    (mamba_split_conv1d_scan_combined, _split, {"outproj_bias": torch.randn(5)}, AssertionError, "without outproj_weight"),
    (mamba_split_conv1d_scan_combined, _split, {"zxbcdt": torch.randn(2, 70, 73)}, RuntimeError, "zxbcdt has 73 channels"),
    (rmsnorm_fn, _normed, {"group_size": 5}, AssertionError, "group_size is 5; expected a divisor of 24"),
    (layernorm_fn, _normed, {"z": torch.randn(2, 12)}, RuntimeError, r"z has shape \(2, 12\); expected \(2, 24\)"),
    (layernorm_fn, _normed, {"weight": torch.randn(6)}, RuntimeError, r"weight has shape \(6,\)"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_is_refused_is_named(case: int) -> None:
    function, inputs, changed, kind, message = REFUSED[case]
    chunked = {"chunk_size": 8} if "chunk_size" in inspect.signature(function).parameters else {}
    with pytest.raises(kind, match=message):
        function(**inputs | changed | chunked)


def test_packed_states_ask_for_the_same_sequences() -> None:
    inputs, cu_seqlens = draw_chunks(6, 2, torch.float32, batch=1), torch.tensor([0, 2, 6])
    options: dict[str, Any] = {"chunk_size": 8, "cu_seqlens": cu_seqlens, "return_varlen_states": True}
    with pytest.raises(ValueError, match="tell different sequences"):
        mamba_chunk_scan_combined(**inputs, **options, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    with pytest.raises(AssertionError, match="takes batch 1; got 2"):
        mamba_chunk_scan_combined(**draw_chunks(6, 2, torch.float32), **options)
