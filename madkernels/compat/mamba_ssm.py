"""The functions of the package mamba_ssm, under its names and with its arguments, on :func:`madkernels.selective_scan`.

    from madkernels.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn, selective_state_update
    from madkernels.compat.mamba_ssm import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
    from madkernels.compat.mamba_ssm import RMSNorm, LayerNorm, rmsnorm_fn, layernorm_fn  # with a gate

They run wherever the op does. Tensors whose dtypes differ are taken to the widest of them, so none is rounded, and the
output is rounded once, to the dtype of its input; arithmetic and states are in float32 at least. As in the package, autocast
casts nothing here but in projections: those of :func:`mamba_inner_fn`, the last of :func:`mamba_split_conv1d_scan_combined`.
"""

from __future__ import annotations

from functools import reduce
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import selective_scan, selective_scan_step
from madkernels.compat.causal_conv1d import causal_conv1d_fn
from madkernels.compat.dtypes import without_autocast
from madkernels.compat.layernorm_gated import LayerNorm, RMSNorm, layernorm_fn, rmsnorm_fn
from madkernels.compat.shapes import check_shape
from madkernels.models.layers import ssd
from madkernels.models.layers.recurrence import linear_recurrence

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]


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
    with without_autocast(u):
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
            Here both are kept at either: :mod:`torch.utils.checkpoint` around the layer is what saves memory.
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
        delta = rmsnorm_fn(delta, dt_rms_weight, None, eps=b_c_dt_rms_eps)
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
    with without_autocast(x):
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

    By :func:`madkernels.ssd_scan`, on the CPU; with `seq_idx` each row of the batch is a call of its own. On a GPU, with
    `return_varlen_states`, and where a number of `seq_idx` comes back, made of torch's operations
    (:func:`madkernels.models.layers.recurrence.linear_recurrence`): in float32, with the scores within chunks of 64 steps
    and a state for each chunk in memory; where a number comes back, each of its sequences is a call of its own.

    Args:
        x: (batch, seqlen, heads, headdim).
        dt: step sizes, (batch, seqlen, heads).
        A: (heads,), negative.
        B: (batch, seqlen, groups, dstate), where groups divides heads; likewise `C`.
        chunk_size: how the package cuts the sequence. It has an effect only where the package's results depend on it: on
            numbers of `seq_idx` that come back, and on states of packed sequences that something enters.
        D: (heads,) or (heads, headdim).
        z: gate, through SiLU, (batch, seqlen, heads, headdim).
        dt_bias: (heads,).
        initial_states: (batch, heads, headdim, dstate). Zero if absent. With `seq_idx` they are of sequence 0, and of none
            where a row begins with another number.
        seq_idx: number of each position's sequence, (batch, seqlen); nothing passes from one to the next. If a number comes
            back, its positions see each other within a chunk of `chunk_size`, and past its border where the number is that
            of the last position before it.
        cu_seqlens: where sequences begin, and where the last ends, (num_sequences + 1,): read with `return_varlen_states`
            alone.
        dt_softplus: whether softplus is applied to the biased `dt`.
        dt_limit: least and greatest step size, after that.
        return_final_states: whether to return the state after the last step of each row.
        return_varlen_states: whether to return the state after each sequence of `cu_seqlens`; batch must be 1, and `seq_idx`
            tell the same sequences apart if given. What enters a sequence (initial states; without `seq_idx` all that comes
            before) is in its state if it begins before the chunk in which it ends. They have their gradient here; the
            package has none then.
        state_dtype: dtype of these states, that of `C` if absent. The package rounds states between chunks to it; here they
            are in float32 at least.

    Returns:
        out (batch, seqlen, heads, headdim), dtype of `x`; then, if asked for, the final states, (batch, heads, headdim,
        dstate), in float32 at least, and those of the sequences, (num_sequences, heads, headdim, dstate).

    Raises:
        AssertionError: groups do not divide heads; `return_varlen_states` without `cu_seqlens`, or with a batch.
        ValueError: `seq_idx` differs from `cu_seqlens`.
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
    if state_dtype is not None and not state_dtype.is_floating_point:
        raise RuntimeError(f"state_dtype is {state_dtype}; expected one of floating point")
    dtype, wide = _dtypes([x, dt, B, C, z], [A, D, dt_bias, initial_states])
    steps = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)
    if not return_varlen_states and _scan_takes(x, seq_idx, initial_states):
        rows = (steps, *(t.to(dtype) for t in (x, B, C)))
        parameters = (A.to(wide), None if D is None else D.to(wide))
        y, *after = _scan(rows, parameters, None if initial_states is None else initial_states.to(wide), seq_idx)
    else:
        steps = steps.unsqueeze(-1)
        states = None if initial_states is None else initial_states.mT.to(wide)
        given = (_for_each_head(C, heads), _for_each_head(B, heads), steps * x, steps * A.to(wide)[:, None])
        if return_varlen_states:
            y, *found = _packed(given, states, seq_idx, cu_seqlens, chunk_size)
            found[1] = found[1].to(C.dtype if state_dtype is None else state_dtype)
        else:
            y, *found = _row_by_row(given, states, seq_idx, chunk_size)
        after = [t.mT for t in found]
        if D is not None:
            y = y + x * D.to(wide).view(heads, -1)
    out = (y if z is None else y.to(wide) * F.silu(z.to(wide))).to(x.dtype)
    asked = [t for t, wanted in zip(after, (return_final_states, return_varlen_states), strict=False) if wanted]
    return (out, *asked) if asked else out


def _scan_takes(x: Tensor, seq_idx: Tensor | None, states: Tensor | None) -> bool:
    """Whether sequences are what they are for the scan: documents one after another."""
    if seq_idx is None:
        return True
    before = [] if states is None else [0]
    return x.device.type in ssd.DEVICES and not any(_comes_back([*before, *row.tolist()]) for row in seq_idx)


def _scan(
    rows: tuple[Tensor, ...], parameters: tuple[Tensor, Tensor | None], states: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By the kernel: delta, x, B and C of all rows together, or of each row with its own documents. In the dtype of x, under
    autocast too, as in the package."""
    A, D = parameters
    with without_autocast(rows[0]):
        if seq_idx is None:
            delta, x, B, C = rows
            return ssd.scan(x, delta, A, B, C, D, states)
        found = []
        for i, numbers in enumerate(seq_idx):
            delta, x, B, C = (t.narrow(0, i, 1) for t in rows)
            borders = (numbers[1:] != numbers[:-1]).nonzero().flatten() + 1
            offsets = torch.cat([borders.new_tensor([0]), borders, borders.new_tensor([len(numbers)])]).int()
            entering = None
            if states is not None and not numbers[:1].any():  # they are of sequence 0
                entering = F.pad(states.narrow(0, i, 1), (0, 0) * 3 + (0, len(borders)))
            y, after = ssd.scan(x, delta, A, B, C, D, entering, offsets)
            found.append((y, after[-1:]))
        y, final = (torch.cat(parts) for parts in zip(*found, strict=True))
        return y, final


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 layer after its first projection: short convolution, recurrence, gate or gated norm, last projection.
    Composed of :func:`madkernels.compat.causal_conv1d.causal_conv1d_fn`, :func:`mamba_chunk_scan_combined` and
    :func:`rmsnorm_fn`; all between them is kept for the backward, of which the package computes some again.

    Args:
        zxbcdt: (batch, seqlen, 2 mlp_dim + 2 dim + 2 groups dstate + heads), one after another: an MLP's gate and values,
            mostly none; the gate z; x, B and C, which are convolved; dt. dim is heads times headdim.
        conv1d_weight: (dim + 2 groups dstate, width).
        conv1d_bias: (dim + 2 groups dstate,).
        dt_bias: (heads,); likewise `A`.
        D: (heads,) or (heads, headdim).
        chunk_size, initial_states, seq_idx, dt_limit, state_dtype: as of :func:`mamba_chunk_scan_combined`; the convolution
            keeps to `seq_idx` too, and begins with zeros.
        return_final_states: whether to return the state after the last step of each row.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (dim,). If absent, z gates without a norm.
        rmsnorm_eps, norm_before_gate: as of :func:`rmsnorm_fn`, whose groups are those of B and C.
        outproj_weight: (out_dim, mlp_dim + dim).
        outproj_bias: (out_dim,).
        headdim: needed if `D` is (heads,).
        ngroups: groups of B and C.

    Returns:
        (batch, seqlen, out_dim), or (batch, seqlen, mlp_dim + dim) without `outproj_weight`, the MLP's first; if asked for,
        also the final states, (batch, heads, headdim, dstate), in float32 at least.

    Raises:
        AssertionError: another activation; `D` of one axis without `headdim`; groups do not divide heads; `outproj_bias`
            without `outproj_weight`.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    if activation not in (None, "silu", "swish"):
        raise AssertionError(f'activation is {activation!r}; it takes None, "silu" or "swish"')
    if outproj_bias is not None and outproj_weight is None:
        raise AssertionError("outproj_bias is given without outproj_weight")
    headdim = D.shape[1] if D.dim() == 2 else headdim
    if headdim is None:
        raise AssertionError("headdim must be given if D is (heads,)")
    heads = D.shape[0]
    dim, channels = heads * headdim, conv1d_weight.shape[0]
    if heads % ngroups:
        raise AssertionError(f"{heads} heads do not divide into {ngroups} groups")
    check_shape("zxbcdt", zxbcdt, "batch", "seqlen", "2 mlp_dim + 2 dim + 2 groups dstate + heads")
    of_mlp, odd = divmod(zxbcdt.shape[2] - dim - channels - heads, 2)
    dstate, left = divmod(channels - dim, 2 * ngroups)
    if of_mlp < 0 or odd or dstate < 0 or left:
        told = f"zxbcdt has {zxbcdt.shape[2]} channels, of which conv1d_weight has {channels}"
        raise RuntimeError(f"{told}; dim is {dim}, with {heads} heads and {ngroups} groups")
    mlp, z, xBC, dt = torch.split(zxbcdt, [2 * of_mlp, dim, channels, heads], -1)
    convolved = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    assert isinstance(convolved, Tensor)
    x, B, C = torch.split(convolved.transpose(1, 2), [dim, ngroups * dstate, ngroups * dstate], -1)
    x, gate = (t.view(*t.shape[:2], heads, headdim) for t in (x, z))
    B, C = (t.view(*t.shape[:2], ngroups, dstate) for t in (B, C))
    out, states = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, gate if rmsnorm_weight is None else None, dt_bias, initial_states, seq_idx,
        dt_softplus=True, dt_limit=dt_limit, return_final_states=True, state_dtype=state_dtype,
    )  # fmt: skip
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if of_mlp:
        opened, values = mlp.to(torch.promote_types(mlp.dtype, torch.float32)).chunk(2, -1)
        out = torch.cat([(F.silu(opened) * values).to(out.dtype), out], -1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, states) if return_final_states else out


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
    t = t if weight is None else rmsnorm_fn(t, weight, None, eps=eps)
    return t.reshape(*t.shape[:2], -1, 2).permute(0, 2, 1, 3).flatten(2) if A.is_complex() else t.transpose(1, 2)


def _row_by_row(
    given: tuple[Tensor, ...], states: Tensor | None, seq_idx: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The recurrence, each row of the batch with its own sequences: y and the states after the rows."""
    if seq_idx is None:
        return linear_recurrence(*given, states)
    rows = []
    for i, numbers in enumerate(seq_idx):
        row = tuple(t.narrow(0, i, 1) for t in given)
        rows.append(_of_numbers(row, None if states is None else states.narrow(0, i, 1), numbers, chunk_size))
    y, final = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return y, final


def _of_numbers(row: tuple[Tensor, ...], state: Tensor | None, seq_idx: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """A row of sequences with these numbers, (seqlen,); what is before it has number 0."""
    numbers = seq_idx.tolist()
    if _comes_back(numbers if state is None else [0, *numbers]):
        return _chain_by_chain(row, state, _chains(numbers, chunk_size))
    if any(numbers[:1]):
        state = None
    return linear_recurrence(*row, state, document=F.pad((seq_idx[1:] != seq_idx[:-1]).cumsum(0), (1, 0)))


def _comes_back(numbers: list[int]) -> bool:
    """Whether one of the numbers comes again after others."""
    runs = [number for number, _ in groupby(numbers)]
    return len(set(runs)) < len(runs)


def _chains(numbers: list[int], chunk_size: int) -> list[int]:
    """For each position a number of what the package sees as one sequence: positions of one number in a chunk, and what they
    continue of the chunk before, which passes on the state of its last number alone. 0 continues what is before the row."""
    known, count = {0: 0}, 1
    chains: list[int] = []
    for at, number in enumerate(numbers):
        if at and at % chunk_size == 0:
            known = {numbers[at - 1]: chains[-1]}
        if number not in known:
            known[number], count = count, count + 1
        chains.append(known[number])
    return chains


def _chain_by_chain(row: tuple[Tensor, ...], state: Tensor | None, chains: list[int]) -> tuple[Tensor, Tensor]:
    """Each chain on its own. What others have between two of its positions is no part of it but decays it too."""
    sums = row[3].double().cumsum(1)
    places: dict[int, list[int]] = {}
    for at, chain in enumerate(chains):
        places.setdefault(chain, []).append(at)
    parts, finals = [], {}
    for chain, positions in places.items():
        index = torch.tensor(positions, device=sums.device)
        q, k, v, since_start = (t.index_select(1, index) for t in (*row[:3], sums))
        decay = since_start.diff(dim=1, prepend=torch.zeros_like(since_start[:, :1])).to(row[3].dtype)
        y, finals[chain] = linear_recurrence(q, k, v, decay, state if chain == 0 else None)
        parts.append(y)
    order = torch.tensor([at for positions in places.values() for at in positions], device=sums.device)
    return torch.cat(parts, 1).index_select(1, order.argsort()), finals[chains[-1]]


def _packed(
    given: tuple[Tensor, ...], state: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over packed sequences: y, the state after the row, and those after the sequences."""
    if cu_seqlens is None:
        raise AssertionError("cu_seqlens must be given if return_varlen_states is True")
    batch, seqlen = given[3].shape[:2]
    if batch != 1:
        raise AssertionError(f"return_varlen_states takes batch 1; got {batch}")
    ends = cu_seqlens[1:].long()
    document = torch.searchsorted(ends, torch.arange(seqlen, device=ends.device), right=True)
    if seq_idx is not None and not torch.equal(document[1:] != document[:-1], seq_idx[0, 1:] != seq_idx[0, :-1]):
        raise ValueError("seq_idx and cu_seqlens tell different sequences")
    y, own = linear_recurrence(*given, document=document, ends=torch.cat([ends, ends.new_tensor([seqlen])]))
    if state is None and seq_idx is not None and not _comes_back(seq_idx[0].tolist()):
        return y, own[document[-1:]], own[:-1]
    y, final = _row_by_row(given, state, seq_idx, chunk_size)
    chains = [0] * seqlen if seq_idx is None else _chains(seq_idx[0].tolist(), chunk_size)
    return y, final, _with_what_enters(own[:-1], given[3], state, chains, cu_seqlens.tolist(), chunk_size)


def _with_what_enters(
    own: Tensor, log_decay: Tensor, state: Tensor | None, chains: list[int], bounds: list[int], chunk_size: int
) -> Tensor:
    """States after sequences, (num_sequences, heads, dstate, headdim), from what each leaves by its own steps: with what
    enters it from its chain, if it begins before the chunk in which it ends."""
    sums = F.pad(log_decay[0].double().cumsum(0), (0, 0, 0, 0, 1, 0))  # before each position, (seqlen + 1, heads, 1)
    left = {} if state is None else {0: (0, state[0])}  # by chain: after which position, and what
    found = []
    for after, (begin, end) in zip(own, pairwise(bounds), strict=True):
        whole = after
        if begin < end:
            if chains[begin] in left:
                since, before = left[chains[begin]]
                whole = after + (sums[end] - sums[since]).exp().to(own.dtype)[..., None] * before
            left[chains[begin]] = end, whole
        found.append(whole if begin < (end - 1) // chunk_size * chunk_size else after)
    return torch.stack(found)


def _dtypes(activations: list[Tensor | None], parameters: list[Tensor | None]) -> tuple[torch.dtype, torch.dtype]:
    """Of activations, and of parameters and states, as the op takes them, so that none is rounded."""
    given = [t.dtype for t in activations if t is not None]
    further = [t.dtype for t in parameters if t is not None]
    for dtype in (*given, *further):
        if not dtype.is_floating_point:
            raise RuntimeError(f"a tensor has dtype {dtype}; expected one of floating point")
    dtype = torch.float64 if torch.float64 in further else reduce(torch.promote_types, given)
    return dtype, torch.promote_types(dtype, torch.float32)
