"""Views that overlap themselves, and others: every op reads them where they are, and allocates nothing in their layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cases import CASES
from checks import relative_rms, with_gradients
from op_cases import Inputs, OpCase
from torch import Tensor

pytestmark = pytest.mark.usefixtures("backend")


def views(t: Tensor) -> dict[str, Tensor]:
    """Views of the shape of t: expanded along one axis, two and all; overlapping; with axes in another order; offset."""
    found = {}
    for axis in range(t.dim()):
        found[f"expanded along {axis}"] = t.select(axis, 0).unsqueeze(axis).expand(t.shape)
        found[f"expanded but along {axis}"] = t[tuple(slice(None if i == axis else 1) for i in range(t.dim()))].expand(
            t.shape
        )
        found[f"axis {axis} last in memory"] = t.movedim(axis, -1).contiguous().movedim(-1, axis)
        found[f"every other along {axis}"] = t.repeat_interleave(2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
    found["one number"] = t.flatten()[:1].view([1] * t.dim()).expand(t.shape)
    found["windows"] = t.flatten().repeat(2)[3:].as_strided(t.shape, [1] * t.dim())
    found["offset"] = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    return found


def drawn(op: OpCase, dtype: torch.dtype) -> Inputs:
    return op.draw(2, 40, *op.little, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", CASES.values(), ids=CASES)
def test_views_are_read_where_they_are(op: OpCase, dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of a contiguous copy."""

    def call(**inputs: Tensor) -> Sequence[Tensor]:
        return op.call(**inputs, **op.options)

    plain = drawn(op, dtype)
    for argument, t in plain.items():
        for kind, view in views(t).items():
            copy = with_gradients(call, plain | {argument: view.clone(memory_format=torch.contiguous_format)})
            found = with_gradients(call, plain | {argument: view})
            for name, value in found.items():
                assert relative_rms(value, copy[name]) < (1e-6 if dtype == torch.float32 else 1e-2), (
                    f"{argument} {kind}: {name}"
                )


@pytest.mark.parametrize("op", CASES.values(), ids=CASES)
def test_what_is_told_to_torch_agrees(op: OpCase) -> None:
    """Shapes, dtypes and strides of the fake implementations, forward and backward, whatever the view."""
    forward, backward = op.dispatched(), op.dispatched("_backward")
    plain = drawn(op, torch.float32)
    for argument, t in plain.items():
        for kind, view in views(t).items():
            inputs = plain | {argument: view}
            arguments = op.dispatcher_arguments(inputs)
            further = op.backward_arguments(inputs, forward(*arguments), torch.ones_like)
            for called, given in ((forward, arguments), (backward, further)):
                with torch._subclasses.FakeTensorMode() as mode:
                    told = called(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given))
                for real, fake in zip(called(*given), told, strict=True):
                    same = (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
                    assert same or real.numel() == 0, f"{argument} {kind}: {real.stride()} is told as {fake.stride()}"
