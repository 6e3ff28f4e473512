"""Whether modules look ahead: an output may depend on the inputs of its own row up to its own position, and on nothing else.

Inputs that an output must not see are replaced by others, and the output must stay. What rounding does to it (that of an FFT
depends on the whole row) is told from a leak by its size, and where that leaves a doubt by a second pair of nearly the same
replacements: a leak moves the output nearly the same way again, rounding does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from madkernels.models.layers import LAYERS, Layer, user_layers
from madkernels.models.presets import layers_of
from madkernels.models.spec import LayerSpec

QUIET = {torch.float64: 1e-9, torch.float32: 1e-5}  # moves of outputs of unit scale that may be taken for rounding
PLAIN = 1e-3  # moves, in parts of the largest output, that no rounding makes
NEARBY = 1e-3  # how far, in parts, the second replacements are from the first
FOLLOWS = 0.5  # correlation of two moves from which both come from the inputs

Make = Callable[[], nn.Module]


class NotCausal(ValueError):
    """An output depends on what it must not see; the message names the layer and says on what."""


def check_causal(make: Make, name: str, *, dim: int, batch: int = 4, seqlen: int = 16) -> None:
    """Looks at a new layer of the shapes that it will be trained with, (batch, seqlen, dim), in evaluation and in training
    mode. Its parameters are as initialised, and with noise of unit scale on all of them, so that no gate stays shut.

    Args:
        make: makes the layer, the same each time as far as torch's random numbers decide.
        name: of the layer, for messages.

    Raises:
        NotCausal: an output changes with later inputs, with other rows of the batch, or with earlier calls.
        ValueError: the layer fails, or gives something else than finite numbers of its input's shape.
    """
    x, other = torch.randn(2, batch, seqlen, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dtype = _widest(make, name, x)
    some, every = _spread(seqlen, batch), torch.arange(1, seqlen)
    for training in (False, True):
        look_ahead(Calls(make, name, dtype, training), x, other, some)
        for seed, cuts in ((1, some if training else every), (2, some)):
            if shaken := _shaken(make, name, dtype, training, seed, x):
                look_ahead(shaken, x, other, cuts)
    if dtype != torch.float32 and (shaken := _shaken(make, name, torch.float32, False, 3, x)):
        look_ahead(shaken, x, other, some)


def layers_from_outside(arch: str) -> list[LayerSpec]:
    """The layers of an architecture that add_layer added, each once."""
    return [spec for spec in dict.fromkeys(layers_of(arch)) if spec.name in user_layers()]


def check_layers_from_outside(arch: str, *, dim: int, batch: int, seqlen: int) -> None:
    """:func:`check_causal` of each layer of an architecture that add_layer added."""
    for spec in layers_from_outside(arch):
        _check_layer(LAYERS[spec.name], spec, dim, batch, seqlen)  # type: ignore[arg-type]  # a class has a hash


@cache
def _check_layer(layer: type[Layer], spec: LayerSpec, dim: int, batch: int, seqlen: int) -> None:
    """Once for each layer and shape."""
    check_causal(lambda: layer(dim, **dict(spec.options)), str(spec), dim=dim, batch=batch, seqlen=seqlen)


def check_trained(make: Make, name: str, x: Tensor, other: Tensor) -> None:
    """As :func:`check_causal`, of a trained module on inputs of its task, in evaluation mode.

    Args:
        make: makes the module anew, with its trained parameters.
        name: of the layers from outside that it has.
        x, other: inputs (batch, seqlen, dim), and those that take their place.
    """
    calls = Calls(make, name, _widest(make, name, x), False, " once trained")
    look_ahead(calls, x, other, torch.arange(1, x.shape[1]))


class Calls:
    """Calls of a module that is made anew for each: none knows of another, and all draw the same random numbers."""

    def __init__(self, make: Make, name: str, dtype: torch.dtype, training: bool, when: str = "") -> None:
        self.make, self.name, self.dtype, self.training = make, name, dtype, training
        self.when = " in training mode" if training else when

    def module(self) -> nn.Module:
        with _seeded():
            return self.make().to(self.dtype).train(self.training)

    @torch.no_grad()
    def __call__(self, x: Tensor, module: nn.Module | None = None) -> Tensor:
        """x (batch, seqlen, dim) to the same. ValueError where the module gives anything else."""
        module = module or self.module()
        try:
            with _seeded():
                y: Any = module(x.to(self.dtype))
        except Exception as error:  # whatever the code of another does
            problem = f"fails on {tuple(x.shape)}, {self.dtype}: {type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"layer {self.name} {problem}") from None
        if not isinstance(y, Tensor):
            raise ValueError(f"layer {self.name} returns a {type(y).__name__}; expected one tensor")
        if y.shape != x.shape:
            raise ValueError(f"layer {self.name} maps {tuple(x.shape)} to {tuple(y.shape)}; expected the same shape")
        if not y.is_floating_point():
            raise ValueError(f"layer {self.name} returns {y.dtype}; expected a floating-point tensor")
        return y.double()


def look_ahead(calls: Calls, x: Tensor, other: Tensor, cuts: Tensor) -> None:
    """Raises where outputs of x change with inputs that they must not see, for which those of `other` come.

    Args:
        cuts: positions from which on inputs are replaced, in one row of the batch each.
    """
    batch, seqlen, _ = x.shape
    y = _finite(calls, calls(x))
    rows = torch.randperm(batch, generator=torch.Generator().manual_seed(0)) < batch // 2
    for kept in (rows, ~rows) if batch > 1 else ():
        if _leak(calls, x, other, y, kept[:, None].expand(batch, seqlen)) is not None:
            raise NotCausal(f"layer {calls.name} mixes the rows of a batch{calls.when}: an output changes with another row")
    for some in torch.split(cuts, batch) if len(cuts) else ():
        cut = some.repeat(-(-batch // len(some)))[:batch]  # (batch,)
        seen = _leak(calls, x, other, y, torch.arange(seqlen) < cut[:, None])
        if seen is not None:
            row, position = seen
            told = f"its output at position {position} changes with inputs from position {int(cut[row])}"
            raise NotCausal(f"layer {calls.name} is not causal{calls.when}: {told}")
    if not calls.training:
        module = calls.module()
        first, _, again = (calls(inputs, module) for inputs in (x, other, x))
        if (first - again).abs().max() > QUIET[calls.dtype] * _unit(first):
            told = f"keeps what it saw in earlier calls{calls.when}: the same input gives two outputs"
            raise NotCausal(f"layer {calls.name} {told}")


def _leak(calls: Calls, x: Tensor, other: Tensor, y: Tensor, kept: Tensor) -> tuple[int, int] | None:
    """The row and position of an output at `kept` (batch, seqlen) that changes with inputs elsewhere; y is that of x."""
    inside = kept[..., None]
    moves = torch.where(inside, y - calls(torch.where(inside, x, other)), 0)
    size, most = moves.abs().amax(-1), moves.abs().max()
    if most <= QUIET[calls.dtype] * _unit(y):
        return None
    if not most > PLAIN * y.abs().max():  # rounding, or a small leak
        first, second = (calls(torch.where(inside, x, _near(inputs))) for inputs in (x, other))
        again = torch.where(inside, first - second, 0)
        if (moves * again).sum() <= FOLLOWS * moves.norm() * again.norm():
            return None
    row, position = (~(size <= most / 100)).nonzero()[0].tolist()
    return row, position


def _near(inputs: Tensor) -> Tensor:
    noise = torch.randn(inputs.shape, dtype=inputs.dtype, generator=torch.Generator().manual_seed(1))
    return inputs * (1 + NEARBY * noise)


def _unit(y: Tensor) -> float:
    """The size of an output, 1 at most: what is large beside it hides no leak."""
    return min(float(y.abs().max()), 1.0)


def _finite(calls: Calls, y: Tensor) -> Tensor:
    if not y.isfinite().all():
        raise ValueError(f"layer {calls.name} gives outputs that are no finite numbers{calls.when}")
    return y


def _spread(seqlen: int, count: int) -> Tensor:
    """Positions from 1 to the last, `count` of them, three at least as far as there are so many."""
    return torch.unique(torch.linspace(1, seqlen - 1, max(count, 3)).round().long()) if seqlen > 1 else torch.arange(0)


def _widest(make: Make, name: str, x: Tensor) -> torch.dtype:
    """float64, where differences show best, or float32 for a module that does not take it."""
    try:
        Calls(make, name, torch.float64, False)(x)
    except ValueError:
        Calls(make, name, torch.float32, False)(x)
        return torch.float32
    return torch.float64


def _shaken(make: Make, name: str, dtype: torch.dtype, training: bool, seed: int, x: Tensor) -> Calls | None:
    """The module with noise on all parameters, of a size at which the outputs are finite; None where there is none."""
    for size in (1.0, 0.1, 0.01):
        calls = Calls(lambda size=size: _shake(make(), seed, size), name, dtype, training)  # type: ignore[misc]
        if calls(x).isfinite().all():
            return calls
    return None


@torch.no_grad()
def _shake(module: nn.Module, seed: int, size: float) -> nn.Module:
    """Adds noise to each parameter; matrices get what keeps sums over their rows at that size."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.is_floating_point() or p.is_complex():
            scale = size / p.shape[-1] ** 0.5 if p.dim() > 1 else size
            p.add_(scale * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return module


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers from a fixed seed, and afterwards as if none had been drawn."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)
