"""The auto-encoder of MAD's compression task (Poli et al. 2024, arXiv 2403.17844): a sequence through one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from madkernels.models.init import init_embedding
from madkernels.models.layers.base import check_positive
from madkernels.models.layers.linear import Linear
from madkernels.models.layers.norm import RMSNorm
from madkernels.models.lm import NORM_EPS, Backbone, check_tokens
from madkernels.models.spec import Architecture, parse


class AutoEncoder(nn.Module):
    """Encodes a sequence into the backbone's last vector and decodes every token from it.

    To the last position's vector a fixed sinusoid is added for each position; a decoder shared by all positions (twice norm,
    linear, GELU, not expanding) and a linear layer give the token there.

    Args:
        arch, vocab_size, dim: as in :class:`HybridLM`.
        seqlen: length of the sequences, which is fixed.
    """

    def __init__(self, arch: Architecture | str, *, vocab_size: int, seqlen: int, dim: int = 128) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, dim=dim, seqlen=seqlen)
        self.arch = parse(arch) if isinstance(arch, str) else arch
        self.vocab_size, self.dim, self.seqlen = vocab_size, dim, seqlen
        self.embedding = nn.Embedding(vocab_size, dim)
        init_embedding(self.embedding)
        self.backbone = Backbone(self.arch, dim)
        self.decoder = nn.Sequential(
            RMSNorm(dim, eps=NORM_EPS), Linear(dim, dim), nn.GELU(),
            RMSNorm(dim, eps=NORM_EPS), Linear(dim, dim), nn.GELU(),
            RMSNorm(dim, eps=NORM_EPS),
        )  # fmt: skip
        self.unembedding = Linear(dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seqlen) int64 to logits (batch, seqlen, vocab_size)."""
        check_tokens(tokens)
        if tokens.shape[1] != self.seqlen:
            raise ValueError(f"tokens has length {tokens.shape[1]}; this auto-encoder was built for {self.seqlen}")
        code = self.backbone(self.embedding(tokens))[:, -1:]
        logits: Tensor = self.unembedding(self.decoder(code + sinusoids(self.seqlen, code)))
        return logits


def sinusoids(length: int, like: Tensor) -> Tensor:
    """(length, dim) for `like` (..., dim): sines in the even places, cosines in the odd ones, of wavelengths from 2 pi to
    10000 * 2 pi; computed in float32 at least."""
    dim, dtype = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    frequency = torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim)
    angle = torch.arange(length, device=like.device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim].to(like.dtype)
