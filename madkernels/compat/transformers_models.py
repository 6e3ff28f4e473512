"""What `enable("transformers")` replaces: variables of the modules of its model families, each by ours or, where the ops
cannot, by what was there.

A mixer of transformers calls functions of its module by name, on every device, and attention and masks are looked up by
the configuration at every call. So models follow whose modules' variables change, and no model, class or configuration
is touched but the experts' forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from madkernels import cuda
from madkernels.compat import transformers as interfaces
from madkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from madkernels.compat.mamba_ssm import mamba_chunk_scan_combined, selective_scan_fn, selective_state_update

MAMBA = ("mamba_inner_fn", "mamba_selective_scan", "mamba_selective_state_update")
MAMBA2 = ("mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", "mamba2_selective_state_update")
CONVOLUTION = ("causal_conv1d_fn", "causal_conv1d_update")
ATTENTION = ("ALL_ATTENTION_FUNCTIONS", "create_causal_mask")
WINDOWS = ("create_sliding_window_causal_mask",)
FAMILIES: dict[str, tuple[str, ...]] = {  # by the module of a family: its variables, or attributes of these
    "mamba": CONVOLUTION + MAMBA,
    "mamba2": CONVOLUTION + MAMBA2,
    "falcon_mamba": CONVOLUTION + MAMBA,
    "jamba": (*CONVOLUTION, *MAMBA, *ATTENTION, "JambaExperts.forward"),
    "bamba": CONVOLUTION + MAMBA2 + ATTENTION,
    "llama": ATTENTION,
    "mistral": ATTENTION + WINDOWS,
    "mixtral": (*ATTENTION, *WINDOWS, "MixtralExperts.forward"),
}


def replacements() -> list[tuple[Any, str, Any]]:
    """Owner, name and what takes its place; ValueError where this version of transformers has not all of them."""
    found: list[tuple[Any, str, Any]] = []
    for family, names in FAMILIES.items():
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        for path in names:
            kind, _, attribute = path.rpartition(".")
            owner = getattr(module, kind, None) if kind else module
            if not hasattr(owner, attribute):
                version = import_module("transformers").__version__
                raise ValueError(
                    f"transformers {version} has no {module.__name__}.{path}: enable() was made for 5.16 to 5.24, "
                    "madkernels.compat.transformers.register() takes 4.56 or newer"
                )
            found.append((owner, attribute, OURS[attribute](getattr(owner, attribute))))
    interfaces.register()
    return found


def _runs(op: str, t: Tensor) -> bool:
    """Whether the op has a kernel for the tensor's device."""
    return t.device.type == "cpu" or (t.is_cuda and t.dtype != torch.float64 and _on_cuda(op))


@cache
def _on_cuda(op: str) -> bool:
    return op in cuda.ops_with_kernels()


def _steps(op: str, *tensors: Tensor) -> bool:
    """Whether a decoding step can be the op's, which has no derivative."""
    return _runs(op, tensors[0]) and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _convolution(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **further: Any) -> Any:
        if not _convolves("causal_conv", x, activation):
            return theirs(x, weight, bias, activation=activation, **further)
        return causal_conv1d_fn(x, *_as_read(weight, bias, x), seq_idx=further.get("seq_idx"), activation=activation)

    return ours


def _convolution_step(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Any:
        if not (_convolves("causal_conv_step", x, activation) and _steps("causal_conv_step", x, weight)):
            return theirs(x, state, weight, bias, activation)
        return causal_conv1d_update(x, state, *_as_read(weight, bias, x), activation=activation)

    return ours


def _convolves(op: str, x: Tensor, activation: str | None) -> bool:
    return _runs(op, x) and activation in (None, "silu", "swish")


def _as_read(weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float32 or the dtype of x, which are those that the op takes."""
    if weight.dtype in (x.dtype, torch.float32):
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _scan(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, **further: Any,
    ) -> Any:  # fmt: skip
        given = x, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        return selective_scan_fn(*given) if _runs("selective_scan", x) else theirs(*given, **further)

    return ours


def _chunk_scan(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Of torch's operations, so of any device."""

    @wraps(theirs)
    def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **further: Any) -> Any:
        options: dict[str, Any] = {name: further.get(name) for name in ("D", "z", "dt_bias", "initial_states", "seq_idx")}
        options |= {name: further[name] for name in ("dt_softplus", "dt_limit", "return_final_states") if name in further}
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **options)

    return ours


def _scan_step(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        dt_bias: Tensor | None = None, dt_softplus: bool = False, z: Tensor | None = None, **further: Any,
    ) -> Any:  # fmt: skip
        if _steps("selective_scan_step", x, dt, A, B, C):
            return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        return theirs(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z, **further)

    return ours


def _not_fused(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """None sends a mixer through the convolution and the scan, between which padding is taken out."""
    return wraps(theirs)(lambda *args, **options: None)


def _attention_functions(theirs: Any) -> Any:
    """A module's own instance of the interface, which transformers asks for where one of them is to be another."""
    sdpa = theirs["sdpa"]

    @wraps(sdpa)
    def ours(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0,
        **further: Any,
    ) -> Any:  # fmt: skip
        function = sdpa if dropout or not _runs("attention", query) else interfaces.forward
        return function(module, query, key, value, mask, dropout=dropout, **further)

    functions = type(theirs)()
    functions["sdpa"] = ours
    return functions


def _masks(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(config: Any, inputs_embeds: Tensor, *args: Any, **options: Any) -> Any:
        routed = config._attn_implementation == "sdpa" and getattr(config, "is_causal", True)
        if routed and not config.attention_dropout and _runs("attention", inputs_embeds):
            config = _Routed(config)
        return theirs(config, inputs_embeds, *args, **options)

    return ours


class _Routed:
    """A configuration to which masks are made as `interfaces.forward` takes them."""

    _attn_implementation = interfaces.NAME

    def __init__(self, config: Any):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _experts(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(self: Any, *args: Any, **options: Any) -> Any:
        function = interfaces.experts_forward if self.config._experts_implementation == "grouped_mm" else theirs
        return function(self, *args, **options)

    return ours


OURS: dict[str, Callable[[Any], Any]] = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "mamba_inner_fn": _not_fused,
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": _scan_step,
    "mamba2_split_conv1d_scan_combined": _not_fused,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _scan_step,
    "ALL_ATTENTION_FUNCTIONS": _attention_functions,
    "create_causal_mask": _masks,
    "create_sliding_window_causal_mask": _masks,
    "forward": _experts,
}
