"""The layer primitives, by the names that architecture strings use."""

from madkernels.models.layers.attention import Attention
from madkernels.models.layers.base import Layer, State
from madkernels.models.layers.deltanet import DeltaNet, GatedDeltaNet
from madkernels.models.layers.hyena import Hyena
from madkernels.models.layers.hyena_experts import HyenaExperts
from madkernels.models.layers.linear_attention import GatedLinearAttention, LinearAttention
from madkernels.models.layers.mamba import Mamba
from madkernels.models.layers.mamba2 import Mamba2
from madkernels.models.layers.mh_hyena import MultiHeadHyena
from madkernels.models.layers.mlp import MLP
from madkernels.models.layers.moe import MoE
from madkernels.models.layers.rwkv import RWKV5TimeMixer, RWKV6TimeMixer, RWKVChannelMixer
from madkernels.models.layers.sliding_attention import SlidingAttention
from madkernels.models.layers.striped_hyena2 import HyenaMR, HyenaSE
from madkernels.models.layers.swiglu import SwiGLU

LAYERS: dict[str, type[Layer]] = {
    "attention": Attention,
    "sliding-attention": SlidingAttention,
    "linear-attention": LinearAttention,
    "gated-linear-attention": GatedLinearAttention,
    "deltanet": DeltaNet,
    "gated-deltanet": GatedDeltaNet,
    "hyena": Hyena,
    "mh-hyena": MultiHeadHyena,
    "hyena-experts": HyenaExperts,
    "hyena-se": HyenaSE,
    "hyena-mr": HyenaMR,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "rwkv5-time-mixer": RWKV5TimeMixer,
    "rwkv6-time-mixer": RWKV6TimeMixer,
    "rwkv-channel-mixer": RWKVChannelMixer,
    "swiglu": SwiGLU,
    "mlp": MLP,
    "moe": MoE,
}

__all__ = ["LAYERS", "Layer", "State"]
