"""The gate: a contender is timed only if it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madkernels.benchmarks.cases import Case, Inputs

Function = Callable[..., Any]  # from an op's inputs to its output: what an op or a peer is here

# Relative RMS errors a contender may have: some tens of roundings, since the peers differ in the order of their sums.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-10}
WHOLE = 1 << 21  # values of the reference's largest tensor up to which everything is compared
CHANNELS = 16  # compared beyond that, at the most
LARGEST = 1 << 24  # values up to which one channel more is taken: 128 MiB, of which the reference holds some ten
NAMES = {"dim": "channels", "batch": "sequences", "kv_heads": "key heads"}  # of axes; other names are words


def with_graph(function: Function, inputs: Inputs) -> tuple[Inputs, Tensor]:
    """Leaves for all inputs, and the output of the function on them."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if name != "out"}
    return leaves, function(**leaves)


def output(function: Function, inputs: Inputs) -> Tensor:
    """The output of the function on the inputs, without a graph."""
    with torch.no_grad():
        out: Tensor = function(**{name: value for name, value in inputs.items() if name != "out"})
    return out


def gradients(function: Function, inputs: Inputs) -> Inputs:
    """The output as `out` and the gradient of each input, with the gradient of the output in `inputs`."""
    leaves, out = with_graph(function, inputs)
    found = torch.autograd.grad(out, list(leaves.values()), inputs["out"])
    return dict(zip(leaves, found, strict=True)) | {"out": out.detach()}


def relative_rms(value: Tensor, exact: Tensor) -> float:
    """RMS error over the RMS of what it should be; infinite where `value` has a NaN."""
    value, exact = value.double(), exact.double()
    error = (value - exact).square().mean().sqrt()
    relative = float(error / exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny))
    return relative if relative == relative else float("inf")


def picked(case: Case) -> dict[str, Tensor]:
    """The indices to compare, by axis: of the last sequence some channels, or whole groups of them, as many as the reference
    has memory for. Empty where everything is compared."""
    axes = case.independent
    if case.reference_values <= WHOLE or not axes:
        return {}
    lengths = {axis: getattr(case, axis) for axis in axes}
    units = min(lengths.values())  # what is picked from: the channels, or the groups
    fit = LARGEST * case.batch * units // case.reference_values
    blocks = {axis: length // units for axis, length in lengths.items()}
    count = max(1, min(fit, CHANNELS // max(blocks.values()), units))
    chosen = torch.linspace(units - 1, 0, count).long()  # from the last, which is the one if it is one
    index = {axis: (chosen[:, None] * block + torch.arange(block)).flatten() for axis, block in blocks.items()}
    return index | {"batch": torch.tensor([case.batch - 1])}


class Gate:
    """Compares contenders with the float64 reference on the timed inputs.

    Contenders always run at full size. Where that is too much for the reference, the gradient of the output is set to zero
    but for some channels (or heads: the case says which axes are independent) of the last sequence. Channels meet only in
    the gradients of what they share, so those channels alone give the reference all it needs.
    """

    def __init__(self, case: Case, reference: Function, inputs: Inputs, checked: str = "all of it"):
        self.axes = case.axes
        self.index = {axis: index.to(inputs["out"].device) for axis, index in picked(case).items()}
        self.checked = checked
        if self.index:
            counts = {axis: f"{len(index)} of {getattr(case, axis)}" for axis, index in self.index.items()}
            self.checked = ", ".join(f"{count} {NAMES.get(axis, axis)}" for axis, count in counts.items())
        self.inputs = {**inputs, "out": self._masked(inputs["out"])}
        exact_inputs = {name: self.pick(name, value).double() for name, value in self.inputs.items()}
        self.exact = gradients(reference, exact_inputs)

    def pick(self, name: str, value: Tensor) -> Tensor:
        """The compared part of the input (or its gradient) `name`."""
        for axis, label in enumerate(self.axes[name]):
            if label in self.index:
                value = value.index_select(axis, self.index[label])
        return value

    def _masked(self, gradient: Tensor) -> Tensor:
        """The gradient of the output, zero but for the compared part."""
        for axis, label in enumerate(self.axes["out"]):
            if label in self.index:
                kept = torch.zeros(gradient.shape[axis], dtype=gradient.dtype, device=gradient.device)
                kept[self.index[label]] = 1
                gradient = gradient * kept.reshape(-1, *[1] * (gradient.dim() - axis - 1))
        return gradient

    def errors(self, function: Function, backward: bool, arrange: Callable[[Tensor], Tensor]) -> list[float]:
        """The error of the forward and, if wanted, the worst of the gradients."""
        inputs = {name: arrange(value) for name, value in self.inputs.items()}
        found = gradients(function, inputs) if backward else {"out": output(function, inputs)}
        each = {name: relative_rms(self.pick(name, value), self.exact[name]) for name, value in found.items()}
        forward = each.pop("out")
        return [forward, max(each.values())] if backward else [forward]
