"""Chunked recurrences against the same, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import relative_error, relative_rms
from torch import Tensor

from madkernels.models import HybridLM
from madkernels.models.layers import matrix_state, ssd
from madkernels.models.layers.chain import chain
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


@pytest.mark.parametrize("kind", ["scalar", "vector", "bonus", "delta"])
@pytest.mark.parametrize("lengths", [[1] * 70, [0, 10, 54, 6, 0], [64, 6], [5, 0, 65], [20, 1, 44, 5]], ids=str)
@pytest.mark.parametrize("strength", [0.1, 1e4])
def test_states_at_the_ends_of_documents(lengths: list[int], kind: str, strength: float) -> None:
    """Of each as alone, also where all is forgotten at once."""
    inputs = draw(70, vector=kind in ("vector", "bonus"), strength=strength, batch=1)
    del inputs["state"]
    inputs["log_decay"][0, 69] = -torch.inf
    chunked, by_steps, bonus = linear_recurrence, linear_by_steps, {}
    if kind == "delta":
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = 2 * torch.rand(1, 70, 3, 1, dtype=torch.float64)
        chunked, by_steps = delta_rule, delta_by_steps
    elif kind == "bonus":
        bonus = {"bonus": torch.randn(3, 5, dtype=torch.float64)}
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def together(**given: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(**given, **bonus, document=numbers, ends=torch.tensor(lengths).cumsum(0).int())

    def apart(**given: Tensor) -> tuple[Tensor, Tensor]:
        found, empty = [], torch.zeros(1, 3, 5, 7, dtype=torch.float64)
        for i, length in enumerate(lengths):
            own = {name: t.split(lengths, 1)[i] for name, t in given.items()}
            found.append(by_steps(**own, state=empty, **bonus) if length else (own["v"], empty))
        ys, states = zip(*found, strict=True)
        return torch.cat(ys, 1), torch.cat(states)

    compare(together, apart, inputs)


def test_a_chunk_that_sees_too_much_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from madkernels.models.layers import recurrence

    honest = recurrence._Chunks.step_sees_step
    monkeypatch.setattr(recurrence._Chunks, "step_sees_step", lambda self, diagonal: honest(self, diagonal + 1))
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


# ---- float32, resets, long rows


def test_what_is_forgotten_leaves_no_rounding_behind() -> None:
    """After one step that forgets all, later outputs are as they would be alone: 1 + e^-.001 + ... of 100 terms."""
    ones, decay = torch.ones(1, 200, 1, 1), torch.full((1, 200, 1, 1), -1e-3)
    alone = torch.exp(-1e-3 * torch.arange(100, dtype=torch.float64)).cumsum(0)
    for forget in (-1e8, -torch.inf):
        decay[:, 100] = forget
        for keys in (ones, ones.expand(1, 200, 1, 3)):  # a decay that is one number, and of each channel
            y, _ = linear_recurrence(keys, keys, ones, decay.expand(keys.shape))
            wanted = keys.shape[-1] * torch.cat([alone, alone])
            torch.testing.assert_close(y.flatten().double(), wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("at", [0, 1, 15, 16, 63, 64, 69])
def test_resets(at: int, vector: bool) -> None:
    """A log decay of -inf, of all channels or of one: values and gradients, of a bonus and of the delta rule too."""
    inputs = draw(70, vector=vector)
    inputs["log_decay"][:, at, :, -1:] = -torch.inf
    inputs["log_decay"][0, at] = -torch.inf
    compare(linear_recurrence, linear_by_steps, inputs)
    compare(linear_recurrence, linear_by_steps, inputs | {"bonus": torch.randn(3, 5, dtype=torch.float64)})
    if not vector:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"].detach(), dim=-1)
        rates = torch.rand(2, 70, 3, 1, dtype=torch.float64)
        compare(delta_rule, delta_by_steps, {k: t.detach() for k, t in inputs.items()} | {"beta": rates})


@pytest.mark.parametrize("kind", ["scalar", "vector", "delta"])
@pytest.mark.parametrize("strength", [1.0, 16.0])
def test_float32_at_length(kind: str, strength: float) -> None:
    """8,192 steps, of which the first half forgets fast: the second half, and the gradients, are exact to float32."""
    seqlen, half = 8192, 4096 + 7
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(1, seqlen, 2, 8, generator=generator) for name in "qkv"}
    decay = torch.rand(1, seqlen, 2, 8 if kind == "vector" else 1, generator=generator)
    inputs["log_decay"] = torch.cat([-2 * strength * decay[:, :half], -0.01 * decay[:, half:]], 1)
    if kind == "delta":
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = torch.rand(1, seqlen, 2, 1, generator=generator)
    weights = torch.randn(1, seqlen, 2, 8, generator=generator)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = {k: t.to(dtype).requires_grad_() for k, t in inputs.items()}
        y, _ = (delta_rule if kind == "delta" else linear_recurrence)(**leaves)
        return [y.detach()[:, half:], *torch.autograd.grad((y * weights.to(dtype)).sum(), list(leaves.values()))]

    for found, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize("arch", ["rwkv6-time-mixer", "mamba2:dstate=16,head_dim=16"])
def test_documents_do_not_feel_what_is_packed_before_them(arch: str) -> None:
    torch.manual_seed(0)
    layer = HybridLM(arch, vocab_size=8, dim=16).backbone.layers[0]
    x = torch.randn(1, 4096, 16)
    alone = layer(x[:, 4000:])
    packed = layer(x, cu_seqlens=torch.tensor([0, 1500, 4000, 4096], dtype=torch.int32))
    assert relative_error(packed[:, 4000:], alone) < 1e-6


# ---- from chunk to chunk


def chain_inputs(matrix: bool, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, 2, 3, 4, 4) if matrix else (batch, 2, 3, 4), (batch, 2, 3, 4, 5), (batch, 2, 4, 5)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("matrix", [False, True], ids=["diagonal", "matrix"])
def test_chain(matrix: bool) -> None:
    inputs = chain_inputs(matrix)
    assert torch.autograd.gradcheck(chain, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(chain, inputs, check_fwd_over_rev=True)
    torch.library.opcheck(torch.ops.madkernels.chain.default, tuple(inputs))
    mapped = torch.func.vmap(chain, in_dims=(0, None, 0))(
        *(torch.stack([t, 2 * t]) if i != 1 else t for i, t in enumerate(inputs))
    )
    torch.testing.assert_close(mapped[1], chain(2 * inputs[0], inputs[1], 2 * inputs[2]))


@pytest.mark.parametrize("in_chunks", [False, True], ids=["", "in chunks"])
@pytest.mark.parametrize(
    "arch", ["mamba2:dstate=8,head_dim=8", "hyena:modal=true", "gated-linear-attention", "gated-deltanet"]
)
def test_one_graph_for_many_lengths(arch: str, in_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for a second length, and for more; exported for all. By the ops, and as where there are no kernels."""
    if in_chunks:
        for layers in (matrix_state, ssd):
            monkeypatch.setattr(layers, "DEVICES", set())
    torch.manual_seed(0)
    layer = HybridLM(arch, vocab_size=8, dim=16).backbone.layers[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    lengths = torch.export.Dim("seqlen", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(2, 40, 16),), dynamic_shapes={"x": {1: lengths}}).module()
    for seqlen in (20, 30, 47, 130, 2):
        x = torch.randn(2, seqlen, 16, requires_grad=True)
        wanted = layer(x)
        (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
        found = compiled(x)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient)
        torch.testing.assert_close(exported(x.detach()), wanted)
    torch._dynamo.reset()
