"""Layer primitives, and the hybrid models that an architecture string describes."""

from madkernels.models.autoencoder import AutoEncoder
from madkernels.models.layers import add_layer
from madkernels.models.lm import HybridLM
from madkernels.models.published import from_hf, to_hf
from madkernels.models.spec import Architecture, LayerSpec, SpecError, parse

__all__ = ["Architecture", "AutoEncoder", "HybridLM", "LayerSpec", "SpecError", "add_layer", "from_hf", "parse", "to_hf"]
