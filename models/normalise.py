"""Equal terms for a comparison: sets an architecture's free sizes so that it has a wanted state, or a wanted number of
parameters.

The MAD paper compares architectures whose fixed states sum to 4096 elements over the model (Poli et al. 2024, arXiv
2403.17844). What grows with the sequence, the keys and values of attention, is no fixed state and is left alone; where
layers of several kinds have a fixed state each gets the same share. Parameters are set by the hidden widths of SwiGLU and
MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from madkernels.models import counting
from madkernels.models.lm import HybridLM
from madkernels.models.spec import Architecture, LayerSpec, options_of, parse

HIDDEN_STEP = 8  # hidden widths are multiples of this


@dataclass(frozen=True)
class _Free:
    """The option that sets a layer's state, and the value at which it has a state of `wanted`, from what it has at
    another."""

    option: str
    solve: Callable[[int, int, int], float]  # value and state there, wanted state


def _in_proportion(value: int, state: int, wanted: int) -> float:
    return value * wanted / state


def _inversely(value: int, state: int, wanted: int) -> float:
    return value * state / wanted


def _by_taps(value: int, state: int, wanted: int) -> float:
    return 1 + (value - 1) * wanted / state


FREE: dict[str, _Free] = {
    "linear-attention": _Free("heads", _inversely),
    "gated-linear-attention": _Free("heads", _inversely),
    "deltanet": _Free("heads", _inversely),
    "gated-deltanet": _Free("heads", _inversely),
    "hyena": _Free("order", _in_proportion),
    "mh-hyena": _Free("order", _in_proportion),
    "hyena-experts": _Free("order", _in_proportion),
    "hyena-se": _Free("taps", _by_taps),
    "hyena-mr": _Free("taps", _by_taps),
    "mamba": _Free("dstate", _in_proportion),
    "mamba2": _Free("dstate", _in_proportion),
    "rwkv5-time-mixer": _Free("head_dim", _in_proportion),
    "rwkv6-time-mixer": _Free("head_dim", _in_proportion),
}


def fixed_state(arch: Architecture | str, dim: int) -> int:
    """Elements of state that do not grow with the sequence, over the model."""
    return sum(_state(spec, dim) for spec in _parsed(arch).layers if not _grows(spec, dim))


def with_state(arch: Architecture | str, total: int, dim: int) -> Architecture:
    """The architecture with a fixed state of `total` elements over the model.

    Raises:
        ValueError: no layer has a size that sets its state, or none reaches the total exactly; the message says what the
            nearest is.
    """
    parsed = _parsed(arch)
    free = [spec for spec in parsed.layers if spec.name in FREE and not _grows(spec, dim)]
    if not free:
        raise ValueError(f"{parsed}: no layer has a fixed state that could be set; those that have are {', '.join(FREE)}")
    rest = fixed_state(parsed, dim) - sum(_state(spec, dim) for spec in free)
    share, over = divmod(total - rest, len(free))
    if over or share <= 0:
        raise ValueError(f"{parsed}: a state of {total} does not divide among {len(free)} layers")
    return Architecture(tuple(_with_state(spec, share, dim) if spec in free else spec for spec in parsed.layers))


def _with_state(spec: LayerSpec, wanted: int, dim: int) -> LayerSpec:
    free = FREE[spec.name]
    now = dict(spec.options).get(free.option, options_of(spec.name)[free.option])
    value = free.solve(int(now), _state(spec, dim), wanted)
    found: dict[int, LayerSpec] = {}
    for candidate in {max(int(value), 1), int(value) + 1}:
        changed = _with_option(spec, free.option, candidate)
        try:
            found.setdefault(_state(changed, dim), changed)
        except ValueError:  # heads that do not divide the width
            continue
    if wanted not in found:
        near = ", ".join(f"{state} with {option}" for state, option in sorted(found.items())) or "none"
        raise ValueError(f"{spec}: no {free.option} gives a state of {wanted} at width {dim}; nearest: {near}")
    return found[wanted]


def with_parameters(arch: Architecture | str, total: int, dim: int) -> Architecture:
    """The architecture with as nearly `total` parameters in its layers as equal hidden widths of its SwiGLU and MoE layers
    can give.

    Raises:
        ValueError: it has no such layer, or the others have more parameters than that.
    """
    parsed = _parsed(arch)
    if not any(spec.name in ("swiglu", "moe") for spec in parsed.layers):
        raise ValueError(f"{parsed}: no swiglu or moe layer, whose hidden width could be set")

    def widened(hidden: int) -> Architecture:
        specs = (_with_option(s, "hidden", hidden) if s.name in ("swiglu", "moe") else s for s in parsed.layers)
        return Architecture(tuple(specs))

    one, two = (parameters(widened(hidden), dim) for hidden in (HIDDEN_STEP, 2 * HIDDEN_STEP))
    steps = 1 + round((total - one) / (two - one))
    if steps < 1:
        raise ValueError(f"{parsed}: with the smallest hidden width it has {one:,} parameters already, more than {total:,}")
    return widened(steps * HIDDEN_STEP)


def parameters(arch: Architecture | str, dim: int) -> int:
    """Parameters of the layers; embeddings and norms are not counted."""
    with torch.device("meta"):
        model = HybridLM(arch, vocab_size=2, dim=dim)
    return counting.layer_params(model)


def _parsed(arch: Architecture | str) -> Architecture:
    return parse(arch) if isinstance(arch, str) else arch


def _with_option(spec: LayerSpec, option: str, value: int) -> LayerSpec:
    options = dict(spec.options) | {option: value}
    kept = {k: v for k, v in options.items() if v != options_of(spec.name)[k]}
    return LayerSpec(spec.name, tuple(sorted(kept.items())))


def _state(spec: LayerSpec, dim: int) -> int:
    return _states(spec, dim)[0]


def _grows(spec: LayerSpec, dim: int) -> bool:
    one, two = _states(spec, dim)
    return one != two


@lru_cache(maxsize=4096)
def _states(spec: LayerSpec, dim: int) -> tuple[int, int]:
    """After one token, and after two."""
    with torch.device("meta"):
        layer = spec.build(dim)
    return layer.state_size(1), layer.state_size(2)
