"""flash-fft-conv's modules, on :func:`madkernels.fft_conv` and :func:`madkernels.causal_conv`.

    from madkernels.compat.flashfftconv import FlashDepthWiseConv1d, FlashFFTConv

Names, order of arguments, layouts and results are those of the package flashfftconv; nothing is patched. Beyond it: the CPU
too; inputs in float32, on the CPU in float64; arithmetic in float32 at least; filters and weights of any dtype; tensors that
are not contiguous; a filter for each sequence of the batch; derivatives of modules in evaluation. Autocast casts nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels import causal_conv, fft_conv
from madkernels.compat.dtypes import beside, without_autocast
from madkernels.compat.shapes import check_shape

__all__ = ["FlashDepthWiseConv1d", "FlashFFTConv"]

SIZES = [2**power for power in range(8, 23)]  # of the package's FFTs


class FlashFFTConv(nn.Module):
    """Convolution along the sequence by an FFT of `seqlen` points: ``postgate * ifft(fft(pregate * u) * fft(k))``.

    What is shorter than the FFT is filled up with zeros, and what goes beyond its end comes in again at the start: `u` as
    long as the FFT is convolved in a circle, one of half the length, with as long a filter, causally.

    The package keeps the FFT's tables in the state dict. Here there are none, and those of its state dicts are passed over;
    it reads a state dict of this module with ``strict=False``.

    Args:
        seqlen: points of the FFT, a power of 2 from 256 to 4194304.
        dtype: torch.float16 or torch.bfloat16: of the package's tables, without effect here.
        use_32_butterfly: without effect.

    Raises:
        AssertionError: another dtype.
        NotImplementedError: another size.
    """

    def __init__(self, seqlen: int, dtype: torch.dtype = torch.float16, use_32_butterfly: bool = True) -> None:
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16):
            raise AssertionError(f"dtype is {dtype}; it takes torch.float16 or torch.bfloat16")
        if seqlen not in SIZES:
            raise NotImplementedError(f"seqlen is {seqlen}; expected a power of 2 from {SIZES[0]} to {SIZES[-1]}")
        self.seqlen, self.dtype, self.use_32_butterfly = seqlen, dtype, use_32_butterfly
        self.register_load_state_dict_pre_hook(_pass_over_tables)  # type: ignore[no-untyped-call]

    def forward(self, u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """
        Args:
            u: (batch, dim, length), of `seqlen` at most.
            k: (dim, filter_len), or (batch, dim, filter_len), a filter for each sequence. What it has beyond `seqlen` is not
                seen.
            pregate, postgate: shape and dtype of `u`; both or none.

        Returns:
            Shape and dtype of `u`.

        Raises:
            AssertionError: one gate alone.
            RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
        """
        if (pregate is None) != (postgate is None):
            raise AssertionError("pregate and postgate are given together or not at all")
        check_shape("u", u, "batch", "dim", "length")
        batch, dim, length = u.shape
        if length > self.seqlen:
            raise RuntimeError(f"u has length {length}; expected {self.seqlen} at most, the size of the FFT")
        check_shape("pregate", pregate, *u.shape)
        check_shape("postgate", postgate, *u.shape)
        check_shape("k", k, *([batch] if k.dim() == 3 else []), dim, "filter_len")
        channels: list[Tensor | None] = [u, pregate, postgate]
        if k.dim() == 3:  # each sequence has channels of its own
            channels = [None if t is None else t.reshape(1, batch * dim, length) for t in channels]
            k = k.flatten(0, 1)
        rows, before, behind = (None if t is None else t.transpose(1, 2) for t in channels)
        assert rows is not None
        taps = beside(u, k[:, : self.seqlen])
        with without_autocast(u):
            past = self._wrapped(rows, before, taps.shape[1])
            out = fft_conv(rows, taps, pre_gate=before, post_gate=behind, initial_state=past)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).reshape(u.shape)

    def _wrapped(self, rows: Tensor, gate: Tensor | None, taps: int) -> Tensor | None:
        """What the circle has before the first input, (batch, taps - 1, dim): the last points of the FFT; none if zeros."""
        length, empty = rows.shape[1], self.seqlen - rows.shape[1]
        if taps - 1 <= empty:
            return None
        wide = torch.promote_types(rows.dtype, torch.float32)
        first = length + empty - (taps - 1)
        last = rows[:, first:].to(wide)
        last = last if gate is None else last * gate[:, first:].to(wide)
        return F.pad(last, (0, 0, 0, empty))


def _pass_over_tables(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Takes the package's tables out of what is about to be loaded."""
    for name in list(state_dict):
        if name.startswith((f"{prefix}f_", f"{prefix}twid")):
            del state_dict[name]


class FlashDepthWiseConv1d(nn.Module):
    """Depthwise convolution with padding and bias: what ``torch.nn.Conv1d(channels, channels, kernel_size, groups=channels,
    padding=padding)`` does, whose `weight` and `bias` are given and copied.

    Its parameters are `weights`, (channels, kernel_size), or (kernel_size, channels) without `is_bhl`, and `bias`,
    (channels,).

    Args:
        channels: of input and output.
        kernel_size: odd.
        padding: zeros before and behind the sequence.
        weights: (channels, 1, kernel_size).
        bias: (channels,), dtype of `weights`.
        is_bhl: whether inputs are (batch, channels, length), or (batch, length, channels).
        device, dtype: without effect, as in the package: parameters are where and as `weights` and `bias` are.

    Raises:
        RuntimeError: a shape that does not fit; the message names the argument.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        padding: int,
        weights: Tensor,
        bias: Tensor,
        is_bhl: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_shape("weights", weights, channels, 1, kernel_size)
        check_shape("bias", bias, channels)
        self.d, self.k, self.padding, self.is_bhl = channels, kernel_size, padding, is_bhl
        taps = weights.detach().squeeze(1)
        self.weights = nn.Parameter((taps if is_bhl else taps.T).clone(memory_format=torch.contiguous_format))
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, length), or (batch, length, channels) without `is_bhl`, of any floating dtype, to as many
        channels and length + 2 padding - kernel_size + 1 positions, in the dtype of the input.

        Raises:
            RuntimeError: an even `kernel_size`; a shape, dtype or device that does not fit.
        """
        if self.k % 2 == 0:
            raise RuntimeError(f"kernel_size is {self.k}; expected an odd number")
        check_shape("input", input, *(("batch", self.d, "length") if self.is_bhl else ("batch", "length", self.d)))
        rows = input.transpose(1, 2) if self.is_bhl else input
        taps = self.weights if self.is_bhl else self.weights.T
        late = self.k - 1 - self.padding  # by so many positions the causal convolution comes later
        with without_autocast(input):
            padded = F.pad(rows, (0, 0, max(-late, 0), self.padding))
            out = causal_conv(padded, beside(input, taps), beside(input, self.bias))
        assert isinstance(out, Tensor)
        out = out[:, max(late, 0) :]
        return (out.transpose(1, 2) if self.is_bhl else out).contiguous()
