"""causal-conv1d's functions, on :func:`madkernels.causal_conv`.

    from madkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

Names, order of arguments, layouts and results are those of causal-conv1d 1.6; nothing is patched. Beyond it: the CPU too,
there with float64 as well; any width; final states of any layout; derivatives of all of these. Rows are (batch, dim, seqlen)
and read in place; those whose channels are dense in memory are the faster ones.

`activation` is None, "silu" or "swish", which are the same. weight and bias have one dtype, of x or another. Autocast casts
nothing here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import causal_conv, causal_conv_step
from madkernels.compat.dtypes import beside, without_autocast
from madkernels.compat.shapes import check_shape

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution.

    Args:
        x: (batch, dim, seqlen).
        weight: (dim, width).
        bias: (dim,).
        seq_idx: (batch, seqlen) integers, the number of each position's sequence: positions of another one are not seen. A
            negative one is padding, whose `out` is 0. Without states. On a GPU the host waits to learn how many sequences
            there are. Where a number comes back while the filter still reaches its earlier positions, these are seen, and
            all is summed tap by tap, by torch's operations.
        initial_states: (batch, dim, width - 1): the inputs before the first; zero if absent.
        return_final_states: return the last width - 1 inputs, too.
        final_states_out: (batch, dim, width - 1), where they are written to.
        activation: None, "silu" or "swish".

    Returns:
        out (batch, dim, seqlen), dtype of x; with `return_final_states` also the states (batch, dim, width - 1).

    Raises:
        NotImplementedError: another activation.
        ValueError: `seq_idx` together with states.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    silu = _activation(activation)
    weight, bias = beside(x, weight), None if bias is None else beside(x, bias)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError("causal_conv1d_fn: seq_idx is given together with states; expected one of them")
        return _of_sequences(x, weight, bias, seq_idx, silu)
    out, states = _rows(x, weight, bias, silu, initial_states)
    if not return_final_states:
        return out
    return out, states if final_states_out is None else final_states_out.copy_(states)


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, silu: str | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (batch, dim, seqlen) and the states behind it, from those before it (batch, dim, width - 1)."""
    state = None if before is None else before.transpose(1, 2)
    rows = x.transpose(1, 2)
    with without_autocast(x):
        out, states = causal_conv(rows, weight, bias, activation=silu, initial_state=state, return_final_state=True)
    return out.transpose(1, 2), states.transpose(1, 2)


def _of_sequences(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, silu: str | None) -> Tensor:
    """Rows of several sequences each, as one row of documents."""
    batch, dim, seqlen = x.shape
    check_shape("causal_conv1d_fn: seq_idx", seq_idx, batch, seqlen)
    begins = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if _comes_back(seq_idx, begins, weight.shape[1]):
        return _tap_by_tap(x, weight, bias, seq_idx, silu)
    ends = torch.full((1,), batch * seqlen, device=x.device)
    offsets = torch.cat([begins.flatten().nonzero().squeeze(1), ends]).int()
    row = x.transpose(1, 2).reshape(1, batch * seqlen, dim)
    with without_autocast(x):
        out = causal_conv(row, weight, bias, activation=silu, cu_seqlens=offsets if len(offsets) > 1 else None)
    assert isinstance(out, Tensor)
    return out.view(batch, seqlen, dim).masked_fill((seq_idx < 0).unsqueeze(2), 0.0).transpose(1, 2)


def _comes_back(seq_idx: Tensor, begins: Tensor, width: int) -> bool:
    """Whether a filter reaches positions of the same number with others between: two runs of it, nearer than its width."""
    run, there = begins.cumsum(1), seq_idx >= 0
    found = torch.zeros((), dtype=torch.bool, device=seq_idx.device)
    for lag in range(2, min(width, seq_idx.shape[1])):
        same = (seq_idx[:, lag:] == seq_idx[:, :-lag]) & there[:, lag:]
        found = found | (same & (run[:, lag:] != run[:, :-lag])).any()
    return bool(found)


def _tap_by_tap(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, silu: str | None) -> Tensor:
    """Each position sees those of its own number within the filter, whatever lies between."""
    width, seqlen, wide = weight.shape[1], x.shape[2], torch.promote_types(x.dtype, torch.float32)
    before, numbers = F.pad(x, (width - 1, 0)), F.pad(seq_idx, (width - 1, 0), value=-1)
    y = torch.zeros_like(x, dtype=wide) if bias is None else bias.to(wide)[:, None].expand(x.shape)
    for tap in range(width):
        unseen = (numbers[:, tap : tap + seqlen] != seq_idx).unsqueeze(1)
        y = y + before[:, :, tap : tap + seqlen].to(wide).masked_fill(unseen, 0.0) * weight[:, tap, None].to(wide)
    y = F.silu(y) if silu else y
    return y.masked_fill((seq_idx < 0).unsqueeze(1), 0.0).to(x.dtype)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next tokens of a convolution, for decoding. Updates `conv_state` in place; not differentiable.

    Args:
        x: (batch, dim), or (batch, dim, seqlen) of several tokens.
        conv_state: (batch, dim, state_len) of at least the last width - 1 inputs, dtype of x.
        weight, bias, activation: as in :func:`causal_conv1d_fn`.
        cache_seqlens: (batch,) integers, how many tokens came before: the state is a ring, and x goes where they end. If
            absent, the state is shifted.
        conv_state_indices: (batch,) integers, which rows of a larger `conv_state` are meant. A negative one is padding: its
            `out` is 0, and no state changes.

    Returns:
        out, of the shape and dtype of x.

    Raises:
        NotImplementedError: another activation.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    silu, tokens, needed = _activation(activation), x if x.dim() == 3 else x.unsqueeze(2), weight.shape[-1] - 1
    if conv_state.dim() != 3 or conv_state.shape[2] < needed:
        expected = f"(batch, dim, {needed} or more)"
        raise RuntimeError(f"causal_conv1d_update: conv_state has shape {tuple(conv_state.shape)}; expected {expected}")
    if conv_state_indices is not None:
        there = conv_state_indices >= 0
        rows = conv_state_indices[there]
        chosen = conv_state[rows]
        positions = None if cache_seqlens is None else cache_seqlens[there]
        out = torch.zeros_like(x)
        out[there] = causal_conv1d_update(x[there], chosen, weight, bias, activation, positions)
        conv_state[rows] = chosen
        return out
    weight, bias = beside(x, weight), None if bias is None else beside(x, bias)
    turned = conv_state.transpose(1, 2)
    if x.dim() == 2 and cache_seqlens is None and conv_state.shape[2] == needed and turned.is_contiguous():
        with without_autocast(x):
            return causal_conv_step(turned, x, weight, bias, activation=silu)
    slots = _slots(cache_seqlens, -needed, 0, conv_state)
    past = conv_state[:, :, conv_state.shape[2] - needed :] if slots is None else conv_state.gather(2, slots)
    out, _ = _rows(tokens, weight, bias, silu, past)
    _remember(conv_state, tokens, cache_seqlens)
    return out.reshape(x.shape)


def _remember(state: Tensor, x: Tensor, cache_seqlens: Tensor | None) -> None:
    """Puts x (batch, dim, seqlen) into the state: behind what stays of it, or round the ring."""
    length, seqlen = state.shape[2], x.shape[2]
    kept = min(length, seqlen)
    slots = _slots(cache_seqlens, seqlen - kept, seqlen, state)
    if slots is not None:
        state.scatter_(2, slots, x[:, :, seqlen - kept :])
    else:
        state.copy_(torch.cat([state[:, :, kept:], x[:, :, seqlen - kept :]], dim=2))


def _slots(cache_seqlens: Tensor | None, begin: int, end: int, state: Tensor) -> Tensor | None:
    """Where in the ring the positions begin .. end - 1 after `cache_seqlens` lie, (batch, dim, end - begin)."""
    if cache_seqlens is None:
        return None
    positions = cache_seqlens.long().unsqueeze(1) + torch.arange(begin, end, device=state.device)
    return (positions % state.shape[2]).unsqueeze(1).expand(-1, state.shape[1], -1)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of sequences that lie one after another, zeros in front of shorter ones.

    Args:
        x: (total, dim).
        cu_seqlens: (batch + 1,) integers: where each sequence begins, and where the last one ends.
        state_len: how many inputs a state has.

    Returns:
        (batch, dim, state_len), dtype of x, channels dense in memory.
    """
    ends = cu_seqlens[1:].long().unsqueeze(1)
    rows = ends + torch.arange(-state_len, 0, device=x.device)
    missing = rows < cu_seqlens[:-1].long().unsqueeze(1)
    if not len(x):
        return x.new_zeros(len(ends), state_len, x.shape[1]).transpose(1, 2)
    return x[rows.clamp(0, len(x) - 1)].masked_fill(missing.unsqueeze(2), 0.0).transpose(1, 2)


def _activation(name: str | None) -> str | None:
    if name not in (None, "silu", "swish"):
        raise NotImplementedError(f'activation is {name!r}; it takes None, "silu" or "swish"')
    return name and "silu"
