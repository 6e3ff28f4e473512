"""The mixers of RWKV-5 and RWKV-6 (Peng et al. 2024, arXiv 2404.05892).

A token is first mixed with the one before it, channel by channel. At the start the mixing and the decays are those of a
first layer of the published models, whatever the depth: a layer does not know where it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models.layers.base import Layer, State, StateOption, check_positive, wide
from madkernels.models.layers.linear import Linear, linear
from madkernels.models.layers.matrix_state import MatrixStateLayer, recur
from madkernels.models.layers.short_conv import token_before

HEAD_DIVISOR = 8  # of a head's output before its norm, whose epsilon is 1e-5


class TimeMixer(MatrixStateLayer):
    """What versions 5 and 6 share: ``y[t] = r[t] (S[t-1] + bonus k[t] v[t]')`` and ``S[t] = decay[t] S[t-1] + k[t] v[t]'``,
    heads normed, and gated by a SiLU. `mixed_inputs` and `log_decay` are theirs."""

    state_option = StateOption("head_dim")

    def __init__(self, dim: int, head_dim: int) -> None:
        check_positive(head_dim=head_dim)
        if dim % head_dim:
            raise ValueError(f"dim {dim} does not divide into heads of {head_dim}; take another dim or head_dim=")
        super().__init__(dim, dim // head_dim)
        channel = torch.arange(dim) / max(dim - 1, 1)
        self.decay = nn.Parameter(-6 + 5 * channel**0.7)
        self.bonus = nn.Parameter(0.1 * ((torch.arange(dim) + 1) % 3 - 1))
        self.r, self.k, self.v, self.g, self.out = (Linear(dim, dim, bias=False) for _ in range(5))
        self.norm = nn.GroupNorm(self.heads, dim, eps=1e-5)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        for_r, for_k, for_v, for_g, for_decay = self.mixed_inputs(x, token_before(x, cu_seqlens, state))
        r, k, v = (self.split_heads(t) for t in (self.r(for_r), self.k(for_k), self.v(for_v)))
        log_decay = self.split_heads(self.log_decay(for_decay))
        bonus = self.bonus.view(self.heads, self.key_dim)
        y = recur(r, k, v, log_decay, bonus=bonus, cu_seqlens=cu_seqlens, state=state)
        normed = self.norm(y.flatten(2).flatten(0, 1).to(self.norm.weight.dtype) / HEAD_DIVISOR).view(x.shape)
        mixed: Tensor = self.out(normed * F.silu(self.g(for_g)))
        return mixed

    def mixed_inputs(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """What r, k, v, g and the decay are made from, each like x."""
        raise NotImplementedError

    def log_decay(self, x: Tensor) -> Tensor:
        """(batch or 1, seqlen, dim), in float32 at least."""
        raise NotImplementedError

    def init_state(self, batch: int) -> State:
        return super().init_state(batch) | {"before": self.zeros(batch, 1, self.dim)}


class RWKV5TimeMixer(TimeMixer):
    """RWKV-5: decays and mixing are parameters, one per channel."""

    undecayed = ("mix",)

    def __init__(self, dim: int, *, head_dim: int = 16) -> None:
        super().__init__(dim, head_dim)
        channel = torch.arange(dim) / dim
        self.mix = nn.Parameter(
            torch.stack([channel**0.5, channel, channel, channel**0.5])
        )  # of r, k, v, g: share of the token

    def mixed_inputs(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        return (*(before + (x - before) * mix.to(x.dtype) for mix in self.mix), x)

    def log_decay(self, x: Tensor) -> Tensor:
        return -wide(self.decay).exp().expand(1, x.shape[1], -1)


class RWKV6TimeMixer(TimeMixer):
    """RWKV-6: decays and mixing follow the input, through `decay_rank` and `mix_rank` dimensions."""

    undecayed = ("mix",)

    def __init__(self, dim: int, *, head_dim: int = 16, mix_rank: int = 32, decay_rank: int = 64) -> None:
        super().__init__(dim, head_dim)
        check_positive(mix_rank=mix_rank, decay_rank=decay_rank)
        channel = torch.arange(dim) / dim
        roots = [channel**0.5, channel, channel, channel**0.5, channel]  # of r, k, v, g, decay
        self.mix = nn.Parameter(1 - torch.stack(roots))  # share of the token before
        self.first_mix = nn.Parameter(1 - channel)
        self.mix_down = nn.Parameter(torch.empty(5 * mix_rank, dim).uniform_(-1e-4, 1e-4))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-1e-4, 1e-4))
        self.decay_down = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-1e-4, 1e-4))
        self.decay_up = nn.Parameter(torch.empty(dim, decay_rank).uniform_(-1e-4, 1e-4))

    def mixed_inputs(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        back = before - x
        low = torch.tanh(linear(x + back * self.first_mix.to(x.dtype), self.mix_down)).view(
            *x.shape[:2], *self.mix_up.shape[:2]
        )
        shares = torch.einsum("blir,ird->ibld", low, self.mix_up.to(low.dtype)) + self.mix.to(low.dtype)[:, None, None]
        return tuple(x + back * share for share in shares)

    def log_decay(self, x: Tensor) -> Tensor:
        return -(wide(self.decay) + wide(linear(torch.tanh(linear(x, self.decay_down)), self.decay_up))).exp()


class RWKVChannelMixer(Layer):
    """Squared ReLU between two linear layers, gated by a sigmoid of the receptance; the same function in versions 5 and
    6."""

    mixes = "channel"
    packs_states = True
    undecayed = ("mix",)

    def __init__(self, dim: int, *, expand: int = 4) -> None:
        super().__init__(dim)
        check_positive(expand=expand)
        self.mix = nn.Parameter((torch.arange(dim) / dim).expand(2, -1).clone())  # of key and receptance: share of the token
        self.key = Linear(dim, expand * dim, bias=False)
        self.value = Linear(expand * dim, dim, bias=False)
        self.receptance = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        before = token_before(x, cu_seqlens, state)
        for_key, for_receptance = (before + (x - before) * mix.to(x.dtype) for mix in self.mix)
        y: Tensor = self.value(F.relu(self.key(for_key)).square()) * self.receptance(for_receptance).sigmoid()
        return y

    def init_state(self, batch: int) -> State:
        return {"before": self.zeros(batch, 1, self.dim)}

    def state_size(self, seqlen: int) -> int:
        return 0  # the token before is a tap of a short convolution

    def flops(self, seqlen: int) -> int:
        """2 L D (2 F + D)."""
        return 2 * seqlen * self.dim * (2 * self.key.out_features + self.dim)
