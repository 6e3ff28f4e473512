"""The functions of the package mamba_ssm, under its names and with its arguments, on :func:`madkernels.selective_scan`.

    from madkernels.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn, selective_state_update
    from madkernels.compat.mamba_ssm import mamba_chunk_scan_combined

They run wherever the op does. Tensors whose dtypes differ are taken to the widest of them, so none is rounded, and the
output is rounded once, to the dtype of its input; arithmetic and states are in float32 at least. As in the package, autocast
casts nothing here but in the projections of :func:`mamba_inner_fn`.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import selective_scan, selective_scan_step
from madkernels.compat.causal_conv1d import causal_conv1d_fn
from madkernels.compat.shapes import check_shape
from madkernels.models.layers.recurrence import linear_recurrence

__all__ = ["mamba_chunk_scan_combined", "mamba_inner_fn", "selective_scan_fn", "selective_state_update"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan, in the layout with time last.

    Args:
        u: (batch, dim, seqlen); likewise `delta` and `z`. Read in place where their dtypes agree.
        A: (dim, dstate), real or complex.
        B: (batch, dstate, seqlen) or (batch, groups, dstate, seqlen); with complex `A` twice as long, real and imaginary
            parts in turn. Or constant, (dim, dstate), complex if `A` is.
        C: like `B`, on its own.
        D: (dim,); likewise `delta_bias`.
        delta_softplus: whether softplus is applied to the biased `delta`.
        return_last_state: whether to return the state after the last step too.

    Returns:
        out (batch, dim, seqlen), dtype of `u`; with `return_last_state` also the state, (batch, dim, dstate), in float32 at
        least, complex if `A` is. It has its gradient here; the package drops it.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.

    A constant B or C has a gradient that is summed over batch and seqlen from one of batch * seqlen * dim * dstate values,
    as if each step had its own. With complex A the op runs on real states, from which the rotation is taken out beforehand:
    it needs tensors of batch * seqlen * dim * 2 dstate values, several of them, and loses about a digit.
    """
    check_shape("u", u, "batch", "dim", "seqlen")
    batch, dim, seqlen = u.shape
    check_shape("delta", delta, batch, dim, seqlen)
    check_shape("z", z, batch, dim, seqlen)
    check_shape("A", A, dim, "dstate")
    check_shape("D", D, dim)
    check_shape("delta_bias", delta_bias, dim)
    B, C = _steps_first("B", B, A, u), _steps_first("C", C, A, u)
    if B.shape[2] != C.shape[2]:
        B, C = _for_each_channel(B, dim), _for_each_channel(C, dim)
    gate = None if z is None else z.transpose(1, 2)
    scan = _complex_scan if A.is_complex() else _real_scan
    with torch.autocast(u.device.type, enabled=False):
        out, state = scan(u.transpose(1, 2), delta.transpose(1, 2), gate, A, B, C, D, delta_bias, bool(delta_softplus))
    out = out.transpose(1, 2).to(u.dtype)
    return (out, state) if return_last_state else out


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba layer after its first projection: short convolution with SiLU, projections to delta, B and C, selective scan,
    gate, last projection. Composed of the ops.

    Args:
        xz: (batch, 2 dim, seqlen): what is mixed, then the gate.
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim,).
        x_proj_weight: (delta_rank + states of B + states of C, dim): one after another; none for a constant B or C. With
            complex `A` there are 2 dstate states, real and imaginary part in turn.
        delta_proj_weight: (dim, delta_rank).
        out_proj_weight: (out_dim, dim).
        out_proj_bias: (out_dim,).
        A, D, delta_bias, delta_softplus: as of :func:`selective_scan_fn`.
        B, C: constant, (dim, dstate). None: projected.
        B_proj_bias, C_proj_bias: added to what is projected, (states,).
        checkpoint_lvl: 0 or 1. The package computes the convolution and delta again in the backward at 1, to save memory.
            Here
            both are kept at either: :mod:`torch.utils.checkpoint` around the layer is what saves memory.
        b_rms_weight, c_rms_weight: of an RMS norm of projected B and C, (dstate,).
        dt_rms_weight: of one of delta, before its bias, (dim,).
        b_c_dt_rms_eps: of these.

    Returns:
        (batch, seqlen, out_dim).

    Raises:
        AssertionError: another `checkpoint_lvl`.
        ValueError: `b_rms_weight` or `c_rms_weight` where B or C is constant, or `A` complex.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    if checkpoint_lvl not in (0, 1):
        raise AssertionError(f"checkpoint_lvl is {checkpoint_lvl}; it takes 0 or 1")
    check_shape("xz", xz, "batch", 2 * A.shape[0], "seqlen")
    check_shape("conv1d_weight", conv1d_weight, A.shape[0], 1, "width")
    mixed, z = xz.chunk(2, dim=1)
    u = causal_conv1d_fn(mixed, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    assert isinstance(u, Tensor)
    projected = F.linear(u.transpose(1, 2), x_proj_weight)  # (batch, seqlen, delta_rank and states)
    states = A.shape[1] * (2 if A.is_complex() else 1)
    rank = delta_proj_weight.shape[1]
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    of_B, of_C = projected[..., rank : rank + states], projected[..., projected.shape[2] - states :]
    B = _projected("b_rms_weight", B, of_B, A, B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    C = _projected("c_rms_weight", C, of_C, A, C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    out = selective_scan_fn(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(out, Tensor)
    return F.linear(out.transpose(1, 2), out_proj_weight, out_proj_bias)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the selective scan, for decoding. Updates `state` in place; not differentiable.

    Args:
        state: (batch, dim, dstate), or with heads (batch, heads, dim, dstate); with `state_batch_indices` entries in the
            place of batch. Of any dtype: one in half precision is rounded as it is written, after the output is made from
            it. In float32 and contiguous it is updated where it lies, else by way of a copy.
        x: (batch, dim) or (batch, heads, dim); likewise `dt` and `z`.
        A: (dim, dstate) or (heads, dim, dstate).
        B: (batch, dstate) or (batch, groups, dstate), where groups divides heads; likewise `C`.
        D: (dim,) or (heads, dim); likewise `dt_bias`.
        dt_softplus: whether softplus is applied to the biased `dt`.
        state_batch_indices: the entry of `state` that each sequence has, (batch,); negative for padding, whose output is 0.
            No entry may be there twice.

    Returns:
        out, shape and dtype of `x`.

    Raises:
        AssertionError: groups do not divide heads.
        IndexError: an index beyond the entries.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    if state_batch_indices is not None:
        check_shape("state_batch_indices", state_batch_indices, x.shape[0])
        kept = (state_batch_indices >= 0).nonzero().squeeze(1)
        entries = state_batch_indices[kept].long()
        states, gate = state[entries], None if z is None else z[kept]
        out = torch.zeros_like(x)
        out[kept] = selective_state_update(states, x[kept], dt[kept], A, B[kept], C[kept], D, gate, dt_bias, dt_softplus)
        state[entries] = states
        return out
    check_shape("x", x, "batch", *(("heads", "dim") if state.dim() == 4 else ("dim",)))
    batch, *channels = x.shape
    dstate, heads, groups = A.shape[-1], channels[0] if len(channels) == 2 else 1, B.shape[1] if B.dim() == 3 else 1
    check_shape("state", state, batch, *channels, dstate)
    check_shape("dt", dt, batch, *channels)
    check_shape("z", z, batch, *channels)
    check_shape("A", A, *channels, dstate)
    check_shape("B", B, batch, *([groups] if B.dim() == 3 else []), dstate)
    check_shape("C", C, *B.shape)
    check_shape("D", D, *channels)
    check_shape("dt_bias", dt_bias, *channels)
    if heads % groups:
        raise AssertionError(f"{heads} heads do not divide into {groups} groups")
    dtype, wide = _dtypes([x, dt, B, C, z], [state, A, D, dt_bias])
    rows = x.flatten(1).to(dtype), dt.flatten(1).to(dtype)
    matrices = A.flatten(0, -2).to(wide), B.to(dtype), C.to(dtype)
    gate = None if z is None else z.flatten(1).to(dtype)
    D, dt_bias = (None if t is None else t.flatten().to(wide) for t in (D, dt_bias))
    states = state.flatten(1, -2).to(wide).contiguous()  # a view, where it is all this already
    with torch.autocast(x.device.type, enabled=False):
        out = selective_scan_step(states, *rows, *matrices, D, gate, dt_bias, bool(dt_softplus))
    if state.dtype != wide or not state.is_contiguous():
        state.copy_(states.view_as(state))
    return out.view_as(x).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The recurrence of Mamba-2, whose heads decay as one, in chunks of matrix products.

    Made of torch's operations (:func:`madkernels.models.layers.recurrence.linear_recurrence`), not of a kernel of its own:
    in float32, so tensors in half precision are copied, with dt x, the scores within chunks of 64 steps, (batch, heads,
    seqlen, 64), and a state for each chunk, (batch, heads, seqlen / 64, dstate, headdim), in memory. B and C of several
    groups are copied for each head. With `seq_idx` each row of the batch is a call of its own.

    Args:
        x: (batch, seqlen, heads, headdim).
        dt: step sizes, (batch, seqlen, heads).
        A: (heads,), negative.
        B: (batch, seqlen, groups, dstate), where groups divides heads; likewise `C`.
        chunk_size: how the package cuts the sequence; without effect here.
        D: (heads,) or (heads, headdim).
        z: gate, through SiLU, (batch, seqlen, heads, headdim).
        dt_bias: (heads,).
        initial_states: (batch, heads, headdim, dstate). Zero if absent. With `seq_idx` they are of the first sequence of
            each row.
        seq_idx: number of each position's sequence, (batch, seqlen); nothing passes from one to the next.
        cu_seqlens: where sequences begin, and where the last ends, (num_sequences + 1,): read with `return_varlen_states`
            alone.
        dt_softplus: whether softplus is applied to the biased `dt`.
        dt_limit: least and greatest step size, after that.
        return_final_states: whether to return the state after the last step of each row.
        return_varlen_states: whether to return the state after each sequence of `cu_seqlens`; batch must be 1, and `seq_idx`
            tell the same sequences apart. They have their gradient here; the package has none then.
        state_dtype: what the package keeps states between chunks in; here they are in float32 at least.

    Returns:
        out (batch, seqlen, heads, headdim), dtype of `x`; then, if asked for, the final states, (batch, heads, headdim,
        dstate), and those of the sequences, (num_sequences, heads, headdim, dstate), in float32 at least.

    Raises:
        AssertionError: groups do not divide heads; `return_varlen_states` without `cu_seqlens`, or with a batch.
        NotImplementedError: a `state_dtype` in half precision; `return_varlen_states` with `initial_states`, or without
            `seq_idx`.
        ValueError: `seq_idx` comes back to a number, or differs from `cu_seqlens`.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.

    Differentiable in all tensors.
    """
    check_shape("x", x, "batch", "seqlen", "heads", "headdim")
    batch, seqlen, heads, headdim = x.shape
    check_shape("dt", dt, batch, seqlen, heads)
    check_shape("A", A, heads)
    check_shape("B", B, batch, seqlen, "groups", "dstate")
    check_shape("C", C, *B.shape)
    check_shape("D", D, *((heads, headdim) if D is not None and D.dim() == 2 else (heads,)))
    check_shape("z", z, *x.shape)
    check_shape("dt_bias", dt_bias, heads)
    check_shape("initial_states", initial_states, batch, heads, headdim, B.shape[3])
    check_shape("seq_idx", seq_idx, batch, seqlen)
    if heads % B.shape[2]:
        raise AssertionError(f"{heads} heads do not divide into {B.shape[2]} groups")
    if state_dtype is not None and state_dtype.itemsize < 4:
        raise NotImplementedError(f"state_dtype is {state_dtype}; states between chunks are in float32 at least")
    _, wide = _dtypes([x, dt, B, C, z], [A, D, dt_bias, initial_states])
    steps = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit).unsqueeze(-1)
    states = None if initial_states is None else initial_states.mT.to(wide)
    given = (_for_each_head(C, heads), _for_each_head(B, heads), steps * x, steps * A.to(wide)[:, None])
    after: tuple[Tensor, ...]
    if return_varlen_states:
        document, ends = _sequences_of(seq_idx, cu_seqlens, batch, seqlen, initial_states)
        y, at_ends = linear_recurrence(*given, document=document, ends=torch.cat([ends, ends.new_tensor([seqlen])]))
        after = (at_ends[document[-1:]], at_ends[:-1])
    else:
        y, final = _row_by_row(given, states, seq_idx) if seq_idx is not None else linear_recurrence(*given, states)
        after = (final,)
    if D is not None:
        y = y + x * D.to(wide).view(heads, -1)
    out = (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)
    asked = [states.mT for states, wanted in zip(after, (return_final_states, return_varlen_states), strict=False) if wanted]
    return (out, *asked) if asked else out


def _real_scan(
    u: Tensor, delta: Tensor, z: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op, with time in the second axis and all in dtypes that it takes."""
    dtype, wide = _dtypes([u, delta, B, C, z], [A, D, delta_bias])
    D, delta_bias = (None if t is None else t.to(wide) for t in (D, delta_bias))
    z = None if z is None else z.to(dtype)
    u, delta, B, C = (t.to(dtype) for t in (u, delta, B, C))
    out, state = selective_scan(u, delta, A.to(wide), B, C, D, z, delta_bias, delta_softplus, return_final_state=True)
    return out, state


def _complex_scan(
    u: Tensor, delta: Tensor, z: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By real states that do not turn: ``h[t] = turned[t] g[t]``, ``turned[t] = exp(i Im(A) sum of steps up to t)``. g
    decays by the real part of A and is given what h is given, turned back. Its real and imaginary parts are states apart."""
    step = delta.to(torch.promote_types(delta.dtype, A.real.dtype))
    step = step if delta_bias is None else step + delta_bias
    step = F.softplus(step) if delta_softplus else step
    angle = step.double().cumsum(1).unsqueeze(-1) * A.imag.double()  # (batch, seqlen, dim, dstate)
    angle = angle.remainder(2 * torch.pi).to(A.real.dtype)
    turned = torch.polar(torch.ones_like(angle), angle)
    B = _for_each_channel(B, u.shape[2]) * turned.conj()
    C = _for_each_channel(C, u.shape[2]) * turned * 2
    parts = torch.cat([A.real, A.real], 1), torch.cat([B.real, B.imag], 3), torch.cat([C.real, -C.imag], 3)
    out, state = _real_scan(u, step, z, *parts, D, None, False)
    return out, torch.complex(*state.chunk(2, 2)) * turned[:, -1]


def _steps_first(name: str, t: Tensor, A: Tensor, u: Tensor) -> Tensor:
    """B or C as (batch, seqlen, groups, dstate), complex if `A` is; a constant one with a group for each channel."""
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    constant = t.dim() == 2
    if t.is_complex() != (constant and A.is_complex()):
        raise RuntimeError(
            f"{name} has dtype {t.dtype}; a constant one is complex where A is, another has real and imaginary parts in turn"
        )
    if constant:
        check_shape(name, t, dim, dstate)
        return t.expand(batch, seqlen, dim, dstate)
    t = t.unsqueeze(1) if t.dim() == 3 else t
    check_shape(name, t, batch, "groups", dstate, 2 * seqlen if A.is_complex() else seqlen)
    if A.is_complex():
        t = torch.view_as_complex(t.to(A.real.dtype).reshape(*t.shape[:3], seqlen, 2))
    return t.permute(0, 3, 1, 2)


def _for_each_channel(t: Tensor, dim: int) -> Tensor:
    """B or C (batch, seqlen, groups, dstate) with as many groups as channels: a view of one group, a copy of several."""
    if dim % t.shape[2]:
        raise RuntimeError(f"B or C has {t.shape[2]} groups; expected a divisor of dim, {dim}")
    return t.unsqueeze(3).expand(-1, -1, -1, dim // t.shape[2], -1).flatten(2, 3)


def _for_each_head(t: Tensor, heads: int) -> Tensor:
    """B or C (batch, seqlen, groups, dstate) for each head; one group serves all as it is."""
    return t if t.shape[2] == 1 else t.repeat_interleave(heads // t.shape[2], 2)


def _projected(
    norm: str, constant: Tensor | None, projected: Tensor, A: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """B or C as :func:`selective_scan_fn` takes it: the constant, or else what is projected, (batch, seqlen, states)."""
    if weight is not None and (constant is not None or A.is_complex()):
        raise ValueError(f"{norm} takes a projected tensor and real A")
    if constant is not None:
        return constant
    t = projected if bias is None else projected + bias.to(projected.dtype)
    t = t if weight is None else _rms_norm(t, weight, eps)
    return t.reshape(*t.shape[:2], -1, 2).permute(0, 2, 1, 3).flatten(2) if A.is_complex() else t.transpose(1, 2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis, in float32 at least, rounded to the dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def _row_by_row(given: tuple[Tensor, ...], states: Tensor | None, seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, each row of the batch with its own sequences."""
    rows = []
    for i, document in enumerate(_numbered(seq_idx)):
        state = None if states is None else states.narrow(0, i, 1)
        rows.append(linear_recurrence(*(t.narrow(0, i, 1) for t in given), state, document=document))
    y, final = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return y, final


def _numbered(seq_idx: Tensor) -> Tensor:
    """Sequences of each row (batch, seqlen) counted from 0 on."""
    document = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))
    for numbers, counted in zip(seq_idx, document, strict=True):
        if len(numbers.unique()) != int(counted[-1:].sum()) + 1:
            raise ValueError("seq_idx comes back to a number that it had before")
    return document


def _sequences_of(
    seq_idx: Tensor | None, cu_seqlens: Tensor | None, batch: int, seqlen: int, initial_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For states of packed sequences: the number of each position's, (seqlen,), one more behind the last; where they end."""
    if cu_seqlens is None:
        raise AssertionError("cu_seqlens must be given if return_varlen_states is True")
    if batch != 1:
        raise AssertionError(f"return_varlen_states takes batch 1; got {batch}")
    if initial_states is not None:
        raise NotImplementedError("return_varlen_states takes no initial_states")
    if seq_idx is None:
        raise NotImplementedError("return_varlen_states takes seq_idx beside cu_seqlens, which keeps the sequences apart")
    ends = cu_seqlens[1:].long()
    document = torch.searchsorted(ends, torch.arange(seqlen, device=ends.device), right=True)
    if not torch.equal(document[1:] != document[:-1], seq_idx[0, 1:] != seq_idx[0, :-1]):
        raise ValueError("seq_idx and cu_seqlens tell different sequences")
    return document, ends


def _dtypes(activations: list[Tensor | None], parameters: list[Tensor | None]) -> tuple[torch.dtype, torch.dtype]:
    """Of activations, and of parameters and states, as the op takes them, so that none is rounded."""
    given = [t.dtype for t in activations if t is not None]
    further = [t.dtype for t in parameters if t is not None]
    for dtype in (*given, *further):
        if not dtype.is_floating_point:
            raise RuntimeError(f"a tensor has dtype {dtype}; expected one of floating point")
    dtype = torch.float64 if torch.float64 in further else reduce(torch.promote_types, given)
    return dtype, torch.promote_types(dtype, torch.float32)
