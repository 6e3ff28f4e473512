"""Views that overlap themselves, and others: every op reads them where they are, and allocates nothing in their layout."""

from __future__ import annotations

from typing import Any

import backends
import op_cases
import pytest
import torch
from checks import relative_rms, with_gradients
from op_cases import OPS
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_views_are_read_where_they_are(op: str, dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of a contiguous copy."""
    plain = {k: t.to(backends.device()) for k, t in op_cases.draw(op, dtype=dtype).items()}
    for argument, t in plain.items():
        for kind, view in views(t).items():
            copy = with_gradients(OPS[op], plain | {argument: view.clone(memory_format=torch.contiguous_format)})
            found = with_gradients(OPS[op], plain | {argument: view})
            for name, value in found.items():
                assert relative_rms(value, copy[name]) < (1e-6 if dtype == torch.float32 else 1e-2), (
                    f"{argument} {kind}: {name}"
                )


def arguments_of(op: str, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    """Of the dispatcher's op, whose schema has all options."""
    values = dict(delta_softplus=True, silu=True, causal=True, with_final_state=True, save_checkpoints=True) | inputs
    schema = getattr(torch.ops.madkernels, op).default._schema
    return tuple(values.get(a.name) for a in schema.arguments)


@pytest.mark.parametrize("op", OPS)
def test_what_is_told_to_torch_agrees(op: str) -> None:
    """Shapes, dtypes and strides of the fake implementations, forward and backward, whatever the view."""
    overload, backward = (getattr(torch.ops.madkernels, name).default for name in (op, f"{op}_backward"))
    plain = {k: t.to(backends.device()) for k, t in op_cases.draw(op, dtype=torch.float32).items()}
    for argument, t in plain.items():
        for kind, view in views(t).items():
            arguments = arguments_of(op, plain | {argument: view})
            outputs = overload(*arguments)
            weights = dict(
                zip([a.name for a in backward._schema.arguments], [torch.ones_like(o) for o in outputs[:2]], strict=False)
            )
            checkpoints = {"checkpoints": outputs[2]} if op == "selective_scan" else {}
            further = arguments_of(f"{op}_backward", plain | {argument: view} | weights | checkpoints)
            for called, given in ((overload, arguments), (backward, further)):
                with torch._subclasses.FakeTensorMode() as mode:
                    told = called(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given))
                for real, fake in zip(called(*given), told, strict=True):
                    same = (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
                    assert same or real.numel() == 0, f"{argument} {kind}: {real.stride()} is told as {fake.stride()}"
