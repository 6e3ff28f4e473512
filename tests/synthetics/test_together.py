"""Runs that train as one model against the same one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from madkernels.models.layers import LAYERS
from madkernels.runs.engines import Diverged
from madkernels.synthetics import together
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.tasks import Task
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.together import train_together
from madkernels.synthetics.train import train

TASK = Recall(vocab_size=8, seqlen=10, train_examples=80)
BASE = Training(lr=1e-3, epochs=3, batch=32, dim=32, held_out=40, seed=1, enough=2.0)  # so batches of 32, 32 and 16
OPTIONS = {"mamba2": "head_dim=16,dstate=8", "linear-attention": "normalise=false", "hyena-mr": "taps=6"}


def grid(arch: str, task: Task = TASK, **options: float) -> list[Run]:
    trainings = [
        dataclasses.replace(BASE, lr=1e-3),
        dataclasses.replace(BASE, lr=5e-3, weight_decay=0.1),
        dataclasses.replace(BASE, lr=2e-3, seed=2),
    ]
    return [Run(arch, task, dataclasses.replace(t, **options)) for t in trainings]


def compare(runs: list[Run]) -> None:
    at_once, apart = train_together(runs), [train(run) for run in runs]
    for a, b in zip(at_once, apart, strict=True):
        assert isinstance(a, dict)
        assert a["epochs"] == b["epochs"]
        for measure in ("loss", "accuracy", "macro_accuracy", "held_out_accuracy"):
            assert a[measure] == pytest.approx(b[measure], rel=2e-3, abs=1e-3), measure
        losses = [[point["loss"] for point in result["curve"]] for result in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len({a["loss"] for a in at_once if isinstance(a, dict)}) == len(runs), "each has a training of its own"


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer(name: str) -> None:
    layer = f"{name}:{OPTIONS[name]}" if name in OPTIONS else name
    compare(grid(f"{layer} swiglu"))


def test_the_auto_encoder() -> None:
    compare(grid("attention:heads=2 mlp", Compression(vocab_size=6, seqlen=8, train_examples=80)))


def test_each_leaves_when_it_is_good_enough() -> None:
    runs = grid("attention:heads=2 mlp", epochs=12, enough=0.58)
    at_once, apart = train_together(runs), [train(run) for run in runs]
    assert [r["epochs"] for r in at_once if isinstance(r, dict)] == [r["epochs"] for r in apart]
    assert len({r["epochs"] for r in apart}) > 1


def test_one_that_diverges_leaves_the_others_alone() -> None:
    good = grid("attention:heads=2 mlp")
    bad = dataclasses.replace(good[0], training=dataclasses.replace(good[0].training, lr=1e30))
    found = train_together([good[0], bad, good[1]])
    assert isinstance(found[1], Diverged)
    assert "in epoch" in str(found[1])
    alone = train_together([good[0], good[1]])
    for i, j in ((0, 0), (2, 1)):
        assert isinstance(found[i], dict)
        assert found[i]["loss"] == pytest.approx(alone[j]["loss"], rel=1e-4)


def test_refuses_runs_that_differ_in_more() -> None:
    runs = [*grid("mlp"), *grid("swiglu")]
    with pytest.raises(ValueError, match="differ in learning rate, weight decay and seed only"):
        train_together(runs)


Made = tuple[Tensor, list[Tensor]]


def test_steps_that_are_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would: recording does nothing yet, and every replay goes into the same tensors."""
    recorded = 0

    def record(work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        nonlocal recorded
        recorded += 1
        losses, gradients = work()
        into = [losses, *gradients]
        for tensor in into:
            tensor.fill_(torch.nan)

        def replay() -> None:
            again, others = work()
            for tensor, made in zip(into, [again, *others], strict=True):
                tensor.copy_(made)

        return replay, (losses, gradients)

    monkeypatch.setattr(together, "GRAPHS_ON", "cpu")
    monkeypatch.setattr(together, "record", record)
    compare(grid("attention:heads=2 mlp"))
    assert recorded == 2, "once for each shape of batch"
    runs = grid("attention:heads=2 mlp", epochs=12, enough=0.58)
    found = train_together(runs)
    assert [r["epochs"] for r in found if isinstance(r, dict)] == [train(run)["epochs"] for run in runs]


def test_steps_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(together, "GRAPHS_ON", "cpu")
    monkeypatch.setattr(together, "record", record)
    compare(grid("attention:heads=2 mlp"))
