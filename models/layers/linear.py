"""Linear layers on the CPU, each of whose three products is by whatever multiplies it fastest there.

torch multiplies float32 matrices by MKL, which on some CPUs reaches a third of what oneDNN reaches; and which of the two
is faster depends on the shape. So the first call of a shape times both, for y = x W', dx = dy W and dW = dy' x, and the
choice is kept in a file of this machine. Other devices and dtypes, graphs and transforms, small products and parameters in
shards take torch's own.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.tangents import has_tangent

LEAST = 2**24  # multiply-adds of a product below which there is nothing to gain
FASTER = 0.97  # of torch's time, from which on another way is taken
ROUNDS = 7
CLOSE = 1e-4  # relative to the largest value: what is further away from torch's is not taken
TORCH = "torch"
VARIABLE = "MADKERNELS_LINEAR"


class Ways(NamedTuple):
    """How each product is multiplied, by the names below."""

    y: str = TORCH
    dx: str = TORCH
    dweight: str = TORCH


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


# x (rows, inputs), weight (outputs, inputs), bias (outputs,), dy (rows, outputs)
FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {TORCH: F.linear, "onednn": _onednn}
INPUT_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    TORCH: lambda dy, weight: dy @ weight,
    "onednn": lambda dy, weight: _onednn(dy, weight.t().contiguous()),
}
WEIGHT_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    TORCH: lambda dy, x: dy.t() @ x,
    "turned": lambda dy, x: (x.t() @ dy).t(),  # of few inputs several times as fast
    "onednn": lambda dy, x: _onednn(dy.t().contiguous(), x.t().contiguous()),
}


class Linear(nn.Linear):
    """torch.nn.Linear, by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: x (..., inputs), weight (outputs, inputs), bias (outputs,) to (..., outputs)."""
    if not _has_a_choice(x, weight, bias):
        return F.linear(x, weight, bias)
    ways = ways_of(x.numel() // x.shape[-1], *weight.shape)
    if ways == Ways():
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias, ways)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def _has_a_choice(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.dim() < 2:
        return False
    if x.numel() * weight.shape[0] < LEAST or type(weight) not in (Tensor, nn.Parameter) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or has_tangent((x, weight, bias)):
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and os.environ.get(VARIABLE) != TORCH


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ways: Ways) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ways = ways
        return FORWARD[ways.y](x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (dy,) = ctx.saved_tensors, grad_outputs
        ways = Ways() if torch.is_grad_enabled() else ctx.ways  # torch's own can be differentiated again
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = INPUT_GRADIENT[ways.dx](dy, weight) if needs_x else None
        dweight = WEIGHT_GRADIENT[ways.dweight](dy, x) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None, None


# ---- choosing


def ways_of(rows: int, outputs: int, inputs: int) -> Ways:
    """The fastest ways to multiply at about so many rows, from this process, from the file or, the first time, by trying."""
    return _ways_of(1 << (rows.bit_length() - 1), outputs, inputs, torch.get_num_threads())


@cache
def _ways_of(rows: int, outputs: int, inputs: int, threads: int) -> Ways:
    name, file = f"{rows} x {inputs} x {outputs}", _file()
    machine = f"{_cpu()}, {threads} threads, torch {torch.__version__}"
    if found := _read(file).get(machine, {}).get(name):
        return _known(found)
    ways = measure(rows, outputs, inputs)
    known = _read(file)
    found = known.setdefault(machine, {}).setdefault(name, list(ways))  # of another process, if that was faster
    _write(file, known)
    return _known(found)


def _known(names: list[str]) -> Ways:
    """The ways of these names, and torch's where there is no such way."""
    tables = (FORWARD.keys(), INPUT_GRADIENT.keys(), WEIGHT_GRADIENT.keys())
    return Ways(*(name if name in table else TORCH for name, table in zip(names, tables, strict=True)))


@torch.no_grad()
def measure(rows: int, outputs: int, inputs: int) -> Ways:
    """Times every way at this shape."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, width, generator=generator) for width in (inputs, outputs))
    weight = torch.randn(outputs, inputs, generator=generator)
    return Ways(
        _fastest({name: partial(way, x, weight, None) for name, way in FORWARD.items()}),
        _fastest({name: partial(way, dy, weight) for name, way in INPUT_GRADIENT.items()}),
        _fastest({name: partial(way, dy, x) for name, way in WEIGHT_GRADIENT.items()}),
    )


def _fastest(ways: dict[str, Callable[[], Tensor]]) -> str:
    """The name of the fastest that gives what torch gives; torch unless another is clearly faster. They take turns, so
    that all share the machine's ups and downs."""
    wanted, right = ways[TORCH](), dict[str, Callable[[], Tensor]]()
    for name, way in ways.items():
        try:
            error = (way() - wanted).abs().max()
        except (RuntimeError, NotImplementedError, AttributeError):  # this torch has no such way
            continue
        if error <= CLOSE * wanted.abs().max():
            right[name] = way
    seconds: dict[str, list[float]] = {name: [] for name in right}
    for _ in range(ROUNDS):
        for name, way in right.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    return best if medians[best] < FASTER * medians[TORCH] else TORCH


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "madkernels" / "linear.json"


@cache
def _cpu() -> str:
    from madkernels.benchmarks.machine import cpu_name

    return cpu_name()


def _read(file: Path) -> dict[str, dict[str, list[str]]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    damaged = not isinstance(found, dict) or any(not isinstance(shapes, dict) for shapes in found.values())
    return {} if damaged else found


def _write(file: Path, known: dict[str, dict[str, list[str]]]) -> None:
    """Whole or not at all; where nothing can be written, the next process measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps(known, indent=1) + "\n")
        whole.rename(file)
    except OSError:
        return
