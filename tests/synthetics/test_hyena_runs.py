"""A run with Hyena on fft_conv, against the same on the formula by torch.fft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from madkernels.models.layers import hyena
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.train import train


def by_torch_fft(u: Tensor, filter: Tensor, *, skip: Tensor, pre_gate: Tensor, post_gate: Tensor, **rest: Any) -> Tensor:
    size, v = 2 * u.shape[1], u * pre_gate
    spectrum = torch.fft.rfft(v, n=size, dim=1) * torch.fft.rfft(filter.T, n=size, dim=0)
    return post_gate * (torch.fft.irfft(spectrum, n=size, dim=1)[:, : u.shape[1]] + v * skip)


def test_same_loss_curve_as_with_torch_fft(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Recall(vocab_size=16, seqlen=128, train_examples=256)
    run = Run("hyena swiglu hyena swiglu", task, Training(lr=1e-3, epochs=4, batch=32, dim=32, held_out=64))
    ours = train(run)["curve"]
    monkeypatch.setattr(hyena, "fft_conv", by_torch_fft)
    theirs = train(run)["curve"]
    losses = [[point["loss"] for point in curve] for curve in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
