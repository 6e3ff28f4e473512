"""A layer, and its decoding step, beside the same on plain torch and under torch.compile.

The inputs are those of the layer and its parameters. What takes long in float64 or in plain torch is checked on a shorter
sequence than is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from madkernels.benchmarks.cases import ROWS, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.plain import has_ops, plainly
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers import Layer, State
from madkernels.models.spec import parse

CHECKED = 256  # tokens, at the most, that layers and models are checked on


@cache
def meta_layer(layer: str, dim: int) -> Layer:
    """The layer without memory: parameters are given to it."""
    with torch.device("meta"):
        return parse(layer).layers[0].build(dim)


def parameters_of(build: Callable[[], nn.Module], dtype: torch.dtype, seed: int) -> Inputs:
    """Those that a module begins with, each once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: value.detach().to(dtype) for name, value in build().named_parameters()}


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """A call of a layer, given by its architecture string."""

    leeway: ClassVar[float] = 10.0  # errors of one product are magnified by the next
    tells_tokens: ClassVar[bool] = True
    tells_memory: ClassVar[bool] = True
    formula: ClassVar[str] = "as the layer counts them, what causality spares not taken off; backward twice as many"
    layer: str
    dim: int

    @property
    def module(self) -> Layer:
        return meta_layer(self.layer, self.dim)

    @property
    def axes(self) -> dict[str, Axes]:
        """Those of parameters are not named: none is checked in part."""
        return {"x": ROWS, **{name: () for name, _ in self.module.named_parameters()}, "out": ROWS}

    @property
    def options(self) -> dict[str, Any]:
        return {"module": self.module}

    @property
    def checked_as(self) -> Case:
        short = min(self.seqlen, CHECKED)
        return self if self.seqlen <= CHECKED else replace(self, name="a shorter one", batch=1, seqlen=short)

    def flops(self, direction: str) -> int:
        return {"forward": 1, "backward": 2}[direction] * self.batch * self.module.flops(self.seqlen)

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        parameters = parameters_of(lambda: parse(self.layer).layers[0].build(self.dim), dtype, seed)
        x = torch.randn(self.batch, self.seqlen, self.dim, generator=torch.Generator().manual_seed(seed))
        return {"x": x.to(dtype)} | parameters


@dataclass(frozen=True, kw_only=True)
class StepCase(LayerCase):
    """One token of each sequence, after `seqlen` others."""

    called: ClassVar[dict[str, str]] = {"forward": "decoding step"}
    rotates: ClassVar[bool] = False
    tells_memory: ClassVar[bool] = False
    formula: ClassVar[str] = ""

    @property
    def axes(self) -> dict[str, Axes]:
        return super().axes | {"x": ("batch", "dim"), "out": ("batch", "dim")}

    @property
    def tokens(self) -> int:
        return self.batch

    @property
    def options(self) -> dict[str, Any]:
        prompt = torch.randn(self.batch, self.seqlen, self.dim, generator=torch.Generator().manual_seed(1))
        return super().options | {"prompt": prompt}

    def flops(self, direction: str) -> int:
        return 0  # the floor is that of reading the parameters

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        inputs = super().make_inputs(dtype, seed)
        return inputs | {"x": inputs["x"][:, 0].contiguous()}


class PromptThenStep(nn.Module):
    """A layer's output for x (batch, dim) after a prompt (batch, seqlen, dim)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        assert isinstance(self.layer, Layer)
        state = self.layer.init_state(x.shape[0])
        self.layer(prompt.to(x.dtype), state=state)
        return self.layer.step(x, state)


def layer_output(x: Tensor, *, module: nn.Module, **parameters: Tensor) -> Tensor:
    """The layer's."""
    out: Tensor = functional_call(module, parameters, (x,))
    return out


def step_output(x: Tensor, *, module: nn.Module, prompt: Tensor, **parameters: Tensor) -> Tensor:
    """The decoding step's, from the prompt on: what the gate compares with."""
    out: Tensor = functional_call(
        PromptThenStep(module), {f"layer.{name}": value for name, value in parameters.items()}, (x, prompt)
    )
    return out


class Decoder:
    """Decoding steps, each from where the one before ended. The prompt is read at the first call with an input."""

    def __init__(self) -> None:
        self.begun: MutableMapping[Tensor, tuple[Layer, State]] = WeakTensorKeyDictionary()

    def __call__(self, x: Tensor, *, module: nn.Module, prompt: Tensor, **parameters: Tensor) -> Tensor:
        if x not in self.begun:
            layer = copy.deepcopy(module)
            layer.load_state_dict(parameters, assign=True)
            assert isinstance(layer, Layer)
            state = layer.init_state(x.shape[0])
            layer(prompt.to(x.dtype), state=state)
            self.begun[x] = layer, state
        layer, state = self.begun[x]
        return layer.step(x, state)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under torch.compile, each length by itself."""
    return torch.compile(function, dynamic=False)


def peers_of(takes_ops: bool) -> tuple[Peer, ...]:
    """The layer on plain torch, where it takes ops, and under torch.compile."""
    ours = Peer("compiled", compiled(layer_output), backward=True, auto=not takes_ops)
    if not takes_ops:
        return (ours,)
    plain = Peer("plain", plainly(layer_output), backward=True)
    return plain, Peer("plain-compiled", plainly(compiled(layer_output)), backward=True), ours


def benchmarks_of(layer: str, size: Size) -> list[Benchmark]:
    """Of a layer and of its decoding step; the first takes forward and backward, the other the forward alone.

    Args:
        layer: its name, for which the model's size gives the options, or its architecture string with them.
        size: of the model it is in.

    Raises:
        ValueError: there is no such layer, it does not go with the width, or the string has several.
    """
    if len(parse(layer).layers) != 1:
        raise ValueError(f"{layer!r} has several layers; expected one, such as attention:heads=8")
    spec = str(size.spec(layer) if ":" not in layer else parse(layer).layers[0])
    sizes: dict[str, Any] = {"name": size.name, "layer": spec, "dim": size.dim, "batch": size.batch, "seqlen": size.seqlen}
    case, step = LayerCase(**sizes), StepCase(**sizes)
    takes_ops, name = has_ops(case.module), layer.partition(":")[0]
    step_peers = (Peer("plain", plainly(Decoder())),) if takes_ops else ()
    return [
        Benchmark(name, layer_output, plainly(layer_output), (case,), case, peers_of(takes_ops)),
        Benchmark(f"{name} step", Decoder(), plainly(step_output), (step,), step, step_peers),
    ]
