"""What the tests of all ops know of one: how its inputs are drawn, and where its code takes another way.

`tests/cases/<op>.py` says it of each op; what an op's arguments are is in its benchmark, which draws inputs of the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import backends
import checks
import torch
from checks import Function
from hypothesis import strategies as st
from torch import Tensor

import madkernels
from madkernels import reference
from madkernels.benchmarks.cases import Arguments, Case
from madkernels.ops.registration import several

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Inputs = dict[str, Tensor]
Options = Mapping[str, Any]
Shape = tuple[int, ...]


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Where documents of these lengths begin, and where the last ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=backends.device())


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor], names: Sequence[str]) -> Inputs:
    """Inputs, those of these names changed."""
    return {k: change(t) if k in names else t for k, t in inputs.items()}


def _as_drawn(inputs: Inputs) -> Inputs:
    return inputs


def _as_given(inputs: Inputs, options: Options) -> Inputs:
    return inputs


def _as_named(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@dataclass(frozen=True, kw_only=True, eq=False)
class OpCase:
    """An op, as the contract's tests see it. A shape is (batch, seqlen, *sizes); of an op on tokens, these are all rows."""

    name: str  # as in madkernels.OPS
    kind: type[Case]  # of its benchmark, which has the arguments
    sizes: tuple[str, ...]  # what follows (batch, seqlen) in a shape; the first can be of any length
    derived: Callable[[Mapping[str, int]], Mapping[str, int]] = lambda sizes: {}  # axes whose lengths follow from others
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = _as_named  # the op, or its reference, to take the arguments
    further: Callable[[Inputs, Options], Options] = lambda inputs, options: {}  # what else the dispatcher's op takes
    scale: Callable[[Inputs], Inputs] = _as_drawn  # unit normal values into what the op is given, element by element
    fit: Callable[[Inputs, Options], Inputs] = _as_given  # inputs into those that these options take
    variants: tuple[dict[str, Any], ...]  # options to go through; the first are those of every other test
    second: str = "return_final_state"  # the option that asks for the second result
    has_second: Callable[[Options], bool] = lambda options: True  # whether with these options it can be asked for
    result_axes: tuple[int, int] = (1, 0)  # along which results of documents come one after another
    offsets: tuple[str, ...] = ("cu_seqlens",)  # the arguments that take the offsets of documents; none where it has none
    keeps_dtype: bool = False  # whether it is no matter of autocast

    shapes: tuple[Shape, ...]  # around every edge of the kernels' tiles
    regimes: tuple[Shape, ...]  # sizes, one for each way to compute the op: for what has to hold in each
    little: Shape  # sizes for what takes many calls
    small: Shape  # the least that has it all, for derivatives by differences
    empty: tuple[Shape, ...]
    any_shape: st.SearchStrategy[Shape]  # with at least one step

    slack: Callable[[torch.dtype], float] = lambda dtype: (
        0.0
    )  # relative error beyond that of the reference in the same dtype
    step_error: Mapping[torch.dtype, float] = field(default_factory=dict)  # of steps; if none, the bits of the whole
    state_error: float = 0.0  # of their state, in any dtype
    refused: Shape  # sizes for the refusals
    refusals: tuple[tuple[dict[str, Tensor], str], ...]  # changed inputs, and what is said of them
    mutants: tuple[Callable[..., Any], ...]  # wrong on purpose, with the op's signature: the contract must catch each

    @property
    def arguments(self) -> Arguments:
        return self.kind.arguments

    @property
    def function(self) -> Function:
        found: Function = self.adapt(getattr(madkernels, self.name))
        return found

    @property
    def step(self) -> Callable[..., Tensor]:
        found: Callable[..., Tensor] = getattr(madkernels, f"{self.name}_step")
        return found

    @property
    def reference_step(self) -> Callable[..., Tensor]:
        found: Callable[..., Tensor] = getattr(reference, f"{self.name}_step")
        return found

    @property
    def options(self) -> dict[str, Any]:
        return self.variants[0]

    def names(self, *axes: str, kind: str | None = None, optional: bool | None = None) -> list[str]:
        """Arguments that have these axes, and are of this kind."""
        return [
            name
            for name, argument in self.arguments.items()
            if set(axes) <= set(argument.axes) and kind in (None, argument.kind) and optional in (None, argument.optional)
        ]

    def draw(
        self, batch: int, seqlen: int, *sizes: int, dtype: torch.dtype = torch.float32, docs: int | None = None,
        maps: tuple[int, ...] = (),
    ) -> Inputs:  # fmt: skip
        """All inputs, activations in `dtype`: states of `docs` documents, if given, and with the axes `maps` before all."""
        generator = torch.Generator().manual_seed(batch + 10 * seqlen + sum(100 * size for size in sizes))
        lengths = dict(zip(self.sizes, sizes, strict=True)) | {"batch": batch, "seqlen": seqlen, "tokens": batch * seqlen}
        lengths |= {"sequences": batch if docs is None else docs, **self.derived(lengths)}
        shapes = {name: (*maps, *(lengths[axis] for axis in a.axes)) for name, a in self.arguments.items()}
        drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        return {k: t.to(backends.device(), self.arguments[k].dtype(dtype)) for k, t in self.scale(drawn).items()}

    def least(self, inputs: Inputs) -> Inputs:
        """Inputs without the optional ones."""
        return {k: t for k, t in inputs.items() if not self.arguments[k].optional}

    @property
    def rows(self) -> list[str]:
        """Arguments that have steps, or tokens."""
        return self.names("seqlen") + self.names("tokens")

    @property
    def has_documents(self) -> bool:
        """Whether documents can be packed along a row."""
        return bool(self.offsets)

    @property
    def has_state(self) -> bool:
        """Whether a sequence carries a state, which goes in and out."""
        return "initial_state" in self.arguments

    def documents(self, lengths: Sequence[int]) -> Inputs:
        """The arguments that say where documents of these lengths lie."""
        return dict.fromkeys(self.offsets, offsets_of(lengths))

    def packed(self, lengths: Sequence[int], *sizes: int, dtype: torch.dtype = torch.float32) -> Inputs:
        """Inputs of documents along one row."""
        return self.draw(1, sum(lengths), *sizes, dtype=dtype, docs=len(lengths))

    def whole(self, function: Callable[..., Any]) -> Function:
        """All results of a call: the second too, such as the final state, if it has one."""

        def call(**arguments: Any) -> Sequence[Tensor]:
            if not self.has_second(arguments):
                return (function(**arguments),)
            results: Sequence[Tensor] = function(**arguments, **{self.second: True})
            return results

        return call

    @functools.cached_property
    def call(self) -> Function:
        """All results of the op."""
        return self.whole(self.function)

    @functools.cached_property
    def reference(self) -> Function:
        """All results of its reference."""
        return self.whole(self.adapt(getattr(reference, self.name)))

    def check(self, inputs: Inputs, function: Callable[..., Any] | None = None, **options: Any) -> None:
        """Compares results and gradients of the op, or of another function, with those of the reference."""
        options = self.options | options
        op = self.call if function is None else self.whole(function)
        dtype = inputs[next(iter(self.arguments))].dtype
        checks.check(op, self.reference, self.fit(inputs, options), slack=self.slack(dtype), **options)

    def rows_at(self, inputs: Inputs, rows: slice | int) -> Inputs:
        """Inputs of some steps, or of one; what has no time stays as it is."""
        return changed(inputs, lambda t: t[:, rows], self.names("seqlen"))

    def dispatched(self, suffix: str = "") -> Any:
        """The dispatcher's op, or its backward or step by the suffix."""
        return getattr(torch.ops.madkernels, self.name + suffix).default

    def dispatcher_arguments(self, given: Mapping[str, Any], suffix: str = "") -> tuple[Any, ...]:
        """In the order of the schema; of those not given, flags are set and tensors absent."""
        schema = self.dispatched(suffix)._schema
        given = {**self.further(given, self.options), **given}
        return tuple(given.get(a.name, True if str(a.type) == "bool" else None) for a in schema.arguments)

    def backward_arguments(
        self, given: Mapping[str, Any], results: Sequence[Tensor] | Tensor, gradient: Callable[[Tensor], Tensor]
    ) -> tuple[Any, ...]:
        """Gradients of the first results, what the op was given, and those of its results that the backward takes."""
        results = several(results)
        schema, names = self.dispatched()._schema, [a.name for a in self.dispatched("_backward")._schema.arguments]
        known = {a.name for a in (*schema.arguments, *schema.returns)}
        gradients = dict(zip((name for name in names if name not in known), map(gradient, results), strict=False))
        found = {r.name: t.detach() for r, t in zip(schema.returns, results, strict=True)}
        kept = {key: t for key, t in found.items() if key in names}
        return self.dispatcher_arguments({**given, **gradients, **kept}, "_backward")
