"""Layers from outside: any torch.nn.Module that maps (batch, seqlen, dim) to the same shape joins by its name."""

from __future__ import annotations

import copyreg
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from madkernels.models.layers.base import Layer, State


class Adapted(type):
    """Of the classes that :func:`adapt` makes: no module holds them, so they are pickled by the name of their layer."""

    name: str


def registered(name: str) -> Any:
    """The class of a pickled layer."""
    from madkernels.models.layers import LAYERS

    if name not in LAYERS:
        raise ValueError(f"this holds a layer {name}, which is not known here: call add_layer({name!r}, ...) before loading")
    return LAYERS[name]


copyreg.pickle(Adapted, lambda cls: (registered, (cls.name,)) if "name" in vars(cls) else cls.__qualname__)


class AdaptedLayer(Layer, metaclass=Adapted):
    """A plain module as a layer. Packed documents go through it one by one; decoding keeps the whole past and runs it
    again, so that it is exact, whatever the module does. Operations are those of its matrix products, as torch counts them;
    its state is what its own ``state_size(seqlen)`` says, or is counted as nothing."""

    make: ClassVar[Callable[..., nn.Module]]

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim)
        self.module = type(self).make(dim, **options)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        self.check(x, cu_seqlens, state)
        if x.shape[1] == 0 or (cu_seqlens is None and state is None):
            y: Tensor = self.module(x)
            return y
        if cu_seqlens is not None:
            parts = torch.split(x, cu_seqlens.diff().tolist(), dim=1)
            return torch.cat([self.module(part) for part in parts if part.shape[1]], dim=1)
        assert state is not None
        state["past"] = torch.cat([state["past"].to(x.dtype), x], dim=1)
        whole: Tensor = self.module(state["past"])
        return whole[:, -x.shape[1] :]

    def init_state(self, batch: int) -> State:
        like = next(self.parameters(), torch.zeros(()))
        return {"past": like.new_zeros(batch, 0, self.dim).detach()}

    def state_size(self, seqlen: int) -> int:
        if not hasattr(self.module, "state_size"):
            return 0
        own: Any = self.module.state_size
        return int(own(seqlen))

    def flops(self, seqlen: int) -> int:
        like = next(self.parameters(), torch.zeros(()))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.module(like.new_zeros(1, seqlen, self.dim))
        return int(counter.get_total_flops())


def adapt(name: str, make: Callable[..., nn.Module]) -> type[Layer]:
    """The class of a layer of this name, from a module's class or a function that makes one: its first parameter is dim, the
    others, which need defaults, become options."""
    if isinstance(make, type) and issubclass(make, Layer):
        return make
    called = getattr(make, "__name__", name)  # which functools.partial lacks
    _, *others = inspect.signature(make).parameters.values()
    for p in others:
        if type(p.default) not in (int, float, bool):
            raise ValueError(f"{called}: parameter {p.name} needs a default that is a number or a truth value")
    options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in others]
    first = inspect.Parameter("dim", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([first, *options])
    fields = {"name": name, "make": staticmethod(make), "__doc__": make.__doc__, "__signature__": signature}
    made: Any = Adapted(called, (AdaptedLayer,), fields)
    found: type[Layer] = made
    return found


def digest(make: Callable[..., Any]) -> str:
    """A hash of the file that defines it: results of one version are not those of another."""
    try:
        source = Path(inspect.getfile(make)).read_bytes()
    except (OSError, TypeError):  # made at a prompt
        source = repr(make).encode()
    return hashlib.sha256(source).hexdigest()[:16]
