"""Multi-head causal attention with rotary positions (Vaswani et al. 2017; Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels import attention, attention_step
from madkernels.models.layers import kv_cache
from madkernels.models.layers.base import Layer, State, check_positive, document_of

ROTARY_BASE = 10000.0
DEVICES = {"cpu", "meta"}  # where the op is used; its CUDA kernels have not run on a GPU yet


class Attention(Layer):
    """Softmax attention; rotary over the whole head, biases on all projections."""

    is_attention = True
    state_grows = True
    window: int | None = None  # how far back a query sees, itself included; None: to the first token

    def __init__(self, dim: int, *, heads: int = 16) -> None:
        super().__init__(dim)
        check_positive(heads=heads)
        if dim % heads or dim // heads % 2:
            raise ValueError(f"dim {dim} does not divide into {heads} heads of even width; take another dim or heads=")
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        seqlen = x.shape[1]
        positions = torch.arange(seqlen, device=x.device)
        if state is not None:
            positions = positions + state["position"]
        if cu_seqlens is not None:
            positions = positions - cu_seqlens[document_of(cu_seqlens, seqlen)]
        q, k, v = self.project(x, positions)
        if state is not None:
            k, v = self.remember(k, v, state, seqlen)
        mixed: Tensor = self.out(attend(q, k, v, self.window, cu_seqlens).flatten(2))
        return mixed

    def step(self, x: Tensor, state: State) -> Tensor:
        if x.device.type not in DEVICES or not kv_cache.can_append(x, *state.values()):
            return super().step(x, state)
        self.check(x.unsqueeze(1), None, state)
        q, k, v = (t.squeeze(1) for t in self.project(x.unsqueeze(1), state["position"].view(1)))
        keys, values = (kv_cache.append(state[name], new, self.window) for name, new in (("k", k), ("v", v)))
        state |= {"k": keys, "v": values, "position": state["position"] + 1}
        seen = torch.full((x.shape[0],), keys.shape[1], dtype=torch.int32, device=x.device)
        y = attention_step(q.to(keys.dtype), keys, values, cache_seqlens=seen)
        mixed: Tensor = self.out(y.to(q.dtype).flatten(1))
        return mixed

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, and values, (batch, seqlen, heads, head_dim) each."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim).unbind(2)
        return rotate(q, positions), rotate(k, positions), v

    def remember(self, k: Tensor, v: Tensor, state: State, seqlen: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole past, which become the state, as far as the window reaches."""
        dtype = torch.promote_types(k.dtype, state["k"].dtype)  # under autocast, too, a state keeps its precision
        keys, values = (torch.cat([state[name], new.to(dtype)], dim=1) for name, new in (("k", k), ("v", v)))
        keep = keys.shape[1] if self.window is None else min(keys.shape[1], self.window)
        state |= {"k": keys[:, -keep:], "v": values[:, -keep:], "position": state["position"] + seqlen}
        return keys.to(k.dtype), values.to(v.dtype)

    def init_state(self, batch: int) -> State:
        empty = self.zeros(batch, 0, self.heads, self.head_dim)
        return {"k": empty, "v": empty, "position": self.zeros(dtype=torch.int64)}

    def seen(self, seqlen: int) -> int:
        return seqlen if self.window is None else min(seqlen, self.window)

    def state_size(self, seqlen: int) -> int:
        return 2 * self.dim * self.seen(seqlen)

    def flops(self, seqlen: int) -> int:
        """Projections 8 L D^2, scores and mixing 4 L S D, softmax 2 H L S, for S keys a query."""
        pairs = seqlen * self.seen(seqlen)
        return 8 * seqlen * self.dim**2 + 4 * pairs * self.dim + 2 * self.heads * pairs


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """Causal attention, (batch, seqlen, heads, head_dim); by torch's own where the op is not used."""
    if q.device.type in DEVICES:
        return attention(q, k, v, causal=True, window=window, cu_seqlens_q=cu_seqlens)
    queries, keys = q.shape[1], k.shape[1]
    back = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    mask = back >= 0
    if window is not None:
        mask &= back < window
    if cu_seqlens is not None:
        document = document_of(cu_seqlens, queries)
        mask &= document[:, None] == document
    plain = cu_seqlens is None and window is None and queries == keys
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if plain else mask, is_causal=plain)
    return y.transpose(1, 2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of x (batch, seqlen, heads, head_dim): pairs (i, i + head_dim / 2)."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = ROTARY_BASE ** -(torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions.to(dtype)[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
