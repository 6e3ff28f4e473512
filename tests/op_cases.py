"""One small case an op, by argument: what tests of all ops draw their inputs from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import madkernels
from madkernels import reference

BATCH, SEQLEN, DIM = 2, 40, 6
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "selective_scan": {
        "u": (BATCH, SEQLEN, DIM), "delta": (BATCH, SEQLEN, DIM), "A": (DIM, 4), "B": (BATCH, SEQLEN, 4),
        "C": (BATCH, SEQLEN, 4), "D": (DIM,), "z": (BATCH, SEQLEN, DIM), "delta_bias": (DIM,),
        "initial_state": (BATCH, DIM, 4),
    },
    "causal_conv": {"x": (BATCH, SEQLEN, DIM), "weight": (DIM, 4), "bias": (DIM,), "initial_state": (BATCH, 3, DIM)},
    "fft_conv": {
        "u": (BATCH, SEQLEN, DIM), "filter": (3, 17), "skip": (DIM,), "pre_gate": (BATCH, SEQLEN, DIM),
        "post_gate": (BATCH, SEQLEN, DIM), "initial_state": (BATCH, 16, DIM),
    },
}  # fmt: skip


def _calls(ops: Any) -> dict[str, Callable[..., Any]]:
    return {
        "selective_scan": lambda **t: ops.selective_scan(
            **t | {"A": -t["A"].exp()}, delta_softplus=True, return_final_state=True
        ),
        "causal_conv": lambda **t: ops.causal_conv(**t, activation="silu", return_final_state=True),
        "fft_conv": lambda **t: ops.fft_conv(**t, return_final_state=True),
    }


OPS = _calls(madkernels)
REFERENCES = _calls(reference)


WIDE = {"A", "D", "delta_bias"}  # at least float32, whatever the activations


def draw(name: str, *leading: int, dtype: torch.dtype = torch.float64, **changes: tuple[int, ...]) -> dict[str, Tensor]:
    """Inputs of an op, activations in `dtype`, with `leading` axes before each, and other shapes for some."""
    wide = WIDE if name == "causal_conv" else WIDE | {"initial_state"}
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPES[name] | changes
    drawn = {k: torch.randn(*leading, *shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}
    return {k: t.to(torch.promote_types(dtype, torch.float32) if k in wide else dtype) for k, t in drawn.items()}
