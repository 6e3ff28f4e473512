"""Equal terms for a comparison: sets an architecture's free sizes so that it has a wanted state, or a wanted number of
parameters.

The MAD paper compares architectures whose fixed states sum to 4096 elements over the model (Poli et al. 2024, arXiv
2403.17844). What grows with the sequence, the keys and values of attention, is no fixed state and is left alone; where
layers of several kinds have a fixed state each gets the same share. Parameters are set by hidden widths. Which options do
that the layers say: `state_option` and `hidden_option` of their classes.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from madkernels.models import counting
from madkernels.models.layers import LAYERS, Layer
from madkernels.models.lm import HybridLM
from madkernels.models.spec import Architecture, LayerSpec, layer_spec, options_of, parse

HIDDEN_STEP = 8  # hidden widths are multiples of this


def fixed_state(arch: Architecture | str, dim: int) -> int:
    """Elements of state that do not grow with the sequence, over the model."""
    return sum(_state(spec, dim) for spec in _parsed(arch).layers)


def with_state(arch: Architecture | str, total: int, dim: int) -> Architecture:
    """The architecture with a fixed state of `total` elements over the model.

    Raises:
        ValueError: no layer has a size that sets its state, or none reaches the total exactly; the message says what the
            nearest is.
    """
    parsed = _parsed(arch)
    free = [spec for spec in parsed.layers if _is_free(spec.layer)]
    if not free:
        known = ", ".join(name for name, layer in LAYERS.items() if _is_free(layer))
        raise ValueError(f"{parsed}: no layer has a fixed state that could be set; those that have are {known}")
    rest = fixed_state(parsed, dim) - sum(_state(spec, dim) for spec in free)
    share, over = divmod(total - rest, len(free))
    if over or share <= 0:
        raise ValueError(f"{parsed}: a state of {total} does not divide among {len(free)} layers")
    return Architecture(tuple(_with_state(spec, share, dim) if spec in free else spec for spec in parsed.layers))


def _is_free(layer: type[Layer]) -> bool:
    return layer.state_option is not None and not layer.state_grows


def _with_state(spec: LayerSpec, wanted: int, dim: int) -> LayerSpec:
    free = spec.layer.state_option
    assert free
    now = dict(spec.options).get(free.name, options_of(spec.name)[free.name])
    state = _state(spec, dim)
    if state == 0:
        raise ValueError(f"{spec}: with {free.name}={now} it has no state that could be brought to {wanted}")
    value = free.solve(int(now), state, wanted)
    found: dict[int, LayerSpec] = {}
    for candidate in {max(int(value), 1), int(value) + 1}:
        changed = _with_option(spec, free.name, candidate)
        try:
            found.setdefault(_state(changed, dim), changed)
        except ValueError:  # heads that do not divide the width
            continue
    if wanted not in found:
        near = ", ".join(f"{state} with {option}" for state, option in sorted(found.items())) or "none"
        raise ValueError(f"{spec}: no {free.name} gives a state of {wanted} at width {dim}; nearest: {near}")
    return found[wanted]


def with_parameters(arch: Architecture | str, total: int, dim: int) -> Architecture:
    """The architecture with as nearly `total` parameters in its layers as equal hidden widths can give.

    Raises:
        ValueError: no layer has a hidden width that could be set, or the others have more parameters than that.
    """
    parsed = _parsed(arch)
    if not any(spec.layer.hidden_option for spec in parsed.layers):
        known = ", ".join(name for name, layer in LAYERS.items() if layer.hidden_option)
        raise ValueError(f"{parsed}: no layer has a hidden width that could be set; those that have are {known}")

    def widened(hidden: int) -> Architecture:
        options = ((spec, spec.layer.hidden_option) for spec in parsed.layers)
        return Architecture(tuple(_with_option(spec, name, hidden) if name else spec for spec, name in options))

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
    return layer_spec(spec.name, dict(spec.options) | {option: value})


def _state(spec: LayerSpec, dim: int) -> int:
    return _state_of(spec.layer, spec, dim)  # type: ignore[arg-type]  # a class has a hash


@lru_cache(maxsize=4096)
def _state_of(layer: type[Layer], spec: LayerSpec, dim: int) -> int:
    """The fixed state; a layer that is added again under its name is another."""
    with torch.device("meta"):
        return spec.build(dim).fixed_state()
