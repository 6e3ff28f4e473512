"""The layer primitives, by the names that architecture strings use."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from madkernels.models.layers.attention import Attention
from madkernels.models.layers.base import Layer, State, StateOption, in_proportion, inversely
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
from madkernels.models.layers.user import adapt, digest

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

_user: dict[str, str] = {}


def add_layer(name: str, make: Callable[..., nn.Module]) -> None:
    """Lets architecture strings use a layer from outside.

    Args:
        name: small letters, digits and hyphens.
        make: a :class:`Layer`, or any module's class: ``make(dim, **options)`` maps (batch, seqlen, dim) to the same shape,
            causally. Its other parameters have defaults that are numbers or truth values. What kind of layer it is its class
            says, in the attributes of :class:`Layer`.

    Raises:
        ValueError: the name is taken or is none, a parameter has no such default, or an attribute is none of a layer.
    """
    if not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise ValueError(f"{name!r} is no name for a layer: it takes small letters, digits and hyphens")
    if name in LAYERS and name not in _user:
        raise ValueError(f"there is a layer {name} already")
    LAYERS[name] = adapt(name, make)
    _user[name] = digest(make)


def user_layers() -> dict[str, str]:
    """The layers that were added, and a hash of the file that defines each."""
    return dict(_user)


__all__ = ["LAYERS", "Layer", "State", "StateOption", "add_layer", "in_proportion", "inversely", "user_layers"]
