"""selective_scan and the plain PyTorch ways to write it.

All peers compute in the dtype of A, as the op does. Those in plain PyTorch take one group of B and C.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import reference, selective_scan
from madkernels.benchmarks.cases import ROWS, Argument, Arguments, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.mamba import Mamba

COMPILED_STEPS = 8  # steps of one compiled call: as fast as more of them, and compiled sooner
TRANSFORMERS_MAMBA = "transformers.models.mamba.modeling_mamba"
MAMBA_SSM = "mamba_ssm.ops.selective_scan_interface"

# From steps delta' and delta' u (batch, seqlen, dim), A (dstate, dim), B and C (batch, seqlen, dstate) to y, like delta'.
Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ScanCase(Case):
    """A call of selective_scan."""

    arguments: ClassVar[Arguments] = {
        "u": Argument(ROWS),
        "delta": Argument(ROWS),
        "A": Argument(("dim", "dstate"), "wide"),
        "B": Argument(("batch", "seqlen", "groups", "dstate")),
        "C": Argument(("batch", "seqlen", "groups", "dstate")),
        "D": Argument(("dim",), "wide", optional=True),
        "z": Argument(ROWS, optional=True),
        "delta_bias": Argument(("dim",), "wide", optional=True),
        "initial_state": Argument(("sequences", "dim", "dstate"), "wide", optional=True),
    }
    dim: int
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

    def axes_of(self, argument: str) -> Axes:
        axes = super().axes_of(argument)
        return tuple(axis for axis in axes if axis != "groups" or self.groups > 1)

    @property
    def independent(self) -> Axes:
        return ("dim",) if self.groups == 1 else ("groups", "dim")

    def arithmetic(self, direction: str) -> float:
        """A state and step: exp(delta A), delta u B, h's multiply and add, and C's; backward twice as many."""
        return {"forward": 7, "backward": 14}[direction] * self.exponentials

    @property
    def exponentials(self) -> int:
        return self.batch * self.seqlen * self.dim * self.dstate

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """As in a Mamba layer at the start of training: step sizes log-uniform in 0.001 to 0.1, A from -1 to -dstate."""
        steps = torch.exp(torch.rand(self.dim, generator=generator) * math.log(100) + math.log(0.001))
        before_softplus = steps + torch.log(-torch.expm1(-steps))
        delta = inputs["delta"] * 0.1
        if self.delta_bias:
            inputs = inputs | {"delta_bias": before_softplus if self.delta_softplus else steps}
        else:
            delta = delta + before_softplus
            delta = delta if self.delta_softplus else F.softplus(delta)
        return inputs | {"delta": delta, "A": -torch.arange(1.0, self.dstate + 1).repeat(self.dim, 1)}


_MAMBA: dict[str, Any] = {"D": True, "z": True, "delta_bias": True, "delta_softplus": True}

CASES = (
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
TRAINING = ScanCase(name="training", batch=8, seqlen=2048, dim=8192, dstate=16)


def case_of(size: Size) -> ScanCase:
    """The scan of a Mamba layer of a model."""
    layer = size.layer("mamba")
    assert isinstance(layer, Mamba)
    sizes: dict[str, Any] = {"batch": size.batch, "seqlen": size.seqlen, "dim": layer.inner, "dstate": layer.dstate}
    return ScanCase(name=size.name, **sizes, **_MAMBA)


def step_loop(steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Step by step, states (batch, dim, dstate) updated in place."""
    batch, seqlen, _ = x.shape
    A = A.t().contiguous()
    h, decay, y = x.new_zeros(batch, *A.shape), x.new_empty(batch, *A.shape), torch.empty_like(x)
    for t in range(seqlen):
        torch.mul(steps[:, t, :, None], A, out=decay).exp_()
        h.mul_(decay).addcmul_(x[:, t, :, None], B[:, t, None, :])
        y[:, t] = torch.bmm(h, C[:, t, :, None]).squeeze(-1)
    return y


def step_loop_transposed(steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Step by step, states (batch, dstate, dim): the long axis is the one that vectorises."""
    batch, seqlen, _ = x.shape
    h, decay, y = x.new_zeros(batch, *A.shape), x.new_empty(batch, *A.shape), torch.empty_like(x)
    for t in range(seqlen):
        torch.mul(steps[:, t, None], A, out=decay).exp_()
        h.mul_(decay).addcmul_(x[:, t, None], B[:, t, :, None])
        torch.bmm(C[:, t, None], h, out=y[:, t : t + 1])
    return y


def blocked(steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int = 4, width: int = 2048) -> Tensor:
    """Blocks of `length` steps and `width` channels, which stay in cache: one call an operation and block, but for the
    recurrence itself, which is one call a step."""
    batch, seqlen, dim = x.shape
    B, C = B.transpose(0, 1).unsqueeze(-1).contiguous(), C.transpose(0, 1).unsqueeze(2).contiguous()
    y = torch.empty_like(x)
    for channels in (slice(c, c + width) for c in range(0, dim, width)):
        a, y_block = A[:, channels].contiguous(), y[..., channels]
        s, v = (rows[..., channels].transpose(0, 1).unsqueeze(2) for rows in (steps, x))
        h = x.new_zeros(batch, *a.shape)
        decays, states = (x.new_empty(length, *h.shape) for _ in range(2))
        for begin in range(0, seqlen, length):
            end = min(begin + length, seqlen)
            decay, state = decays[: end - begin], states[: end - begin]
            torch.mul(s[begin:end], a, out=decay).exp_()
            torch.mul(v[begin:end], B[begin:end], out=state)
            for i in range(end - begin):
                h = state[i].addcmul_(decay[i], h)
            y_block[:, begin:end] = torch.matmul(C[begin:end], state).squeeze(2).transpose(0, 1)
            h = h.clone()  # its block is written over
    return y


def chunked(steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As `blocked` over all channels, without updates in place: autograd can follow."""
    return chunked_from(x.new_zeros(x.shape[0], *A.shape), steps, x, A, B, C)[0]


def chunked_from(
    h: Tensor, steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int = 8
) -> tuple[Tensor, Tensor]:
    """The same from a state (batch, dstate, dim), with the state at the end. Splits and unbinds, since the gradient of a
    slice is as large as what it was cut from."""
    ys = []
    for s, v, b, c in zip(*(torch.split(rows, length, dim=1) for rows in (steps, x, B, C)), strict=True):
        states = []
        decay, added = torch.exp(s.unsqueeze(2) * A), v.unsqueeze(2) * b.unsqueeze(-1)
        for decay_t, added_t in zip(decay.unbind(1), added.unbind(1), strict=True):
            h = torch.addcmul(added_t, decay_t, h)
            states.append(h)
        ys.append(torch.matmul(c.unsqueeze(2), torch.stack(states, 1)).squeeze(2))
    return torch.cat(ys, 1), h


def doubling(steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int = 8) -> Tensor:
    """Chunks scanned by doubling, log2(length) passes, without a call a step."""
    batch, seqlen, _ = x.shape
    h, y = x.new_zeros(batch, *A.shape), torch.empty_like(x)
    for begin in range(0, seqlen, length):
        chunk = slice(begin, begin + length)
        decay = torch.exp(steps[:, chunk, None] * A)
        state = x[:, chunk, None] * B[:, chunk, :, None]
        state[:, 0].addcmul_(decay[:, 0], h)
        apart = 1
        while apart < state.shape[1]:
            state[:, apart:] += decay[:, apart:] * state[:, :-apart]
            decay[:, apart:] = decay[:, apart:] * decay[:, :-apart]
            apart *= 2
        h = state[:, -1]
        y[:, chunk] = torch.matmul(C[:, chunk, None], state).squeeze(2)
    return y


@cache
def _compiled_steps() -> Callable[..., tuple[Tensor, Tensor]]:
    def several(h: Tensor, s: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for t in range(x.shape[1]):
            h = torch.exp(s[:, t, None] * A) * h + x[:, t, None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(1))
        return h, torch.stack(ys, 1)

    return torch.compile(several, fullgraph=True, dynamic=False)


def compiled(steps: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A few steps at a time through torch.compile, which fuses them."""
    h = x.new_zeros(x.shape[0], *A.shape)
    ys = []
    for s, v, b, c in zip(*(torch.split(rows, COMPILED_STEPS, dim=1) for rows in (steps, x, B, C)), strict=True):
        h, y = _compiled_steps()(h, s, v, A, b, c)
        ys.append(y)
    return torch.cat(ys, 1)


def whole(recurrence: Recurrence) -> Callable[..., Tensor]:
    """The op, from the recurrence alone."""

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, delta_softplus: bool = False,
    ) -> Tensor:  # fmt: skip
        x, steps, B, C = (t.to(A.dtype) for t in (u, delta, B, C))
        if delta_bias is not None:
            steps = steps + delta_bias
        if delta_softplus:
            steps = F.softplus(steps)
        y = recurrence(steps, steps * x, A.t().contiguous(), B, C)
        if D is not None:
            y = torch.addcmul(y, x, D)
        if z is not None:
            y = y * F.silu(z.to(A.dtype))
        return y.to(u.dtype)

    return scan


def transformers_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """The PyTorch path of transformers' Mamba, which it takes where mamba-ssm is absent."""
    scan = importlib.import_module(TRANSFORMERS_MAMBA).mamba_selective_scan
    rows = [None if t is None else t.transpose(1, 2) for t in (u, delta, z)]
    out: Tensor = scan(rows[0], rows[1], A, B.transpose(1, 2), C.transpose(1, 2), D, rows[2], delta_bias, delta_softplus)
    return out.transpose(1, 2)


def mamba_ssm_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """The CUDA kernel of mamba-ssm, which takes channels first."""
    scan = importlib.import_module(MAMBA_SSM).selective_scan_fn
    rows = [None if t is None else t.transpose(1, 2) for t in (u, delta, z)]
    B, C = (t.movedim(1, -1) for t in (B, C))
    out: Tensor = scan(rows[0], rows[1], A, B, C, D, rows[2], delta_bias, delta_softplus)
    return out.transpose(1, 2)


def _one_group(case: Case) -> bool:
    return isinstance(case, ScanCase) and case.groups == 1


BENCHMARK = Benchmark(
    name="selective_scan",
    function=selective_scan,
    reference=reference.selective_scan,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        # No backward: that of a slice a step writes a gradient of the whole sequence every step.
        Peer("reference", reference.selective_scan),
        Peer("step-loop", whole(step_loop), accepts=_one_group),
        Peer("step-loop-transposed", whole(step_loop_transposed), accepts=_one_group),
        Peer("blocked", whole(blocked), accepts=_one_group),
        Peer("chunked", whole(chunked), backward=True, accepts=_one_group),
        Peer("doubling", whole(doubling), accepts=_one_group),
        Peer("compiled", whole(compiled), accepts=_one_group, auto=False),
        Peer(
            "transformers",
            transformers_scan,
            accepts=_one_group,
            needs=f"{TRANSFORMERS_MAMBA}:mamba_selective_scan",
        ),
        Peer(
            "mamba-ssm",
            mamba_ssm_scan,
            backward=True,
            channel_first=True,
            needs=f"{MAMBA_SSM}:selective_scan_fn",
            devices=("cuda",),
        ),
    ),
)
