"""Folders of runs for the tests of what is seen of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from madkernels.runs.store import Store
from madkernels.scaling.training.recipe import LMRun, Recipe
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.recall import Recall

TRAINING = Training(lr=1e-3, weight_decay=0.0, epochs=2, batch=8, dim=16, held_out=8, enough=2.0)
TASKS = (Recall(vocab_size=8, seqlen=8, train_examples=8), Compression(vocab_size=8, seqlen=8, train_examples=8))
ARCHS = ("attention:heads=2 mlp", "mamba mlp")


def runs() -> list[Run]:
    """Two architectures, two tasks, two seeds."""
    trainings = [replace(TRAINING, seed=seed) for seed in (1, 2)]
    return [Run(arch, task, training) for arch in ARCHS for task in TASKS for training in trainings]


def result(run: Run) -> dict[str, Any]:
    curve = [{"loss": 2.0, "held_out_accuracy": 0.1}, {"loss": 1.0, "held_out_accuracy": 0.5}]
    metrics = {"accuracy": 0.5, "macro_accuracy": 0.4, "loss": 1.0, "held_out_accuracy": 0.5, "epochs": 2}
    return metrics | {"seconds": 1.5, "data_seconds": 0.01, "curve": curve}


def under_way(folder: Path) -> Store:
    """A sweep that a living process writes to: 5 of 8 done, one failed, one running."""
    store, all_of_them = Store(folder), runs()
    store.plan(all_of_them)
    for run in all_of_them[:5]:
        store.start(run)
        store.finish(run, result(run))
    store.start(all_of_them[5])
    store.fail(all_of_them[5], "the loss is nan <b>")
    store.start(all_of_them[6])
    return store


def training(folder: Path, steps: int = 4, done: int = 3) -> None:
    """What `train run` leaves in its folder."""
    folder.mkdir()
    points = [{"step": n, "loss": 5.0 / n, "norm": 1.0, "lr": 1e-3, "tokens_per_second": 100.0} for n in range(1, done + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (folder / "recipe.toml").write_text(f'arch = "mamba swiglu"\nsteps = {steps}\nbatch = 2\nseqlen = 50\n')


def language_run(out: str = "") -> LMRun:
    return LMRun("mamba swiglu", 16, 257, Recipe(steps=10, batch=2, seqlen=8, lr=1e-3), "", corpus="", out=out)
