"""What layers share whose state is a matrix in each head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madkernels.models.layers.base import Layer, State, StateOption, check_positive, document_of, inversely


class MatrixStateLayer(Layer):
    """A layer whose state is, in each head, a matrix of `key_dim` by `value_dim`.

    Raises:
        ValueError: dim does not divide into the heads.
    """

    state_option = StateOption("heads", inversely)
    packs_states = True

    def __init__(self, dim: int, heads: int, *, expand: int = 1) -> None:
        super().__init__(dim)
        check_positive(heads=heads, expand=expand)
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads; take another dim or heads=")
        self.heads, self.key_dim, self.value_dim = heads, dim // heads, expand * dim // heads

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, seqlen, channels) to (batch, seqlen, heads, channels of a head)."""
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    def init_state(self, batch: int) -> State:
        wide = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        return {"matrix": self.zeros(batch, self.heads, self.key_dim, self.value_dim, dtype=wide)}

    def state_size(self, seqlen: int) -> int:
        return self.heads * self.key_dim * self.value_dim

    def flops(self, seqlen: int) -> int:
        """Twice each matrix parameter, and for each element of the state a multiply-add to write and one to read: as the
        recurrence is stated; its chunked form does more."""
        matrices = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        return seqlen * (2 * matrices + 4 * self.state_size(seqlen))


def recur(
    recurrence: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    *inputs: Tensor,
    cu_seqlens: Tensor | None,
    state: State | None,
    **options: Any,
) -> Tensor:
    """What a recurrence (of recurrence.py) makes of q (batch, seqlen, heads, key_dim) and the rest, over each document, or
    from the matrix of the state on, which is brought up to date."""
    document = ends = past = None
    if cu_seqlens is not None:
        document, ends = document_of(cu_seqlens, q.shape[1]), None if state is None else cu_seqlens[1:]
    elif state is not None:
        past = state["matrix"]
    y, after = recurrence(q, *inputs, past, document=document, ends=ends, **options)
    if state is not None:
        state["matrix"] = after
    return y
