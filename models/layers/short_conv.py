"""What layers do to a token's neighbours before they mix: a short causal convolution, or a look at the token before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from madkernels import causal_conv
from madkernels.models.layers.base import State, no_narrower


class ShortConv(nn.Module):
    """A depthwise causal convolution and SiLU, initialised as torch.nn.Conv1d."""

    def __init__(self, channels: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        conv = nn.Conv1d(channels, channels, width, groups=channels, bias=bias)
        self.weight = nn.Parameter(conv.weight.detach().squeeze(1))  # (channels, width)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach())

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> Tensor:
        """x (batch, seqlen, channels); brings ``state["conv"]`` up to date."""
        y, after = causal_conv(
            x, self.weight, self.bias, activation="silu", cu_seqlens=cu_seqlens, return_final_state=True,
            initial_state=None if state is None else state["conv"].to(x.dtype),
        )  # fmt: skip
        if state is not None:
            state["conv"] = no_narrower(after, state["conv"])
        assert isinstance(y, Tensor)
        return y

    def init_state(self, batch: int) -> Tensor:
        channels, width = self.weight.shape
        return self.weight.new_zeros(batch, width - 1, channels).detach()

    def flops(self, seqlen: int) -> int:
        return 2 * seqlen * self.weight.numel()


def token_before(x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> Tensor:
    """The token before each token of x (batch, seqlen, dim), zeros at the start of a document; keeps the last of each
    sequence in ``state["before"]`` (batch, 1, dim)."""
    carried = None if state is None or cu_seqlens is not None else state["before"].to(x.dtype)
    both = torch.cat([x.new_zeros(x.shape[0], 1, x.shape[2]) if carried is None else carried, x], 1)
    before, last = both[:, :-1], both[:, -1:]
    if cu_seqlens is not None:
        position = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
        before = before.masked_fill(torch.isin(position, cu_seqlens)[:, None], 0.0)
        last = both[0, cu_seqlens[1:, None]].masked_fill((cu_seqlens.diff() == 0)[:, None, None], 0.0)
    if state is not None:
        state["before"] = no_narrower(last, state["before"])
    return before
