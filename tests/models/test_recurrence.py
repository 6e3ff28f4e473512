"""Chunked recurrences against the same, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import relative_error, relative_rms
from torch import Tensor

from madkernels.models.layers.recurrence import delta_rule, linear_recurrence

Inputs = dict[str, Tensor]


def linear_by_steps(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, bonus: Tensor | None = None, document: Any = None
) -> tuple[Tensor, Tensor]:
    heads, outputs = v.shape[2], []
    q, k = q.expand(-1, -1, heads, -1), k.expand(-1, -1, heads, -1)
    for t in range(q.shape[1]):
        if document is not None and t > 0 and document[t] != document[t - 1]:
            state = torch.zeros_like(state)
        new = k[:, t, :, :, None] * v[:, t, :, None, :]
        seen = state + bonus[:, :, None] * new if bonus is not None else None
        state = log_decay[:, t, :, :, None].exp() * state + new
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state if seen is None else seen))
    return torch.stack(outputs, 1), state


def delta_by_steps(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, document: Any = None
) -> tuple[Tensor, Tensor]:
    outputs, eye = [], torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(q.shape[1]):
        if document is not None and t > 0 and document[t] != document[t - 1]:
            state = torch.zeros_like(state)
        key, rate = k[:, t, :, :, None], beta[:, t, :, :, None]
        state = log_decay[:, t, :, :, None].exp() * (eye - rate * key * key.mT) @ state + rate * key * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def draw(seqlen: int, *, vector: bool, key_heads: int = 3, strength: float = 1.0, batch: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "q": normal(batch, seqlen, key_heads, 5),
        "k": normal(batch, seqlen, key_heads, 5),
        "v": normal(batch, seqlen, 3, 7),
        "log_decay": -strength * normal(batch, seqlen, 3, 5 if vector else 1).exp(),
        "state": normal(batch, 3, 5, 7),
    }


def compare(chunked: Any, by_steps: Any, inputs: Inputs, **options: Any) -> None:
    """Outputs, and gradients of all inputs."""
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    found, wanted = chunked(**leaves, **options), by_steps(**leaves, **options)
    weights = [torch.randn_like(t) for t in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert relative_rms(a, b) < 1e-12
    grads = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), list(leaves.values()))
        for out in (found, wanted)
    ]
    for name, a, b in zip(leaves, *grads, strict=True):
        assert relative_rms(a, b) < 1e-11, name


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("seqlen", [1, 2, 15, 16, 17, 63, 64, 65, 150])
def test_linear(seqlen: int, vector: bool) -> None:
    compare(linear_recurrence, linear_by_steps, draw(seqlen, vector=vector))


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_linear_with_bonus(vector: bool) -> None:
    bonus = torch.randn(3, 5, dtype=torch.float64)
    compare(linear_recurrence, linear_by_steps, draw(70, vector=vector) | {"bonus": bonus})


def test_shared_keys() -> None:
    compare(linear_recurrence, linear_by_steps, draw(70, vector=False, key_heads=1))


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("strength", [1e-9, 1e4])
def test_decays_of_any_strength(strength: float, vector: bool) -> None:
    compare(linear_recurrence, linear_by_steps, draw(70, vector=vector, strength=strength))


def delta_inputs(seqlen: int) -> Inputs:
    inputs = draw(seqlen, vector=False, strength=0.1)
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    return inputs | {"beta": 2 * torch.rand(2, seqlen, 3, 1, dtype=torch.float64)}


@pytest.mark.parametrize("seqlen", [1, 2, 63, 64, 65, 150])
def test_delta(seqlen: int) -> None:
    compare(delta_rule, delta_by_steps, delta_inputs(seqlen))


@pytest.mark.parametrize("lengths", [[1] * 70, [10, 54, 6], [64, 6], [5, 65], [20, 1, 44, 5]], ids=str)
def test_documents(lengths: list[int]) -> None:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for vector in (False, True):
        inputs = draw(70, vector=vector) | {"state": torch.zeros(2, 3, 5, 7, dtype=torch.float64)}
        compare(linear_recurrence, linear_by_steps, inputs, document=document)
    inputs = delta_inputs(70) | {"state": torch.zeros(2, 3, 5, 7, dtype=torch.float64)}
    compare(delta_rule, delta_by_steps, inputs, document=document)


def test_a_chunk_that_sees_too_much_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from madkernels.models.layers import recurrence

    honest = recurrence._Chunks.visible
    monkeypatch.setattr(recurrence._Chunks, "visible", lambda self, diagonal: honest(self, diagonal + 1))
    with pytest.raises(AssertionError):
        compare(linear_recurrence, linear_by_steps, draw(70, vector=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_a_wide_state(dtype: torch.dtype) -> None:
    inputs = {k: t.to(dtype) for k, t in draw(150, vector=True).items()}
    y, state = linear_recurrence(**inputs)
    exact, _ = linear_by_steps(**{k: t.double() for k, t in inputs.items()})
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_error(y, exact) < (1e-5 if dtype == torch.float32 else 5e-3)
