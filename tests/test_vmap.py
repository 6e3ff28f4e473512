"""The ops mapped over models by torch.func: one call, and the same as one call a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import relative_rms
from torch import Tensor

from madkernels import causal_conv, fft_conv, selective_scan

MODELS, BATCH, SEQLEN, DIM = 3, 2, 40, 6
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
OPS: dict[str, Callable[..., Any]] = {
    "selective_scan": lambda **t: selective_scan(**t | {"A": -t["A"].exp()}, delta_softplus=True, return_final_state=True),
    "causal_conv": lambda **t: causal_conv(**t, activation="silu", return_final_state=True),
    "fft_conv": lambda **t: fft_conv(**t, return_final_state=True),
}


@pytest.fixture(params=OPS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def draw(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        k: torch.randn(MODELS, *shape, generator=generator, dtype=torch.float64).requires_grad_()
        for k, shape in SHAPES[name].items()
    }


def apart(name: str, inputs: dict[str, Tensor], mapped: dict[str, int | None]) -> list[Tensor]:
    found = [OPS[name](**{k: t if mapped[k] is None else t[i] for k, t in inputs.items()}) for i in range(MODELS)]
    return [torch.stack(tensors) for tensors in zip(*found, strict=True)]


@pytest.mark.parametrize("left_out", [False, True])
def test_equals_one_call_a_model(name: str, left_out: bool) -> None:
    """Values and gradients; with `left_out`, each argument in turn is not mapped."""
    for whole in SHAPES[name] if left_out else [None]:
        inputs, mapped = draw(name), {k: None if k == whole else 0 for k in SHAPES[name]}
        if whole:
            inputs[whole] = inputs[whole][0].detach().requires_grad_()
        together = torch.func.vmap(lambda t: OPS[name](**t), in_dims=(mapped,))(inputs)
        wanted = apart(name, inputs, mapped)
        weights = [torch.randn_like(t) for t in wanted]
        grads = [torch.autograd.grad(outputs, list(inputs.values()), weights) for outputs in (together, wanted)]
        for a, b in zip((*together, *grads[0]), (*wanted, *grads[1]), strict=True):
            assert relative_rms(a, b) < 1e-12


def test_other_axes_can_be_mapped(name: str) -> None:
    inputs = {k: t.detach().movedim(0, -1) for k, t in draw(name).items()}
    together = torch.func.vmap(lambda t: OPS[name](**t), in_dims=-1)(inputs)
    wanted = apart(name, {k: t.movedim(-1, 0) for k, t in inputs.items()}, dict.fromkeys(inputs, 0))
    assert all(relative_rms(a, b) < 1e-12 for a, b in zip(together, wanted, strict=True))


def test_offsets_cannot_be_mapped() -> None:
    x, weight = torch.randn(2, 1, 8, 4), torch.randn(4, 3)
    with pytest.raises(ValueError, match="vmap cannot map over cu_seqlens"):
        torch.func.vmap(lambda x, c: causal_conv(x, weight, cu_seqlens=c))(
            x, torch.tensor([[0, 8], [0, 8]], dtype=torch.int32)
        )
    packed = torch.func.vmap(lambda x: causal_conv(x, weight, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32)))(x)
    alone = torch.func.vmap(lambda x: torch.cat([causal_conv(x[:, :3], weight), causal_conv(x[:, 3:], weight)], 1))(x)
    assert relative_rms(packed, alone) < 1e-6
