"""How an op is compared with its reference."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]


def relative_rms(value: Tensor, exact: Tensor) -> float:
    """RMS error over the RMS of what it should be, or over 1 where that is smaller: tests have inputs at unit scale, so an
    output far below it is a cancellation. Infinite where one is NaN and the other is not."""
    value, exact = value.detach().double(), exact.detach().double()
    if value.numel() == 0:
        return 0.0
    if not torch.equal(value.isnan(), exact.isnan()):
        return float("inf")
    error = (value - exact).nan_to_num().square().mean().sqrt()
    return float(error / exact.nan_to_num().square().mean().sqrt().clamp_min(1.0))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Truly relative: what a layer gives at the start is far below unit scale. NaN where either has one."""
    assert value.shape == exact.shape
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30)) if value.numel() else 0.0


def with_gradients(function: Function, inputs: dict[str, Tensor | None], seed: int = 0) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random weighting of them, by name."""
    leaves = {k: None if v is None else v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bfloat16, so that they are the same numbers in every dtype.
    weights = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    wanted = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], list(wanted.values()), [w for _, w in pairs], materialize_grads=True)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}


def check(op: Function, reference: Function, inputs: dict[str, Tensor | None], *, slack: float = 0, **options: Any) -> None:
    """Asserts that `op` is as near to `reference` in float64 as twice `reference` in the dtype of the inputs.

    Both are given the same (rounded) inputs. `slack`: relative RMS error that is allowed beyond.
    """
    told = _told(reference, inputs, options)
    found = with_gradients(lambda **t: op(**t, **options), inputs)
    assert found.keys() == told.keys()
    for name, value in found.items():
        exact, dtype, rounding = told[name]
        assert value.shape == exact.shape, name
        assert value.dtype == dtype, f"{name} is {value.dtype}, not {dtype}"
        allowed = 2 * rounding + _rounding(value) + slack
        error = relative_rms(value.cpu(), exact)
        assert error <= allowed, f"{name}: relative RMS error {error:.1e}, allowed {allowed:.1e}"


# By result: what it is in float64, the dtype that it has beside inputs of their dtype, and its error in that.
Told = dict[str, tuple[Tensor, torch.dtype, float]]
KEPT = 256
_kept: OrderedDict[Hashable, Told] = OrderedDict()


def _told(reference: Function, inputs: dict[str, Tensor | None], options: dict[str, Any]) -> Told:
    """What the reference says of inputs, on the CPU, and remembered: every layout and backend asks for the same."""
    key = (reference, *((name, _contents(value)) for name, value in (inputs | options).items()))
    if key not in _kept:
        given, further = ({k: _on_cpu(v) for k, v in values.items()} for values in (inputs, options))
        exact = with_gradients(lambda **t: reference(**t, **further), {k: _double(v) for k, v in given.items()})
        plain = with_gradients(lambda **t: reference(**t, **further), given)
        _kept[key] = {k: (exact[k], plain[k].dtype, relative_rms(plain[k], exact[k])) for k in exact}
    _kept.move_to_end(key)
    if len(_kept) > KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def _contents(value: Any) -> Hashable:
    """What tells a value from others, whatever its layout and device."""
    if not isinstance(value, Tensor):
        return (value,)
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return value.shape, value.dtype, hashlib.blake2b(data).digest()


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _double(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


def _rounding(t: Tensor) -> float:
    """A few roundings of the arithmetic; more in float64, where what is called exact is rounded as well."""
    return 64 * torch.finfo(torch.float64).eps if t.dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps


def transposed(t: Tensor) -> Tensor:
    """The same values, laid out with the second-last axis dense."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def strided(t: Tensor) -> Tensor:
    """The same values, no axis dense."""
    wide = t.new_zeros(*t.shape, 2)
    wide[..., 0] = t
    return wide[..., 0]


def misaligned(t: Tensor) -> Tensor:
    """The same values, one element off."""
    flat = t.new_zeros(t.numel() + 1)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def far_apart(t: Tensor) -> Tensor:
    """The same values, the last of the first axis 2^31 elements behind the first. In float16, and mostly never touched."""
    assert t.dtype == torch.float16
    stride = 2**31 // (len(t) - 1) + 1
    count = stride * (len(t) - 1) + t[0].numel()
    on_cpu = t.device.type == "cpu"  # where torch would poison, and so touch, all of it
    memory = torch.from_numpy(np.empty(count, np.float16)) if on_cpu else torch.empty(count, dtype=t.dtype, device=t.device)
    apart = memory.as_strided(t.shape, (stride, *t[0].contiguous().stride()))
    return apart.copy_(t)
