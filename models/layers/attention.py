"""Multi-head causal attention with rotary positions (Vaswani et al. 2017; Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels import attention, attention_step
from madkernels.models.layers import kv_cache
from madkernels.models.layers.base import Layer, State, can_look, check_positive, document_of, no_narrower

ROTARY_BASE = 10000.0
DEVICES = {"cpu", "meta"}  # where the op is used; its CUDA kernels have not run on a GPU yet


class Attention(Layer):
    """Softmax attention; rotary over the whole head, biases on all projections.

    The state: keys and values, (batch, slots, heads, head_dim) each, the newest first, and `position`, (batch,): how many
    tokens each sequence has had. One that has had fewer than there are slots leaves the last ones empty.
    """

    is_attention = True
    state_grows = True
    packs_states = True
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
        positions, there = torch.arange(x.shape[1], device=x.device), None
        if cu_seqlens is not None:
            positions = positions - cu_seqlens[document_of(cu_seqlens, x.shape[1])]
        elif state is not None:
            positions = positions + state["position"][:, None]
        q, k, v = self.project(x, positions)
        if state is not None and cu_seqlens is not None:
            self.fill(k, v, state, cu_seqlens)
        elif state is not None:
            k, v, there = self.remember(k, v, state)
        mixed: Tensor = self.out(attend(q, k, v, self.window, cu_seqlens, there).flatten(2))
        return mixed

    def step(self, x: Tensor, state: State) -> Tensor:
        if x.device.type not in DEVICES or not kv_cache.can_append(x, *state.values()):
            return super().step(x, state)
        self.check(x.unsqueeze(1), None, state)
        q, k, v = (t.squeeze(1) for t in self.project(x.unsqueeze(1), state["position"][:, None]))
        keys, values = (kv_cache.append(state[name], new, self.window) for name, new in (("k", k), ("v", v)))
        state |= {"k": keys, "v": values, "position": state["position"] + 1}
        kept = state["position"].clamp_max(keys.shape[1]).int()
        y = attention_step(q.to(keys.dtype), keys, values, cache_seqlens=kept)
        mixed: Tensor = self.out(y.to(q.dtype).flatten(1))
        return mixed

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, and values, (batch, seqlen, heads, head_dim) each."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim).unbind(2)
        return rotate(q, positions), rotate(k, positions), v

    def remember(self, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the whole past, oldest first, which become the state as far as the window reaches; and which
        of them there are, (batch, keys), None for all. One token alone sees all of its window, in whatever order."""
        seqlen, slots = k.shape[1], state["k"].shape[1]
        dtype = torch.promote_types(k.dtype, state["k"].dtype)  # under autocast, too, a state keeps its precision
        keys, values = (torch.cat([new.to(dtype).flip(1), state[name]], dim=1) for name, new in (("k", k), ("v", v)))
        there, missing = None, state["position"] < slots
        if slots and not (can_look(missing) and not missing.any()):
            there = torch.arange(slots + seqlen, device=k.device) < state["position"][:, None] + seqlen
        kept = slice(self.seen(slots + seqlen))
        state |= {"k": keys[:, kept], "v": values[:, kept], "position": state["position"] + seqlen}
        if seqlen == 1:
            keys, values, there = keys[:, kept], values[:, kept], None if there is None else there[:, kept]
        else:
            keys, values, there = keys.flip(1), values.flip(1), None if there is None else there.flip(1)
        return keys.to(k.dtype), values.to(v.dtype), there

    def fill(self, k: Tensor, v: Tensor, state: State, cu_seqlens: Tensor) -> None:
        """The state at each document's end, as far as the window reaches. The host waits to learn their lengths."""
        lengths = cu_seqlens.diff()
        back = torch.arange(self.seen(int(lengths.max())), device=k.device)
        rows = (cu_seqlens[1:, None] - 1 - back).clamp_min(0)
        empty = (back >= lengths[:, None])[..., None, None]
        for name, new in (("k", k), ("v", v)):
            state[name] = no_narrower(new[0, rows].masked_fill(empty, 0.0), state[name])
        state["position"] = state["position"] + lengths

    def init_state(self, batch: int) -> State:
        empty = self.zeros(batch, 0, self.heads, self.head_dim)
        return {"k": empty, "v": empty, "position": self.zeros(batch, dtype=torch.int64)}

    def seen(self, seqlen: int) -> int:
        return seqlen if self.window is None else min(seqlen, self.window)

    def state_size(self, seqlen: int) -> int:
        return 2 * self.dim * self.seen(seqlen)

    def flops(self, seqlen: int) -> int:
        """Projections 8 L D^2, scores and mixing 4 L S D, softmax 2 H L S, for S keys a query."""
        pairs = seqlen * self.seen(seqlen)
        return 8 * seqlen * self.dim**2 + 4 * pairs * self.dim + 2 * self.heads * pairs


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None, there: Tensor | None = None
) -> Tensor:
    """Causal attention, (batch, seqlen, heads, head_dim), over keys that are `there`, (batch, keys); by torch's own where
    the op is not used, or not all are."""
    if q.device.type in DEVICES and there is None:
        return attention(q, k, v, causal=True, window=window, cu_seqlens_q=cu_seqlens)
    queries, keys = q.shape[1], k.shape[1]
    back = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    mask = back >= 0
    if window is not None:
        mask &= back < window
    if cu_seqlens is not None:
        document = document_of(cu_seqlens, queries)
        mask &= document[:, None] == document
    if there is not None:
        mask = mask & there[:, None, None]
    plain = cu_seqlens is None and window is None and queries == keys and there is None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if plain else mask, is_causal=plain)
    return y.transpose(1, 2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of x (batch, seqlen, heads, head_dim) at positions (seqlen,) or (batch, seqlen): pairs
    (i, i + head_dim / 2)."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = ROTARY_BASE ** -(torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions.to(dtype)[..., None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
