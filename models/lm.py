"""The hybrid language model: a stack of pre-norm residual layers between embedding and unembedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from madkernels.models.generation import new_tokens
from madkernels.models.init import init_embedding
from madkernels.models.layers import Layer, State
from madkernels.models.layers.base import check_positive, wide
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.norm import RMSNorm
from madkernels.models.pretrained import from_pretrained, save_pretrained
from madkernels.models.spec import Architecture, parse

NORM_EPS = 1e-5


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
Place = Callable[[nn.Module, nn.Module], None]


class Backbone(nn.Module):
    """x = x + layer(norm(x)), layer after layer, then a last norm: (batch, seqlen, dim) to (batch, seqlen, dim).

    `recompute` makes the contexts of torch.utils.checkpoint where the backward is to compute layers again. With
    `float32_residual` the sum x is in float32 at least, whatever the dtype that norms and layers compute in.
    """

    recompute: Callable[[], Contexts] | None = None

    def __init__(
        self, arch: Architecture, dim: int, place: Place | None = None, *, norm_eps: float = NORM_EPS,
        float32_residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.float32_residual = float32_residual
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for spec in arch.layers:
            norm, layer = RMSNorm(dim, eps=norm_eps), spec.build(dim)
            if place:
                place(norm, layer)
            self.layers.append(layer)
            self.norms.append(norm)
        self.norm = RMSNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, states: list[State] | None = None) -> Tensor:
        x, dtype = self.residual(x), x.dtype
        for norm, layer, state in zip(self.norms, self.layers, states or repeat(None), strict=states is not None):

            def branch(x: Tensor, norm: nn.Module = norm, layer: nn.Module = layer, state: State | None = state) -> Tensor:
                y: Tensor = layer(norm(x.to(dtype)), cu_seqlens=cu_seqlens, state=state)
                return y

            again = self.recompute
            x = x + (branch(x) if again is None else checkpoint(branch, x, use_reentrant=False, context_fn=again))
        y: Tensor = self.norm(x.to(dtype))
        return y

    def step(self, x: Tensor, states: list[State]) -> Tensor:
        x, dtype = self.residual(x), x.dtype
        for norm, layer, state in zip(self.norms, self.layers, states, strict=True):
            assert isinstance(layer, Layer)
            x = x + layer.step(norm(x.to(dtype)), state)
        y: Tensor = self.norm(x.to(dtype))
        return y

    def residual(self, x: Tensor) -> Tensor:
        return wide(x) if self.float32_residual else x

    def init_state(self, batch: int) -> list[State]:
        return [layer.init_state(batch) for layer in self.layers if isinstance(layer, Layer)]


class HybridLM(nn.Module):
    """A language model of any architecture string.

    Args:
        arch: the stack of layers, such as "4*(hyena swiglu) attention swiglu".
        vocab_size: number of tokens.
        dim: width of the residual stream.
        tied: whether the unembedding is the embedding, without a bias; otherwise it is a linear layer of its own.
        unembedding_bias: whether one of its own has a bias.
        norm_eps: what norms between layers add to the mean square.
        float32_residual: whether the sum over layers is in float32 at least, in a model of lower precision too.
        place: called with each layer's norm and the layer as soon as it is made, to move or shard it: a large model is then
            nowhere in one piece.

    Raises:
        SpecError: the string cannot be read. ValueError: a layer does not go with this width.
    """

    def __init__(
        self,
        arch: Architecture | str,
        *,
        vocab_size: int,
        dim: int = 128,
        tied: bool = False,
        unembedding_bias: bool = True,
        norm_eps: float = NORM_EPS,
        float32_residual: bool = False,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, dim=dim)
        self.arch = parse(arch) if isinstance(arch, str) else arch
        self.vocab_size, self.dim, self.tied = vocab_size, dim, tied
        self.embedding = nn.Embedding(vocab_size, dim)
        init_embedding(self.embedding)
        self.norm_eps, self.float32_residual = norm_eps, float32_residual
        self.backbone = Backbone(self.arch, dim, place, norm_eps=norm_eps, float32_residual=float32_residual)
        self.unembedding = Linear(dim, vocab_size, bias=unembedding_bias and not tied)
        self.tie()

    def tie(self) -> None:
        """Makes the unembedding the embedding again, where it is to be and each was given memory of its own."""
        if self.tied:
            self.unembedding.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HybridLM:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = super().load_state_dict(state_dict, strict, assign)
        self.tie()
        return found

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, states: list[State] | None = None) -> Tensor:
        """tokens (batch, seqlen) int64 to logits (batch, seqlen, vocab_size); `states` as in :class:`Layer`."""
        check_tokens(tokens)
        logits: Tensor = self.unembedding(self.backbone(self.embedding(tokens), cu_seqlens=cu_seqlens, states=states))
        return logits

    def init_state(self, batch: int) -> list[State]:
        """The state of each layer before the first token."""
        return self.backbone.init_state(batch)

    def step(self, tokens: Tensor, states: list[State]) -> Tensor:
        """tokens (batch,) to logits (batch, vocab_size); brings the states up to date."""
        logits: Tensor = self.unembedding(self.backbone.step(self.embedding(tokens), states))
        return logits

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues prompt (batch, seqlen >= 1) to (batch, seqlen + max_new_tokens).

        :func:`madkernels.models.generation.continue_prompts` takes prompts of unequal lengths, and ends at a token.

        Args:
            prompt: int64 tokens.
            max_new_tokens: number of tokens to add to each row.
            temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
            top_k: draw among so many of the likeliest tokens.
            top_p: draw among the likeliest tokens that have this share of the probability together.
            generator: what draws.
        """
        check_tokens(prompt)
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        new = [token.unsqueeze(1) for token in new_tokens(self, prompt, max_new_tokens, **options)]
        return torch.cat([prompt, *new], dim=1)

    def save_pretrained(self, folder: str | Path, **more: Any) -> None:
        """Writes `config.json` and `model.safetensors` to a folder; `more` goes to the config."""
        save_pretrained(self, Path(folder), **more)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> HybridLM:
        """The model of a folder that `save_pretrained` or `madkernels train export` wrote, on the CPU.

        Args:
            folder: its path.
            dtype: of the parameters; as they were saved if None.

        Raises:
            ValueError: it is no such folder, or the architecture is not known here.
        """
        model = from_pretrained(Path(folder))
        return model if dtype is None else model.to(dtype)


def check_tokens(tokens: Tensor) -> None:
    """Raises ValueError unless these are (batch, seqlen) integers that an embedding takes."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens has dtype {tokens.dtype} and shape {tuple(tokens.shape)}; expected int64 (batch, seqlen)")
