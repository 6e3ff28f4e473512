"""What layers share whose state is a matrix in each head."""

from __future__ import annotations

import torch
from torch import Tensor

from madkernels import matrix_scan
from madkernels.models.layers.base import Layer, State, StateOption, check_positive, document_of, inversely
from madkernels.models.layers.recurrence import delta_rule, linear_recurrence, without_autocast

DEVICES = {"cpu", "meta"}  # where the op is used


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None,
    state: State | None,
) -> Tensor:
    """What :func:`madkernels.matrix_scan` makes of its arguments, over each document, or from the matrix of the state on,
    which is brought up to date. What decays may be of batch 1 for all. In the widest dtype of q, k and v."""
    past = None if state is None or cu_seqlens is not None else state["matrix"]
    if q.device.type in DEVICES:
        y, after = scan(q, k, v, log_decay, beta, bonus, past, cu_seqlens)
    else:
        y, after = in_chunks(q, k, v, log_decay, beta, bonus, past, cu_seqlens, at_ends=state is not None)
    if state is not None:
        state["matrix"] = after
    return y


@without_autocast
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """By the op: out, and the states after each sequence (document)."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if log_decay is not None:
        log_decay = log_decay.expand(q.shape[0], -1, -1, -1)
    widest = torch.promote_types(dtype, torch.float32)
    wide = [t if t is None else t.to(widest) for t in (log_decay, beta, bonus, state)]
    found = matrix_scan(q, k, v, *wide[:3], initial_state=wide[3], cu_seqlens=cu_seqlens, return_final_state=True)
    assert isinstance(found, tuple)
    return found


def in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    at_ends: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same of torch's products, on any device; by the delta rule without a bonus. Packed documents begin without a
    state, and only `at_ends` asks for theirs at the end."""
    q, k = (t if t.shape[2] == 1 else t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
    documents: dict[str, Tensor] = {}
    if cu_seqlens is not None:
        documents = {"document": document_of(cu_seqlens, v.shape[1])} | ({"ends": cu_seqlens[1:]} if at_ends else {})
    if log_decay is None:
        log_decay = q.new_zeros(1, q.shape[1], 1, 1, dtype=torch.promote_types(q.dtype, torch.float32))
    if beta is not None:
        return delta_rule(q, k, v, beta.unsqueeze(-1), log_decay, state, **documents)
    return linear_recurrence(q, k, v, log_decay, state, **documents, bonus=bonus)
