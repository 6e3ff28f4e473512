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
WHOLE = 1 << 21  # values of the largest input up to which everything is compared
CHANNELS = 16  # compared beyond that


def with_graph(function: Function, inputs: Inputs) -> tuple[Inputs, Tensor]:
    """Leaves for all inputs, and the output of the function on them."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if name != "out"}
    return leaves, function(**leaves)


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


class Gate:
    """Compares contenders with the float64 reference on the timed inputs.

    Contenders always run at full size. Where that is too much for the reference, the gradient of the output is set to zero
    but for some channels of the last sequence. Channels meet only in the gradients of what they share, so those channels
    alone give the reference all it needs.
    """

    def __init__(self, case: Case, reference: Function, inputs: Inputs):
        size = max(value.numel() for value in inputs.values())
        self.axes = case.axes
        self.index: dict[str, Tensor] = {}
        self.checked = "all of it"
        # Channels of several groups cannot be picked without their groups.
        if size > WHOLE and getattr(case, "groups", 1) == 1:
            device = inputs["out"].device
            channels = torch.linspace(0, case.dim - 1, min(CHANNELS, case.dim)).long().to(device)
            self.index = {"batch": torch.tensor([case.batch - 1], device=device), "dim": channels}
            self.checked = f"{len(channels)} of {case.dim} channels, 1 of {case.batch} sequences"
        mask = self._scatter(self.pick("out", inputs["out"]), inputs["out"])
        self.inputs = {**inputs, "out": mask}
        exact_inputs = {name: self.pick(name, value).double() for name, value in self.inputs.items()}
        self.exact = gradients(reference, exact_inputs)

    def pick(self, name: str, value: Tensor) -> Tensor:
        """The compared part of the input (or its gradient) `name`."""
        for axis, label in enumerate(self.axes[name]):
            if label in self.index:
                value = value.index_select(axis, self.index[label])
        return value

    def _scatter(self, part: Tensor, whole: Tensor) -> Tensor:
        """Zeros like `whole`, but for `part` where it was picked."""
        if not self.index:
            return whole
        out = torch.zeros_like(whole)
        out[self.index["batch"][:, None], :, self.index["dim"]] = part.transpose(1, 2)
        return out

    def errors(self, function: Function, backward: bool, arrange: Callable[[Tensor], Tensor]) -> list[float]:
        """The error of the forward and, if wanted, the worst of the gradients."""
        inputs = {name: arrange(value) for name, value in self.inputs.items()}
        if backward:
            found = gradients(function, inputs)
        else:
            with torch.no_grad():
                found = {"out": function(**{name: value for name, value in inputs.items() if name != "out"})}
        each = {name: relative_rms(self.pick(name, value), self.exact[name]) for name, value in found.items()}
        forward = each.pop("out")
        return [forward, max(each.values())] if backward else [forward]
