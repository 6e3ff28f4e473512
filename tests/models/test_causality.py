"""Layers that look ahead, each in a way of its own, are named; those that do not are let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from madkernels.models.causality import NotCausal, check_causal
from madkernels.models.layers import LAYERS

DIM, BATCH, SEQLEN = 8, 6, 20


class Mixer(nn.Module):
    """Causal: the mean of what came before, mixed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.next = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.cumsum(1)) + self.leak(x)

    def leak(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def ahead(self, x: Tensor, by: int = 1) -> Tensor:
        """The inputs that come `by` places later, mixed; none at the end."""
        return self.next(torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], 1))


class Plain(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x, 2)


class Gated(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return self.gate * self.ahead(x)


class GatedTwice(Mixer):
    """Zero in both factors: no gradient at the start either."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        nn.init.zeros_(self.next.weight)
        nn.init.zeros_(self.next.bias)

    def leak(self, x: Tensor) -> Tensor:
        return self.gate * self.ahead(x)


class Long(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x) if x.shape[1] > 16 else torch.zeros_like(x)


class WideBatch(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x) if len(x) > 4 else torch.zeros_like(x)


class InTraining(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x) if self.training else torch.zeros_like(x)


class OnePlace(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x) * (torch.arange(x.shape[1]) == 12)[:, None]


class Small(Mixer):
    """To be made large by what follows."""

    def leak(self, x: Tensor) -> Tensor:
        return 1e-6 * self.ahead(x)


class SmallBesideLarge(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x) + 1e8 * (torch.arange(x.shape[2]) == 0)


class Single(Mixer):
    """In float32 only."""

    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x) if x.dtype == torch.float32 else torch.zeros_like(x)


class Even(Mixer):
    """A function that does not see signs."""

    def leak(self, x: Tensor) -> Tensor:
        return self.ahead(x.abs())


class Sorts(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return x.argsort(1).to(x.dtype)


class Wraps(Mixer):
    """A convolution by an FFT that is not padded: what comes last goes round to the front."""

    def leak(self, x: Tensor) -> Tensor:
        taps = torch.exp(-torch.arange(x.shape[1], dtype=x.dtype))[:, None]
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.fft.rfft(taps, dim=0), n=x.shape[1], dim=1)


class NormOverTime(Mixer):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.BatchNorm1d(dim)

    def leak(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Rows(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return x.cumsum(1).flip(0)


class Remembers(Mixer):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("last", torch.zeros(1, 1, dim), persistent=False)

    def leak(self, x: Tensor) -> Tensor:
        y = self.last + torch.zeros_like(x)
        self.last = self.next(x).mean((0, 1), keepdim=True)
        return y


class LooksUp(Mixer):
    """What follows an input that it has seen before."""

    seen: ClassVar[dict[bytes, Tensor]] = {}

    def leak(self, x: Tensor) -> Tensor:
        found = self.seen.get(x[:, :1].numpy().tobytes(), torch.zeros_like(x))
        self.seen[x[:, :1].numpy().tobytes()] = x.roll(-1, 1)
        return found


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (Plain, "is not causal: its output at position 0 changes with inputs from position 1"),
        *(
            (layer, "is not causal: its output at")
            for layer in (Gated, GatedTwice, Long, WideBatch, Small, SmallBesideLarge)
        ),
        *((layer, "is not causal: its output at") for layer in (Single, Even, Sorts, Wraps)),
        (OnePlace, "is not causal: its output at position 12 changes with inputs from position 13"),
        (InTraining, "is not causal in training mode"),
        (NormOverTime, "mixes the rows of a batch in training mode"),
        (Rows, "mixes the rows of a batch: an output changes with another row"),
        (Remembers, "keeps what it saw in earlier calls: the same input gives two outputs"),
        (LooksUp, "(keeps what it saw in earlier calls|mixes the rows of a batch)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_named(layer: Callable[[int], nn.Module], told: str) -> None:
    with pytest.raises(NotCausal, match=f"layer mine {told}"):
        check_causal(lambda: layer(DIM), "mine", dim=DIM, batch=BATCH, seqlen=SEQLEN)


class WithDropout(Mixer):
    def leak(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class SinglePrecisionFFT(Mixer):
    """A causal convolution as many write it: padded, in float32 whatever the input."""

    def leak(self, x: Tensor) -> Tensor:
        taps = torch.exp(-0.1 * torch.arange(x.shape[1]))[:, None]
        n = 2 * x.shape[1]
        spectrum = torch.fft.rfft(x.float(), n=n, dim=1) * torch.fft.rfft(taps, n=n, dim=0)
        return torch.fft.irfft(spectrum, n=n, dim=1)[:, : x.shape[1]].to(x.dtype)


class SingleOnly(SinglePrecisionFFT):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("float32 only")
        return super().forward(x)


class KeepsItsLoss(Mixer):
    """Attributes with a graph behind them, as of experts' losses."""

    def leak(self, x: Tensor) -> Tensor:
        self.loss = self.linear(x).square().mean()
        return x


class Sparse(Mixer):
    """A logarithm of a parameter, which noise makes NaN."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.rate = nn.Parameter(torch.full((dim,), 3.0))

    def leak(self, x: Tensor) -> Tensor:
        return x * self.rate.log().clamp(max=2.0)


@pytest.mark.parametrize("layer", [Mixer, WithDropout, SinglePrecisionFFT, SingleOnly, KeepsItsLoss, Sparse])
def test_let_through(layer: Callable[[int], nn.Module]) -> None:
    before = torch.random.get_rng_state()
    check_causal(lambda: layer(DIM), "mine", dim=DIM, batch=BATCH, seqlen=SEQLEN)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seqlen", [1, 2, 3])
def test_any_shape(seqlen: int) -> None:
    for batch in (1, 2):
        check_causal(lambda: Mixer(DIM), "mine", dim=DIM, batch=batch, seqlen=seqlen)
        if seqlen > 1:
            with pytest.raises(NotCausal):
                check_causal(lambda: Gated(DIM), "mine", dim=DIM, batch=batch, seqlen=seqlen)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_passes(name: str) -> None:
    check_causal(lambda: LAYERS[name](32), name, dim=32, batch=4, seqlen=17)


class Tells(nn.Module):
    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda x: (x, x), "layer mine returns a tuple; expected one tensor"),
        (lambda x: None, "layer mine returns a NoneType"),
        (lambda x: x.repeat(1, 1, 2), r"layer mine maps \(6, 20, 8\) to \(6, 20, 16\); expected the same shape"),
        (lambda x: x > 0, "layer mine returns torch.bool; expected a floating-point tensor"),
        (lambda x: x / 0, "layer mine gives outputs that are no finite numbers"),
        (lambda x: x @ x, r"layer mine fails on \(6, 20, 8\), torch.float32: RuntimeError"),
    ],
)
def test_what_is_no_layer_is_named(answer: Callable[[Tensor], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_causal(lambda: Tells(answer), "mine", dim=DIM, batch=BATCH, seqlen=SEQLEN)
