"""Runs that train as one model against the same one by one."""

from __future__ import annotations

import dataclasses

import pytest

from madkernels.models.layers import LAYERS
from madkernels.runs.engines import Diverged
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
    together, apart = train_together(runs), [train(run) for run in runs]
    for a, b in zip(together, apart, strict=True):
        assert isinstance(a, dict)
        assert a["epochs"] == b["epochs"]
        for measure in ("loss", "accuracy", "macro_accuracy", "held_out_accuracy"):
            assert a[measure] == pytest.approx(b[measure], rel=2e-3, abs=1e-3), measure
        losses = [[point["loss"] for point in result["curve"]] for result in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len({a["loss"] for a in together if isinstance(a, dict)}) == len(runs), "each has a training of its own"


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer(name: str) -> None:
    layer = f"{name}:{OPTIONS[name]}" if name in OPTIONS else name
    compare(grid(f"{layer} swiglu"))


def test_the_auto_encoder() -> None:
    compare(grid("attention:heads=2 mlp", Compression(vocab_size=6, seqlen=8, train_examples=80)))


def test_each_leaves_when_it_is_good_enough() -> None:
    runs = grid("attention:heads=2 mlp", epochs=12, enough=0.58)
    together, apart = train_together(runs), [train(run) for run in runs]
    assert [r["epochs"] for r in together if isinstance(r, dict)] == [r["epochs"] for r in apart]
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
    with pytest.raises(ValueError, match="differ in their rates, decays and seeds only"):
        train_together(runs)
