"""causal-conv1d's functions against loops in float64 that say what they mean."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.compat import causal_conv1d
from madkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-13}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def by_hand(window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """One output (dim,) of the last width inputs (dim, width), in float64."""
    y = (window.double() * weight.double()).sum(1) + (0 if bias is None else bias.double())
    return F.silu(y) if activation else y


def expected_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, before: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """Position by position, tap by tap: a tap counts if it is of the same sequence."""
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    past = torch.zeros(batch, dim, width - 1, dtype=x.dtype) if before is None else before
    padded, out = torch.cat([past, x], 2), torch.zeros(batch, dim, seqlen, dtype=torch.float64)
    for b in range(batch):
        for t in range(seqlen):
            window = padded[b, :, t : t + width].clone()
            if seq_idx is not None:
                if seq_idx[b, t] < 0:
                    continue
                for j in range(width - 1):
                    at = t - (width - 1) + j
                    if at < 0 or seq_idx[b, at] != seq_idx[b, t]:
                        window[:, j] = 0
            out[b, :, t] = by_hand(window, weight, bias, activation)
    return out


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=DTYPES[dtype] * 4, rtol=DTYPES[dtype] * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 8, 41])
@pytest.mark.parametrize(("width", "activation"), [(2, "silu"), (3, None), (4, "swish"), (1, "silu")])
def test_rows_with_states(seqlen: int, width: int, activation: str | None, channel_last: bool, dtype: torch.dtype) -> None:
    x, weight, bias = drawn(2, 5, seqlen, dtype=dtype), drawn(5, width, dtype=dtype), drawn(5, dtype=dtype)
    before = drawn(2, 5, width - 1, dtype=dtype, seed=1)
    if channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    plain = causal_conv1d_fn(x, weight, bias, activation=activation)
    assert isinstance(plain, Tensor)
    close(plain, expected_rows(x, weight, bias, activation, None, None), dtype)
    there = torch.full((2, 5, width - 1), torch.nan, dtype=dtype)
    out, final = causal_conv1d_fn(x, weight, None, None, before, True, there, activation)
    close(out, expected_rows(x, weight, None, activation, before, None), dtype)
    assert final.data_ptr() == there.data_ptr()
    assert torch.equal(final, torch.cat([before, x], 2)[:, :, seqlen:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_in_a_row(dtype: torch.dtype) -> None:
    seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 7 + [-1] * 4, [3] * 2 + [-1] * 3 + [4] * 12], dtype=torch.int32)
    x, weight, bias = drawn(2, 5, 17, dtype=dtype), drawn(5, 4, dtype=dtype), drawn(5, dtype=dtype)
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    assert isinstance(out, Tensor)
    close(out, expected_rows(x, weight, bias, "silu", None, seq_idx), dtype)
    x[:, :, 13:] = torch.nan  # padding of the first row; the second one's sequence
    poisoned = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    assert isinstance(poisoned, Tensor)
    assert torch.equal(poisoned[0], out[0])


@pytest.mark.parametrize("width", [2, 3, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_comes_back_is_seen_again(dtype: torch.dtype, width: int) -> None:
    """Within the filter's width the earlier positions of that number count, those between do not."""
    back = [0, 0, 1, 0, 1, 1, -1, -1, 1, 2, 3, 4, 2, -1, 5, -1, 5]
    seq_idx = torch.tensor([back, [7] * 17], dtype=torch.int32)
    x, weight, bias = drawn(2, 5, 17, dtype=dtype), drawn(5, width, dtype=dtype), drawn(5, dtype=dtype)
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    assert isinstance(out, Tensor)
    close(out, expected_rows(x, weight, bias, "silu", None, seq_idx), dtype)
    close(causal_conv1d_fn(x, weight, None, seq_idx), expected_rows(x, weight, None, None, None, seq_idx), dtype)  # type: ignore[arg-type]
    x[:, :, [6, 7, 13, 15]] = torch.nan  # padding, between positions of one number
    poisoned = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    assert torch.equal(poisoned[0], out[0])


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("parameters", [torch.float32, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("case", ["rows", "sequences", "a number comes back", "one token", "several tokens"])
def test_parameters_of_any_dtype(case: str, dtype: torch.dtype, parameters: torch.dtype) -> None:
    """As if they were given in the dtype of the sums, to the bit; their gradients come in their own dtype."""
    x, weight, bias = drawn(2, 8, 6).to(dtype), drawn(8, 4).to(parameters), drawn(8).to(parameters)
    state = drawn(2, 8, 3).to(dtype)
    numbers = {"sequences": [0, 0, 1, 1, 1, 2], "a number comes back": [0, 1, 0, 1, 1, 2]}.get(case)

    def found(weight: Tensor, bias: Tensor) -> Tensor:
        if "token" in case:
            return causal_conv1d_update(x if "several" in case else x[:, :, 0], state.clone(), weight, bias, "silu")
        seq_idx = None if numbers is None else torch.tensor([numbers] * 2)
        out = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
        assert isinstance(out, Tensor)
        return out

    given = [t.clone().requires_grad_() for t in (weight, bias)]
    widened = [t.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for t in (weight, bias)]
    if dtype == parameters:  # what the op takes as it is
        widened = given
    out = found(*given)
    assert out.dtype == dtype
    assert torch.equal(out, found(*widened))
    if "token" not in case:
        for own, wide in zip(*(torch.autograd.grad(found(*ps).sum(), ps) for ps in (given, widened)), strict=True):
            assert own.dtype == parameters
            assert torch.equal(own, wide.to(parameters))


def test_autocast_is_ignored() -> None:
    x, weight, bias, before = drawn(2, 5, 9), drawn(5, 4), drawn(5), drawn(2, 5, 3)

    def found() -> list[Any]:
        results: list[Any] = [*causal_conv1d_fn(x, weight, bias, None, before, True, None, "silu")]
        for numbers in ([0] * 4 + [1] * 5, [0, 1, 0] * 3):
            results.append(causal_conv1d_fn(x, weight, bias, torch.tensor([numbers] * 2), activation="silu"))
        results += [causal_conv1d_update(x[:, :, 0], before.clone(), weight, bias, "silu")]
        dense = before.transpose(1, 2).contiguous().transpose(1, 2)
        return [*results, causal_conv1d_update(x[:, :, 0], dense, weight, bias, "silu"), dense]

    alone = found()
    with torch.autocast("cpu", torch.bfloat16):
        again = found()
    assert [t.dtype for t in again] == [torch.float32] * len(alone)
    assert all(map(torch.equal, again, alone))


def test_tensors_without_memory() -> None:
    x, weight = torch.zeros(2, 5, 9, device="meta"), torch.zeros(5, 4, device="meta", dtype=torch.bfloat16)
    out, states = causal_conv1d_fn(x, weight, return_final_states=True, activation="silu")
    assert (out.shape, states.shape, out.device.type) == ((2, 5, 9), (2, 5, 3), "meta")


def test_gradients() -> None:
    seq_idx, back = torch.tensor([[0] * 3 + [1] * 4 + [-1], [0] * 8]), torch.tensor([[0, 1, 0, 1, 1, 2, 1, -1], [0] * 8])
    x, weight, bias, before = (drawn(*s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 8), (3, 4), (3,), (2, 3, 3)))

    def of_states(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Any:
        return causal_conv1d_fn(x, weight, bias, None, before, True, None, "silu")

    assert torch.autograd.gradcheck(of_states, (x, weight, bias, before))
    assert torch.autograd.gradcheck(lambda x, w, b: causal_conv1d_fn(x, w, b, seq_idx, activation="silu"), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w, b: causal_conv1d_fn(x, w, b, back, activation="silu"), (x, weight, bias))
    for numbers in (seq_idx, back):
        (dx,) = torch.autograd.grad(causal_conv1d_fn(x, weight, bias, numbers).sum(), x)  # type: ignore[union-attr]
        assert (dx[0, :, 7] == 0).all(), "padding"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(("width", "state_len"), [(2, 1), (4, 3), (4, 5), (3, 8)])
@pytest.mark.parametrize("pieces", [[1] * 12, [0, 2, 5, 1, 4], [9, 3]])
def test_decoding(pieces: list[int], width: int, state_len: int, ring: bool, dtype: torch.dtype) -> None:
    """Tokens in pieces, single ones without a last axis, are the whole row."""
    x, weight, bias = drawn(3, 5, 12, dtype=dtype), drawn(5, width, dtype=dtype), drawn(5, dtype=dtype)
    state = torch.zeros(3, 5, state_len, dtype=dtype)
    state = state if ring else state.transpose(1, 2).contiguous().transpose(1, 2)
    seen, begin, found = torch.tensor([0, 7, state_len], dtype=torch.int32), 0, []
    for length in pieces:
        piece = x[:, :, begin : begin + length]
        piece = piece.squeeze(2) if length == 1 else piece
        y = causal_conv1d_update(piece, state, weight, bias, "silu", seen + begin if ring else None)
        assert y.shape == piece.shape
        found.append(y.unsqueeze(2) if length == 1 else y)
        begin += length
    close(torch.cat(found, 2), expected_rows(x, weight, bias, "silu", None, None), dtype)
    last = torch.cat([torch.zeros(3, 5, state_len, dtype=dtype), x], 2)[:, :, -state_len:]
    if ring:
        slots = (seen[:, None] + torch.arange(12 - state_len, 12)) % state_len
        state = state.gather(2, slots.long()[:, None].expand(-1, 5, -1))
    assert torch.equal(state, last)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_states_by_index(several: bool, ring: bool) -> None:
    states, weight = drawn(7, 5, 4), drawn(5, 4)
    indices = torch.tensor([6, -1, 0, 3], dtype=torch.int32)
    x = drawn(4, 5, 2) if several else drawn(4, 5)
    seen = torch.tensor([1, 2, 3, 9]) if ring else None
    own, before = states[[6, 0, 3]].clone(), states.clone()
    kept = [0, 2, 3]
    expected = causal_conv1d_update(x[kept], own, weight, None, None, None if seen is None else seen[kept])
    out = causal_conv1d_update(x, states, weight, cache_seqlens=seen, conv_state_indices=indices)
    assert torch.equal(out[kept], expected)
    assert (out[1] == 0).all()
    assert torch.equal(states[[6, 0, 3]], own)
    assert torch.equal(states[[1, 2, 4, 5]], before[[1, 2, 4, 5]])


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("state_len", [1, 3, 6])
def test_states_of_sequences(state_len: int, offsets_dtype: torch.dtype) -> None:
    x, offsets = drawn(12, 5), [0, 2, 2, 3, 12]
    found = causal_conv1d_varlen_states(x, torch.tensor(offsets, dtype=offsets_dtype), state_len)
    assert found.shape == (4, 5, state_len)
    assert found.stride(1) == 1
    for i, (begin, end) in enumerate(pairwise(offsets)):
        alone = torch.cat([torch.zeros(state_len, 5), x[begin:end]])[-state_len:]
        assert torch.equal(found[i], alone.T)


def test_refusals() -> None:
    x, weight = drawn(2, 5, 8), drawn(5, 4)
    with pytest.raises(NotImplementedError, match="activation is 'gelu'"):
        causal_conv1d_fn(x, weight, activation="gelu")
    with pytest.raises(NotImplementedError, match="activation is 'gelu'"):
        causal_conv1d_update(x, drawn(2, 5, 3), weight, activation="gelu")
    with pytest.raises(ValueError, match="seq_idx is given together with states"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 8, dtype=torch.int32), return_final_states=True)
    with pytest.raises(RuntimeError, match=r"seq_idx has shape \(8,\); expected \(2, 8\)"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(8, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"conv_state has shape \(2, 5, 2\); expected \(batch, dim, 3 or more\)"):
        causal_conv1d_update(x, drawn(2, 5, 2), weight)


@pytest.mark.parametrize("empty", [(0, 5, 8), (2, 5, 0)])
def test_nothing(empty: tuple[int, int, int]) -> None:
    x, weight = torch.zeros(empty), drawn(5, 4)
    for seq_idx in (None, torch.zeros(empty[0], empty[2], dtype=torch.int32)):
        assert causal_conv1d_fn(x, weight, seq_idx=seq_idx).shape == empty  # type: ignore[union-attr]


def test_arguments_have_the_published_names_and_order() -> None:
    published = {
        "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
        "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
        "causal_conv1d_varlen_states": "x cu_seqlens state_len",
    }
    for name, names in published.items():
        assert " ".join(inspect.signature(getattr(causal_conv1d, name)).parameters) == names
    assert sorted(causal_conv1d.__all__) == sorted(published)
