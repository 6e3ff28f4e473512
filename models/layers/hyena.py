"""Hyena: gated long convolution (Poli et al. 2023, arXiv 2302.10866), of order 2, and what its relatives share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from madkernels import causal_conv, fft_conv
from madkernels.models.layers.base import Layer, State, StateOption, check_positive, no_narrower
from madkernels.models.layers.filters import ExplicitFilter, ImplicitFilter, ModalFilter, multiply
from madkernels.models.layers.linear import Linear


class LongConvLayer(Layer):
    """Projections through a short convolution, and a long convolution with its skip: what each Hyena layer puts together.

    Args:
        projected: channels of q, k and v together before they are repeated `repeats` times.
        channels: of the long convolution; neighbouring ones share one of `filters` filters and skips.
        taps: 0 for an implicit filter, whose state is all that went in; else those of an explicit one, whose state is the
            last taps - 1 inputs.
        modal: a filter of `order` poles, whose state is a complex number for each.
        turns, frequency: of an implicit filter.
    """

    state_option = StateOption("order")
    packs_states = True
    out: nn.Linear

    def __init__(
        self, dim: int, *, projected: int, repeats: int, width: int, channels: int, filters: int, order: int, horizon: int,
        taps: int, modal: bool = False, turns: float = 1.0, frequency: float = 10.0,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        check_filter(taps, turns, frequency)
        self.repeats, self.width, self.channels, self.order, self.taps = repeats, width, channels, order, taps
        self.in_proj = Linear(dim, projected)
        short = repeats * projected
        conv = nn.Conv1d(short, short, width, groups=short)  # for its initialisation
        self.conv_weight = nn.Parameter(conv.weight.detach().squeeze(1))  # (short, width)
        self.conv_bias = nn.Parameter(conv.bias.detach()) if conv.bias is not None else None
        self.filter: ExplicitFilter | ModalFilter | ImplicitFilter
        if taps:
            self.filter = ExplicitFilter(filters, taps)
        elif modal:
            self.filter = ModalFilter(filters, order, horizon)
        else:
            self.filter = ImplicitFilter(filters, order, horizon, turns, frequency)
        self.skip = nn.Parameter(torch.randn(filters))

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        """out(q * (filter conv (k * v))), unless a layer says otherwise."""
        self.check(x, cu_seqlens, state)
        q, k, v = self.project(x, cu_seqlens, state)
        y: Tensor = self.out(self.convolve(v, cu_seqlens, state, pre_gate=k, post_gate=q))
        return y

    def project(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        projected = self.in_proj(x).repeat(1, 1, self.repeats)
        before = None if state is None else state["conv"].to(projected.dtype)
        qkv, after = causal_conv(
            projected, self.conv_weight, self.conv_bias,
            initial_state=before, cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        if state is not None:
            state["conv"] = no_narrower(after, state["conv"])
        assert isinstance(qkv, Tensor)
        q, k, v = qkv.chunk(3, dim=-1)
        return q, k, v

    def convolve(
        self, v: Tensor, cu_seqlens: Tensor | None, state: State | None, pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """post_gate * (filter conv (pre_gate * v) + skip * pre_gate * v), all (batch, seqlen, channels)."""
        if state is not None and isinstance(self.filter, ModalFilter):
            return self.convolve_from_modes(self.filter, v, cu_seqlens, state, pre_gate, post_gate)
        wide = torch.promote_types(v.dtype, torch.float32)
        past = None if state is None else state["past"]
        filters = self.filter(v.shape[1] if past is None else taps_to_keep(v, past, cu_seqlens), wide)
        if filters.shape[1] == 0:
            return v
        skip = self.skip.repeat_interleave(self.channels // len(self.skip)).to(wide)
        mixed = fft_conv(
            v, filters, skip=skip, pre_gate=pre_gate, post_gate=post_gate, cu_seqlens=cu_seqlens, initial_state=past,
            return_final_state=state is not None,
        )  # fmt: skip
        if state is not None:
            mixed, state["past"] = mixed
        assert isinstance(mixed, Tensor)
        return mixed

    def convolve_from_modes(
        self, modal: ModalFilter, v: Tensor, cu_seqlens: Tensor | None, state: State, pre_gate: Tensor | None,
        post_gate: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`convolve`, in float32 at least; what the modes of the state still give is added before the post_gate.
        With documents the host waits to learn their lengths."""
        wide = torch.promote_types(v.dtype, torch.float32)
        u = v.to(wide) if pre_gate is None else pre_gate.to(wide) * v.to(wide)
        if u.shape[1] == 0:
            return v
        y = fft_conv(u, modal(u.shape[1], wide), skip=self.skip.to(wide), cu_seqlens=cu_seqlens)
        assert isinstance(y, Tensor)
        if cu_seqlens is None:
            y = y + modal.respond(multiply(modal.residues.to(wide), modal.advance(state["modes"], 1)), u.shape[1]).mT
            state["modes"] = modal.advance(state["modes"], u.shape[1]) + modal.gather(u)
        else:
            documents = torch.split(u, cu_seqlens.diff().tolist(), 1)
            state["modes"] = torch.cat([modal.gather(document) for document in documents])
        return (y if post_gate is None else post_gate.to(wide) * y).to(v.dtype)

    def init_state(self, batch: int) -> State:
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        conv = self.zeros(batch, self.width - 1, len(self.conv_weight))
        if isinstance(self.filter, ModalFilter):
            return {"conv": conv, "modes": self.zeros(batch, self.channels, self.order, 2, dtype=wide)}
        return {"conv": conv, "past": self.zeros(batch, max(self.taps - 1, 0), self.channels, dtype=wide)}

    def state_size(self, seqlen: int) -> int:
        """With taps or modes, what is kept. Else nominal, as the field counts it: the filter's order for each channel of the
        long convolution. Decoding keeps the whole past."""
        if isinstance(self.filter, ModalFilter):
            return self.channels * self.order * 2
        return self.channels * (self.taps - 1 if self.taps else self.order)

    def long_conv_flops(self, seqlen: int) -> int:
        """FLOPs with C channels and F filters: short convolution 2 L W for each of its channels, filter 2 L F S (4 if
        it is modal, none if explicit), long convolution 10 L log2(L) C, gates 4 L C."""
        featurisation = 0 if self.taps else (4 if isinstance(self.filter, ModalFilter) else 2) * len(self.skip) * self.order
        a_token = 2 * self.conv_weight.numel() + featurisation + 4 * self.channels
        return seqlen * a_token + int(10 * seqlen * math.log2(max(seqlen, 2))) * self.channels


def taps_to_keep(v: Tensor, past: Tensor, cu_seqlens: Tensor | None) -> int:
    """One more than a sequence, or the longest document, has inputs by then, so that the state that comes back holds all.
    Before those of shorter ones there are zeros. With documents the host waits to learn their lengths."""
    return past.shape[1] + (v.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())) + 1


class Hyena(LongConvLayer):
    """out(q * (filter conv (k * v))), with q, k, v through a short convolution.

    Args:
        expand: channels of the long convolution, over dim.
        groups: in-projections are computed for 1/groups of the channels and repeated.
        width: of the short convolution.
        order: width of the network that makes the filter, or poles of a modal one.
        horizon: tokens that are one unit of the filter's time. The filter is defined for any length: it depends on the
            distance alone, so longer inputs and decoding see the same filter.
        taps: if not 0, those of an explicit filter, learned one by one, in place of the implicit one.
        modal: a filter that is a sum of `order` exponentials, in place of the implicit one, as in StripedHyena.
        turns, frequency: of the implicit filter, periods of its cosine and sine features in a horizon, and the frequency of
            its network's sines at the start. MAD's published code has 0.0001 and 1: features that hardly move.

    Decoding is exact; with an implicit filter the t-th token costs O(t) multiply-adds per channel, with a modal one all cost
    the same.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 4,
        groups: int = 4,
        width: int = 3,
        order: int = 4,
        horizon: int = 128,
        taps: int = 0,
        modal: bool = False,
        turns: float = 1.0,
        frequency: float = 10.0,
    ) -> None:
        check_positive(expand=expand, groups=groups, width=width, order=order, horizon=horizon)
        if modal and taps:
            raise ValueError("a filter is modal or has taps, not both")
        inner = expand * dim
        if inner % groups:
            raise ValueError(f"{expand} * dim {dim} channels do not divide into {groups} groups")
        super().__init__(
            dim, projected=3 * inner // groups, repeats=groups, width=width, channels=inner, filters=inner, order=order,
            horizon=horizon, taps=taps, modal=modal, turns=turns, frequency=frequency,
        )  # fmt: skip
        self.out = Linear(inner, dim)

    def flops(self, seqlen: int) -> int:
        """FLOPs with E channels: projections 6 L D E / G and 2 L D E, and those of :meth:`long_conv_flops`."""
        linear = self.in_proj.weight.numel() + self.out.weight.numel()
        return 2 * seqlen * linear + self.long_conv_flops(seqlen)


def check_filter(taps: int, turns: float, frequency: float) -> None:
    """Raises ValueError unless taps are 0 or a number of them, and what shapes an implicit filter is above 0."""
    if taps != 0:
        check_positive(taps=taps)
    for name, value in (("turns", turns), ("frequency", frequency)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; expected a number above 0")
