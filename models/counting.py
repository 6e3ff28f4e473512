"""What a model costs: parameters, FLOPs, state.

The formulas of the layers follow the accounting of the MAD paper's appendix (Poli et al. 2024, arXiv 2403.17844): a
multiply-add is two FLOPs, what causality spares is not taken off, looking up embeddings is free.
"""

from __future__ import annotations

from madkernels.models.autoencoder import AutoEncoder
from madkernels.models.layers import Layer
from madkernels.models.lm import HybridLM

Model = HybridLM | AutoEncoder


def params(model: Model) -> int:
    """All parameters; tied ones once."""
    return sum(p.numel() for p in model.parameters())


def active_params(model: Model) -> int:
    """Parameters that one token uses: of the experts, only those chosen for it."""
    unused = sum(sum(p.numel() for p in layer.parameters()) - layer.active_params() for layer in layers(model))
    return params(model) - unused


def embedding_params(model: HybridLM) -> int:
    """Parameters of embedding and unembedding; tied ones once."""
    modules = (model.embedding, model.unembedding)
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def layer_params(model: Model) -> int:
    """Parameters of the layers: embeddings and norms are not counted."""
    return sum(p.numel() for layer in layers(model) for p in layer.parameters())


def flops_per_token(model: Model, seqlen: int) -> float:
    """Forward FLOPs per token in sequences of this length, unembedding (and decoder) included."""
    head = 2 * model.dim * model.vocab_size
    if isinstance(model, AutoEncoder):
        head += 2 * 2 * model.dim**2
    return sum(layer.flops(seqlen) for layer in layers(model)) / seqlen + head


def training_flops(model: Model, seqlen: int) -> float:
    """Training FLOPs per token, forward and backward: as much as three forward passes."""
    return 3 * flops_per_token(model, seqlen)


def state_size(model: Model, seqlen: int) -> int:
    """Elements that the layers keep for one sequence of this length. Taps of short convolutions are not counted."""
    return sum(layer.state_size(seqlen) for layer in layers(model))


def layers(model: Model) -> list[Layer]:
    """The layers of a model, first to last."""
    return [layer for layer in model.backbone.layers if isinstance(layer, Layer)]
