"""The layer primitives, by the names that architecture strings use."""

from madkernels.models.layers.attention import Attention
from madkernels.models.layers.base import Layer, State
from madkernels.models.layers.hyena import Hyena
from madkernels.models.layers.hyena_experts import HyenaExperts
from madkernels.models.layers.mamba import Mamba
from madkernels.models.layers.mh_hyena import MultiHeadHyena
from madkernels.models.layers.mlp import MLP
from madkernels.models.layers.moe import MoE
from madkernels.models.layers.sliding_attention import SlidingAttention
from madkernels.models.layers.swiglu import SwiGLU

LAYERS: dict[str, type[Layer]] = {
    "attention": Attention,
    "sliding-attention": SlidingAttention,
    "hyena": Hyena,
    "mh-hyena": MultiHeadHyena,
    "hyena-experts": HyenaExperts,
    "mamba": Mamba,
    "swiglu": SwiGLU,
    "mlp": MLP,
    "moe": MoE,
}

__all__ = ["LAYERS", "Layer", "State"]
