"""Multi-head causal attention with rotary positions (Vaswani et al. 2017; Su et al. 2021, arXiv 2104.09864), grouped where
heads share keys and values (Ainslie et al. 2023, arXiv 2305.13245)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import attention, attention_step
from madkernels.models.layers import kv_cache
from madkernels.models.layers.base import Layer, State, can_look, check_positive, document_of, no_narrower
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.rotary import Rope, rotate

DEVICES = {"cpu", "meta"}  # where the op is used; its CUDA kernels have not run on a GPU yet


class Attention(Layer):
    """Softmax attention; rotary over the whole head.

    Args:
        heads: of the queries.
        kv_heads: of keys and values, each for neighbouring heads of queries; 0: as many as `heads`.
        head_dim: width of a head; 0: dim / heads.
        bias: whether the projections have one.
        rope_theta, rope_factor, original_length, low_freq_factor, high_freq_factor: positions, as of
            :class:`madkernels.models.layers.rotary.Rope`.

    The state: keys and values, (batch, slots, kv_heads, head_dim) each, the newest first, and `position`, (batch,): how many
    tokens each sequence has had. One that has had fewer than there are slots leaves the last ones empty.
    """

    is_attention = True
    state_grows = True
    packs_states = True
    window: int | None = None  # how far back a query sees, itself included; None: to the first token

    def __init__(
        self, dim: int, *, heads: int = 16, kv_heads: int = 0, head_dim: int = 0, bias: bool = True,
        rope_theta: float = 10000.0, rope_factor: float = 1.0, original_length: int = 0, low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        check_positive(heads=heads)
        if head_dim == 0 and dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads of even width; take another dim or heads=")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim or dim // heads
        check_positive(kv_heads=self.kv_heads, head_dim=self.head_dim)
        if self.head_dim % 2:
            raise ValueError(f"dim {dim} does not divide into {heads} heads of even width; take another dim or heads=")
        if heads % self.kv_heads:
            raise ValueError(f"{heads} heads do not divide among {kv_heads} kv_heads")
        self.rope = Rope(rope_theta, rope_factor, original_length, low_freq_factor, high_freq_factor)
        self.rope.check()
        self.qkv = Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, dim, bias=bias)

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
        """Queries (batch, seqlen, heads, head_dim) and keys with their positions, and values, (batch, seqlen, kv_heads,
        head_dim) each."""
        projected = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        turned, v = projected.split([self.heads + self.kv_heads, self.kv_heads], 2)
        q, k = torch.split(rotate(turned, positions, self.rope), [self.heads, self.kv_heads], 2)
        return q, k, v

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
        empty = self.zeros(batch, 0, self.kv_heads, self.head_dim)
        return {"k": empty, "v": empty, "position": self.zeros(batch, dtype=torch.int64)}

    def seen(self, seqlen: int) -> int:
        return seqlen if self.window is None else min(seqlen, self.window)

    def state_size(self, seqlen: int) -> int:
        return 2 * self.kv_heads * self.head_dim * self.seen(seqlen)

    def flops(self, seqlen: int) -> int:
        """Projections 2 L times their weights, scores and mixing 4 L S D for D channels of queries, softmax 2 H L S, for S
        keys a query."""
        pairs = seqlen * self.seen(seqlen)
        matrices = self.qkv.weight.numel() + self.out.weight.numel()
        return 2 * seqlen * matrices + 4 * pairs * self.heads * self.head_dim + 2 * self.heads * pairs


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None, there: Tensor | None = None
) -> Tensor:
    """Causal attention of q (batch, seqlen, heads, head_dim) over those k and v, (batch, keys, kv_heads, head_dim), that are
    `there`, (batch, keys); by torch's own where the op is not used, or not all are."""
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
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if plain else mask, is_causal=plain, enable_gqa=True)
    return y.transpose(1, 2)
