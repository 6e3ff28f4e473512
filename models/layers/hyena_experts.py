"""Hyena experts: a mixture of Hyena operators (Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import causal_conv, fft_conv
from madkernels.models.layers.base import State, cast_once, check_positive, document_of, no_narrower
from madkernels.models.layers.hyena import LongConvLayer, taps_to_keep
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.moe import combined, routed


class HyenaExperts(LongConvLayer):
    """Each token reads from its `top_k` of `experts` Hyena operators of `hidden` channels, weighted by a softmax over their
    router scores; one projection leads out of their sum.

    Every expert's convolution sees every token, whoever reads it: a token may be read long after it came in, by one that is
    routed elsewhere. So projections and convolutions are dense in cost; sparse is what reaches the output and its gradient.
    Scores and weights are in float32 at least, and of equal scores the lower expert's comes first.

    With `sparse`, an expert sees the tokens alone that chose it, one after another as if there were no others: top_k of
    `experts` parts of the work. The layer then waits for the device, to learn how many each has.

    Args:
        experts, hidden, top_k, sparse: see above.
        width, order, horizon, taps, turns, frequency: as of :class:`Hyena`.
    """

    def __init__(
        self, dim: int, *, experts: int = 8, top_k: int = 2, hidden: int = 16, width: int = 3, order: int = 16,
        horizon: int = 128, taps: int = 0, sparse: bool = False, turns: float = 1.0, frequency: float = 10.0,
    ) -> None:  # fmt: skip
        check_positive(experts=experts, top_k=top_k, hidden=hidden, width=width, order=order, horizon=horizon)
        if top_k > experts:
            raise ValueError(f"top_k {top_k} is more than there are experts, {experts}")
        inner = experts * hidden
        super().__init__(
            dim, projected=3 * inner, repeats=1, width=width, channels=inner, filters=inner, order=order, horizon=horizon,
            taps=taps, turns=turns, frequency=frequency,
        )  # fmt: skip
        self.experts, self.top_k, self.hidden, self.sparse = experts, top_k, hidden, sparse
        self.router = Linear(dim, experts, bias=False)
        self.out = Linear(hidden, dim)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        x = cast_once(x)
        if self.sparse:
            return self.by_experts(x, cu_seqlens, state)
        q, k, v = self.project(x, cu_seqlens, state)
        weighted = q * self.weights(x).to(q.dtype).repeat_interleave(self.hidden, dim=-1)
        mixed = self.convolve(v, cu_seqlens, state, pre_gate=k, post_gate=weighted)
        y: Tensor = self.out(mixed.reshape(*x.shape[:2], self.experts, self.hidden).sum(-2))
        return y

    def weights(self, x: Tensor) -> Tensor:
        """(batch, seqlen, experts): of a token's experts its softmax, of the others zero."""
        scores, chosen = self.router(x).sort(dim=-1, descending=True, stable=True)
        scores, chosen = scores[..., : self.top_k], chosen[..., : self.top_k]
        weights: Tensor = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
        return weights.new_zeros(*x.shape[:-1], self.experts).scatter(-1, chosen, weights)

    def by_experts(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> Tensor:
        """`forward` where each expert sees its tokens alone: rows of the plan, in which sequences follow one another."""
        batch, seqlen, _ = x.shape
        tokens = x.reshape(-1, self.dim)
        plan = routed(self.router(tokens), self.top_k)
        if cu_seqlens is None:
            sequence, count = torch.arange(batch, device=x.device).repeat_interleave(seqlen), batch
        else:
            sequence, count = document_of(cu_seqlens, seqlen), len(cu_seqlens) - 1
        of_rows, bounds = plan.slots.long() // self.top_k, plan.offsets.tolist()
        begins = torch.arange(count + 1, device=x.device)
        taps = seqlen if state is None else taps_to_keep(x, state["past"], cu_seqlens)
        filters = self.filter(taps, torch.promote_types(x.dtype, torch.float32))
        mixed, states = [], []
        for expert in range(self.experts):
            rows = of_rows[bounds[expert] : bounds[expert + 1]]
            offsets = torch.searchsorted(sequence[rows], begins).int()
            of_expert, after = self.expert(expert, tokens[rows].unsqueeze(0), offsets, filters, state)
            mixed.append(of_expert.squeeze(0))
            states.append(after)
        if state is not None:
            conv, past = zip(*states, strict=True)
            state["conv"] = no_narrower(torch.stack(conv, -2).flatten(2), state["conv"])
            state["past"] = torch.cat(past, -1)
        y: Tensor = self.out(combined(torch.cat(mixed), plan))
        return y.view(x.shape)

    def expert(
        self, expert: int, x: Tensor, offsets: Tensor, filters: Tensor, state: State | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One expert on its tokens (1, rows, dim), packed: (1, rows, hidden). Its part of the states, (sequences, width - 1,
        3, hidden) and (sequences, past, hidden), comes with it where there is one."""
        channels = slice(expert * self.hidden, (expert + 1) * self.hidden)

        def own(t: Tensor) -> Tensor:  # of what has 3 experts hidden channels, q, k and v of all experts
            return t.view(3, -1, *t.shape[1:])[:, channels].flatten(0, 1)

        bias = None if self.in_proj.bias is None else own(self.in_proj.bias)
        projected = F.linear(x, own(self.in_proj.weight), bias)
        before = past = None
        if state is not None:
            before = state["conv"].reshape(*state["conv"].shape[:2], 3, -1)[..., channels].flatten(2).to(projected.dtype)
            past = state["past"][..., channels]
        qkv, conv = causal_conv(
            projected, own(self.conv_weight), None if self.conv_bias is None else own(self.conv_bias),
            initial_state=before, cu_seqlens=offsets, return_final_state=True,
        )  # fmt: skip
        q, k, v = qkv.chunk(3, dim=-1)
        conv = conv.view(*conv.shape[:2], 3, -1)
        if filters.shape[1] == 0:
            return v, (conv, v)
        y, after = fft_conv(
            v, filters[channels], skip=self.skip[channels].to(filters.dtype), pre_gate=k, post_gate=q, cu_seqlens=offsets,
            initial_state=past, return_final_state=True,
        )  # fmt: skip
        return y, (conv, after)

    def flops(self, seqlen: int) -> int:
        """FLOPs with E experts of hidden width F: projections 6 L D E F and 2 L D F, router 2 L D E, and those of
        :meth:`long_conv_flops`, with E F channels; `sparse`, of those of experts (their filters aside) top_k parts of E."""
        of_experts = 2 * seqlen * self.in_proj.weight.numel() + self.long_conv_flops(seqlen)
        if self.sparse:
            filters = 0 if self.taps else 2 * seqlen * len(self.skip) * self.order
            of_experts = filters + (of_experts - filters) * self.top_k // self.experts
        return of_experts + 2 * seqlen * (self.out.weight.numel() + self.router.weight.numel())
