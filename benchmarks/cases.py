"""The cases of each op: one list, for the benchmarks and for the op's tests.

Quick cases are small and of sizes that divide nothing; the others are the sizes of real models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one call of an op."""

    name: str
    batch: int
    seqlen: int
    dim: int
    quick: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (type(value) is int and value >= 1):
                raise ValueError(f"case {self.name!r}: {field.name} is {value!r}; expected an integer of at least 1")
            if field.type == "bool" and type(value) is not bool:
                raise ValueError(f"case {self.name!r}: {field.name} is {value!r}; expected true or false")

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the op that are not tensors."""
        raise NotImplementedError

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The name of each axis of each input, and of `out`."""
        raise NotImplementedError

    @property
    def exponentials(self) -> int:
        """Evaluations of exp that either pass cannot do without; the backward recomputes those of the forward."""
        return 0

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """The tensors of the call, by argument, at unit scale; activations in `dtype`. The same in each dtype, but for
        rounding."""
        raise NotImplementedError

    def __str__(self) -> str:
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "quick") or value in (False, None):
                continue
            parts.append(field.name if value is True else f"{field.name} {value}")
        return f"{self.name}: {', '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class ScanCase(Case):
    """A call of selective_scan."""

    dstate: int
    groups: int = 1
    D: bool = False
    z: bool = False
    delta_bias: bool = False
    delta_softplus: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.groups:
            raise ValueError(f"case {self.name!r}: groups is {self.groups}; expected a divisor of dim, {self.dim}")

    @property
    def options(self) -> dict[str, Any]:
        return {"delta_softplus": self.delta_softplus}

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        rows = ("batch", "seqlen", "dim")
        projection = ("batch", "seqlen", "dstate") if self.groups == 1 else ("batch", "seqlen", "groups", "dstate")
        axes: dict[str, tuple[str, ...]] = {"u": rows, "delta": rows, "A": ("dim", "dstate")}
        axes |= {"B": projection, "C": projection}
        axes |= {"D": ("dim",)} if self.D else {}
        axes |= {"z": rows} if self.z else {}
        axes |= {"delta_bias": ("dim",)} if self.delta_bias else {}
        return axes | {"out": rows}

    @property
    def exponentials(self) -> int:
        return self.batch * self.seqlen * self.dim * self.dstate

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """As in a Mamba layer at the start of training: step sizes log-uniform in 0.001 to 0.1, A from -1 to -dstate."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)
        inputs: Inputs = {}
        for name, axes in self.axes.items():
            inputs[name] = torch.randn([getattr(self, axis) for axis in axes], generator=generator)
        del inputs["out"]

        steps = torch.exp(torch.rand(self.dim, generator=generator) * math.log(100) + math.log(0.001))
        before_softplus = steps + torch.log(-torch.expm1(-steps))
        if self.delta_bias:
            inputs["delta"] *= 0.1
            inputs["delta_bias"] = before_softplus if self.delta_softplus else steps
        else:
            inputs["delta"] = inputs["delta"] * 0.1 + before_softplus
            if not self.delta_softplus:
                inputs["delta"] = F.softplus(inputs["delta"])
        inputs["A"] = -torch.arange(1.0, self.dstate + 1).repeat(self.dim, 1)
        in_wide = ("A", "D", "delta_bias")
        return {name: value.to(wide if name in in_wide else dtype) for name, value in inputs.items()}


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    """A call of causal_conv."""

    width: int
    bias: bool = False
    activation: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        rows = ("batch", "seqlen", "dim")
        axes: dict[str, tuple[str, ...]] = {"x": rows, "weight": ("dim", "width")}
        return axes | ({"bias": ("dim",)} if self.bias else {}) | {"out": rows}

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        inputs: Inputs = {}
        for name, axes in self.axes.items():
            inputs[name] = torch.randn([getattr(self, axis) for axis in axes], generator=generator).to(dtype)
        del inputs["out"]
        return inputs


@dataclass(frozen=True, kw_only=True)
class LongConvCase(Case):
    """A call of fft_conv, each channel with a filter of its own that decays to 1 % at its end."""

    filter_len: int
    skip: bool = False
    gates: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        rows = ("batch", "seqlen", "dim")
        axes: dict[str, tuple[str, ...]] = {"u": rows, "filter": ("dim", "filter_len")}
        axes |= {"skip": ("dim",)} if self.skip else {}
        axes |= {"pre_gate": rows, "post_gate": rows} if self.gates else {}
        return axes | {"out": rows}

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)
        inputs: Inputs = {}
        for name, axes in self.axes.items():
            inputs[name] = torch.randn([getattr(self, axis) for axis in axes], generator=generator)
        del inputs["out"]
        window = torch.exp(torch.linspace(0, math.log(0.01), self.filter_len))
        inputs["filter"] = inputs["filter"] * window / window.norm()
        return {name: value.to(wide if name in ("filter", "skip") else dtype) for name, value in inputs.items()}


_MAMBA: dict[str, Any] = {"D": True, "z": True, "delta_bias": True, "delta_softplus": True}

SCAN_CASES = (
    ScanCase(name="mamba-130m", batch=2, seqlen=2048, dim=1536, dstate=16, **_MAMBA),
    ScanCase(name="bare", batch=2, seqlen=2048, dim=1536, dstate=16),
    ScanCase(name="mamba-2.8b", batch=1, seqlen=2048, dim=5120, dstate=16, **_MAMBA),
    ScanCase(name="long", batch=1, seqlen=16384, dim=512, dstate=16, **_MAMBA),
    ScanCase(name="wide-state", batch=1, seqlen=2048, dim=1024, dstate=64, **_MAMBA),
    ScanCase(name="one", batch=1, seqlen=1, dim=1, dstate=1, quick=True),
    ScanCase(name="odd", batch=2, seqlen=63, dim=37, dstate=5, quick=True, **_MAMBA),
    ScanCase(name="grouped", batch=2, seqlen=65, dim=36, dstate=16, groups=3, quick=True, **_MAMBA),
    ScanCase(name="thousand", batch=1, seqlen=1000, dim=130, dstate=16, quick=True, D=True, delta_softplus=True),
)

CONV_CASES = (
    ConvCase(name="mamba-130m", batch=2, seqlen=2048, dim=1536, width=4, bias=True, activation="silu"),
    ConvCase(name="bare", batch=2, seqlen=2048, dim=1536, width=4),
    ConvCase(name="mamba-2.8b", batch=1, seqlen=2048, dim=5120, width=4, bias=True, activation="silu"),
    ConvCase(name="long", batch=1, seqlen=16384, dim=512, width=4, bias=True, activation="silu"),
    ConvCase(name="hyena", batch=2, seqlen=2048, dim=2304, width=3, bias=True),
    ConvCase(name="one", batch=1, seqlen=1, dim=1, width=1, quick=True),
    ConvCase(name="odd", batch=2, seqlen=63, dim=37, width=5, bias=True, activation="silu", quick=True),
    ConvCase(name="short", batch=2, seqlen=3, dim=65, width=4, bias=True, quick=True),
    ConvCase(name="thousand", batch=1, seqlen=1000, dim=130, width=4, activation="silu", quick=True),
)

LONG_CONV_CASES = (
    LongConvCase(name="1k", batch=2, seqlen=1024, dim=512, filter_len=1024),
    LongConvCase(name="4k", batch=2, seqlen=4096, dim=512, filter_len=4096),
    LongConvCase(name="4099", batch=2, seqlen=4099, dim=512, filter_len=4099),
    LongConvCase(name="16k", batch=2, seqlen=16384, dim=512, filter_len=16384),
    LongConvCase(name="hyena", batch=2, seqlen=2048, dim=768, filter_len=2048, skip=True, gates=True),
    LongConvCase(name="medium", batch=2, seqlen=4096, dim=512, filter_len=128),
    LongConvCase(name="short", batch=2, seqlen=4096, dim=512, filter_len=16),
    LongConvCase(name="one", batch=1, seqlen=1, dim=1, filter_len=1, quick=True),
    LongConvCase(name="odd", batch=2, seqlen=63, dim=37, filter_len=63, skip=True, gates=True, quick=True),
    LongConvCase(name="longer", batch=2, seqlen=65, dim=5, filter_len=100, quick=True),
    LongConvCase(name="thousand", batch=1, seqlen=1000, dim=33, filter_len=1000, gates=True, quick=True),
)
