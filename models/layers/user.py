"""Layers from outside: any torch.nn.Module that maps (batch, seqlen, dim) to the same shape joins by its name."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from madkernels.models.layers.base import Layer, Mixes, State, StateOption

# What a layer's class says of its kind; a plain module's class may say it too.
KIND = ("mixes", "is_attention", "state_grows", "state_option", "hidden_option")


class Adapted(type):
    """Metaclass of what :func:`adapt` makes: no module holds those classes, so they are pickled by their layer's name."""

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
    again, sequences of unequal lengths one by one, so that it is exact, whatever the module does. Its `past`, (batch,
    longest, dim), ends with the newest token; `position`, (batch,), is how many each sequence has had.

    FLOPs are those of its matrix products, as torch counts them; its state is what its own ``state_size(seqlen)`` says, or
    is counted as nothing.
    """

    packs_states = True
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
            if state is not None:
                past = pad_sequence([part[0] for part in parts], batch_first=True, padding_side="left")
                state |= {"past": past, "position": state["position"] + cu_seqlens.diff()}
            return torch.cat([self.module(part) for part in parts if part.shape[1]], dim=1)
        assert state is not None
        past = torch.cat([state["past"].to(x.dtype), x], dim=1)
        state |= {"past": past, "position": state["position"] + x.shape[1]}
        lengths, rows = state["position"].tolist(), [past]
        if any(length != past.shape[1] for length in lengths):
            rows = [row[None, -length:] for row, length in zip(past, lengths, strict=True)]
        return torch.cat([self.module(row)[:, -x.shape[1] :] for row in rows])

    def init_state(self, batch: int) -> State:
        like = next(self.parameters(), torch.zeros(()))
        past = like.new_zeros(batch, 0, self.dim).detach()
        return {"past": past, "position": past.new_zeros(batch, dtype=torch.int64)}

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
        check_kind(name, make)
        return make
    called = getattr(make, "__name__", name)  # which functools.partial lacks
    _, *others = inspect.signature(make).parameters.values()
    for p in others:
        if type(p.default) not in (int, float, bool):
            raise ValueError(f"{called}: parameter {p.name} needs a default that is a number or a truth value")
    options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in others]
    first = inspect.Parameter("dim", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([first, *options])
    fields: dict[str, Any] = {"name": name, "make": staticmethod(make), "__doc__": make.__doc__, "__signature__": signature}
    says = make.func if isinstance(make, functools.partial) else make
    fields |= {key: getattr(says, key) for key in KIND if hasattr(says, key)}
    made: Any = Adapted(called, (AdaptedLayer,), fields)
    found: type[Layer] = made
    check_kind(name, found)
    return found


def check_kind(name: str, layer: type[Layer]) -> None:
    """Raises ValueError where the class says of its kind what no layer is."""
    if layer.mixes not in get_args(Mixes):
        raise ValueError(f"{name}: mixes is {layer.mixes!r}; it takes {', '.join(get_args(Mixes))}")
    for key in ("is_attention", "state_grows"):
        if not isinstance(getattr(layer, key), bool):
            raise ValueError(f"{name}: {key} is {getattr(layer, key)!r}; it takes True or False")
    state: Any = layer.state_option
    if state is not None and not isinstance(state, StateOption):
        raise ValueError(f"{name}: state_option is {state!r}; it takes a StateOption")
    options = {p.name: type(p.default) for p in inspect.signature(layer).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option in (state.name if state else None, layer.hidden_option):
        if option is not None and options.get(option) is not int:
            whole = ", ".join(key for key, kind in options.items() if kind is int) or "none"
            raise ValueError(f"{name}: {option!r} is no option that is a whole number; those are {whole}")


def digest(make: Callable[..., Any]) -> str:
    """A hash of the file that defines it: results of one version are not those of another."""
    try:
        source = Path(inspect.getfile(make)).read_bytes()
    except (OSError, TypeError):  # made at a prompt
        source = repr(make).encode()
    return hashlib.sha256(source).hexdigest()[:16]
