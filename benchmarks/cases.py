"""What an op takes, and a case: sizes and options of one call.

`madkernels/benchmarks/<op>.py` says it of each op, for the benchmarks and for the tests. Quick cases are small and of sizes
that divide nothing; the others are the sizes of real models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Axes = tuple[str, ...]
LARGEST_CHECKED = 1 << 28  # weights that the reference has in float64, with their gradients
ROWS: Axes = ("batch", "seqlen", "dim")


@dataclass(frozen=True)
class Argument:
    """A tensor that an op takes: the names of its axes, and its dtype.

    Those of kind "activation" have one dtype; "wide" is that, but float32 at the least; a "parameter" may have either.
    """

    axes: Axes
    kind: Literal["activation", "parameter", "wide"] = "activation"
    optional: bool = False

    def dtype(self, activations: torch.dtype) -> torch.dtype:
        """The dtype that it has beside such activations."""
        return torch.promote_types(activations, torch.float32) if self.kind == "wide" else activations


Arguments = Mapping[str, Argument]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one call of an op: a field for each axis and option, and a flag for each optional argument."""

    arguments: ClassVar[Arguments]
    out: ClassVar[Axes] = ROWS
    formula: ClassVar[str] = ""  # of `flops`, in words
    share: ClassVar[str] = "multiply"  # what the rate of `flops` over that of multiplying is called
    called: ClassVar[Mapping[str, str]] = {}  # what its passes are called, where not forward and backward
    rotates: ClassVar[bool] = True  # whether contenders take copies of the inputs in turn
    leeway: ClassVar[float] = 1.0  # times the tolerance of an op that errors may have
    tells_tokens: ClassVar[bool] = False  # whether tokens per second are told
    tells_memory: ClassVar[bool] = False  # whether the memory of every contender is
    name: str
    batch: int
    seqlen: int
    quick: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int | None" and value is None:
                continue
            if field.type in ("int", "int | None") and not (type(value) is int and value >= 1):
                raise ValueError(f"case {self.name!r}: {field.name} is {value!r}; expected an integer of at least 1")
            if field.type == "bool" and type(value) is not bool:
                raise ValueError(f"case {self.name!r}: {field.name} is {value!r}; expected true or false")

    @property
    def tokens(self) -> int:
        """All of the batch: the rows of an op that knows no sequence."""
        return self.batch * self.seqlen

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the op that are not tensors."""
        return {}

    def options_on(self, device: torch.device) -> dict[str, Any]:
        """The same, with those that are tensors after all, as offsets are, on a device."""
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()}

    def has(self, argument: str) -> bool:
        """Whether an optional argument is given."""
        return bool(getattr(self, argument, False))

    def axes_of(self, argument: str) -> Axes:
        """The axes that an argument has in this case."""
        return self.arguments[argument].axes

    def dtype_of(self, argument: str, activations: torch.dtype) -> torch.dtype:
        """The dtype that an argument has beside such activations in this case."""
        return self.arguments[argument].dtype(activations)

    @property
    def axes(self) -> dict[str, Axes]:
        """The name of each axis of each input, and of `out`."""
        given = [name for name, argument in self.arguments.items() if not argument.optional or self.has(name)]
        return {name: self.axes_of(name) for name in given} | {"out": self.out}

    @property
    def exponentials(self) -> int:
        """Evaluations of exp that either pass cannot do without; the backward recomputes those of the forward."""
        return 0

    def flops(self, direction: str) -> int:
        """Floating-point operations of the products that a pass, "forward" or "backward", cannot do without; 0 where it is
        not products that take its time."""
        return 0

    def arithmetic(self, direction: str) -> float:
        """All floating-point operations of a pass as its formula has them, products or not: what a roofline counts."""
        return self.flops(direction)

    @property
    def independent(self) -> Axes:
        """The axes along which the op computes each index by itself, so that some of them can be checked without the rest.
        Of two axes, each index of the first goes with a block of the second: a group with its channels."""
        return ()

    @property
    def reference_values(self) -> int:
        """Values of the largest tensor that the reference makes."""
        return max(self.count(axes) for axes in self.axes.values())

    def count(self, axes: Axes) -> int:
        """How many values a tensor with these axes has."""
        return math.prod(getattr(self, axis) for axis in axes)

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """The tensors of the call, by argument; activations in `dtype`. The same in each dtype, but for rounding."""
        generator = torch.Generator().manual_seed(seed)
        inputs: Inputs = {}
        for name, axes in self.axes.items():
            inputs[name] = torch.randn([getattr(self, axis) for axis in axes], generator=generator)
        del inputs["out"]
        inputs = self.scale(inputs, generator)
        return {name: value.to(self.dtype_of(name, dtype)) for name, value in inputs.items()}

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """Inputs as a model has them, from normal ones."""
        return inputs

    @property
    def checked_as(self) -> Case:
        """The case that contenders are compared with the reference on: this one, unless that would take too long."""
        return self

    def shortened(self) -> Case:
        """The same on an eighth of the sequence, from whose time that of this one is estimated."""
        return replace(self, seqlen=max(self.seqlen // 8, 1))

    def work(self) -> float:
        """What the time of a forward is about in proportion to."""
        return self.flops("forward") or self.exponentials or self.tokens

    def __str__(self) -> str:
        return describe(asdict(self))


def describe(case: Mapping[str, Any]) -> str:
    """A case by its fields."""
    told = {name: value for name, value in case.items() if name not in ("name", "quick") and value not in (False, None)}
    return f"{case['name']}: {', '.join(name if value is True else f'{name} {value}' for name, value in told.items())}"
