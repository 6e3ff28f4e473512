"""What every layer offers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# What a layer remembers of a sequence between calls, by name. `forward` and `step` replace its tensors.
State = dict[str, Tensor]


class Layer(nn.Module):
    """One residual branch of a model: (batch, seqlen, dim) to (batch, seqlen, dim), causal along the sequence.

    A layer is built as ``Cls(dim, **options)``; its options are the keyword-only arguments of its class, with defaults.
    """

    dim: int

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        """The whole sequence.

        Args:
            x: (batch, seqlen, dim).
            cu_seqlens: offsets of packed documents, (num_docs + 1,) int32; batch must be 1. Nothing passes between them.
            state: continues the sequences that left it, and is brought up to date. Not together with `cu_seqlens`.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token: x (batch, dim) to (batch, dim); brings `state` up to date."""
        return self.forward(x.unsqueeze(1), state=state).squeeze(1)

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        return {}

    def state_size(self, seqlen: int) -> int:
        """Elements that the layer keeps for one sequence of this length. Taps of short convolutions are not counted."""
        return 0

    def flops(self, seqlen: int) -> int:
        """Operations of `forward` for one sequence, a multiply-add being two. What causality spares is not taken off."""
        raise NotImplementedError

    def active_params(self) -> int:
        """Parameters that one token uses."""
        return sum(p.numel() for p in self.parameters())

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros on the device of the parameters, in their dtype unless told otherwise."""
        like = next(self.parameters())
        return torch.zeros(shape, device=like.device, dtype=dtype or like.dtype)


def refuse_state_with_documents(cu_seqlens: Tensor | None, state: State | None) -> None:
    if cu_seqlens is not None and state is not None:
        raise ValueError("a state cannot be continued by packed documents: give cu_seqlens or state, not both")


def document_of(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """The number of the document that each position lies in, (seqlen,) int64."""
    positions = torch.arange(seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
