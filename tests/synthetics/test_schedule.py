"""The learning rate of a step, and when a training ends."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.schedule import chance_of, is_over, on_plateau, rate
from madkernels.synthetics.tasks import IGNORE
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.together import train_together
from madkernels.synthetics.train import train

TINY = Training(lr=3e-3, epochs=6, batch=16, dim=16, held_out=32, seed=1, enough=2.0)
TASK = Recall(vocab_size=8, seqlen=8, train_examples=64)
ARCH = "attention:heads=2 mlp"


# ---- the learning rate


def test_a_warm_up_rises_in_a_line_and_the_cosine_takes_the_rest() -> None:
    options = dataclasses.replace(TINY, warmup=0.25, min_lr=0.0)
    rates = [rate(options, step, 40) for step in range(40)]
    assert rates[:10] == pytest.approx([3e-3 * (step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([3e-3 * (1 + math.cos(math.pi * step / 30)) / 2 for step in range(30)])
    assert rate(dataclasses.replace(TINY, warmup=1.0), 39, 40) == 3e-3
    assert rate(TINY, 0, 40) == 3e-3, "none by default"


def test_training_takes_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    options = dataclasses.replace(TINY, warmup=0.5)
    train(Run(ARCH, TASK, options))
    assert rates == [rate(options, number, 24) for number in range(24)]


# ---- the end


STEADY = Training(lr=1e-3, epochs=100, patience=3)


def climbs(*accuracies: float) -> int | None:
    """After how many epochs a run of these accuracies is on a plateau."""
    ends = (n for n in range(1, len(accuracies) + 1) if on_plateau(accuracies[:n], STEADY, chance=0.1))
    return next(ends, None)


def test_no_better_for_as_long_as_the_patience() -> None:
    assert climbs(0.6, 0.8, 0.8, 0.79, 0.8) == 5
    assert climbs(0.6, 0.8, 0.8, 0.79, 0.81, 0.8, 0.8) is None, "it got better in time"
    assert climbs(0.8, 0.8004, 0.8008, 0.8012, 0.8012, 0.8012) is None, "by little steps, too"
    assert climbs(0.8, 0.8004, 0.8004, 0.8004) == 4, "but not by less than a tenth of a point in all"


def test_a_run_that_has_not_begun_to_learn_goes_on() -> None:
    """Recall: flat above chance for long, then all at once."""
    flat = [0.1, 0.25, 0.3] + [0.3] * 40
    assert climbs(*flat) is None
    assert climbs(*flat, 0.4, 0.7, 0.95, 0.95, 0.95, 0.95) == len(flat) + 6
    assert climbs(0.54, *[0.54] * 10) is None, "the middle between a tenth and one is 0.55"
    assert climbs(0.56, *[0.56] * 10) == 4


def test_not_before_the_least_number_of_epochs() -> None:
    flat, patient = [0.9] * 20, dataclasses.replace(STEADY, min_epochs=10)
    assert next(n for n in range(1, 21) if on_plateau(flat[:n], patient, 0.1)) == 10
    assert not on_plateau(flat, dataclasses.replace(STEADY, patience=0), 0.1), "without patience there is no such end"


def test_the_other_ends_stay() -> None:
    options = dataclasses.replace(STEADY, epochs=3, enough=0.9, patience=0)
    assert not is_over([0.1, 0.2], options, 0.1)
    assert is_over([0.1, 0.9], options, 0.1)
    assert is_over([0.1, 0.2, 0.3], options, 0.1)


def test_chance_is_the_commonest_answer() -> None:
    assert chance_of(torch.tensor([[IGNORE, 3, 1], [3, IGNORE, 2]])) == 0.5


# ---- in a training


def test_a_training_that_has_learned_stops_at_its_plateau() -> None:
    learned = Run("mlp", Recall(2, 8, 64), dataclasses.replace(TINY, epochs=40, patience=4, lr=1e-2))
    found = train(learned)
    assert found["accuracy"] == 1.0, "one value alone"
    assert found["epochs"] < 40
    accuracies = [point["held_out_accuracy"] for point in found["curve"]]
    assert found["epochs"] == next(n for n in range(1, 41) if accuracies[n - 1] == 1.0) + 4


def test_one_that_has_not_goes_on() -> None:
    run = Run(ARCH, TASK, dataclasses.replace(TINY, patience=1, lr=1e-7))
    assert train(run)["epochs"] == 6


def test_together_as_alone() -> None:
    options = dataclasses.replace(TINY, epochs=12, warmup=0.3, patience=2)
    easy = Recall(2, 8, 64)
    for task in (TASK, easy):
        runs = [Run(ARCH, task, dataclasses.replace(options, lr=lr)) for lr in (1e-3, 1e-2)]
        at_once, apart = train_together(runs), [train(run) for run in runs]
        for a, b in zip(at_once, apart, strict=True):
            assert isinstance(a, dict)
            assert a["epochs"] == b["epochs"]
            assert [p["loss"] for p in a["curve"]] == pytest.approx([p["loss"] for p in b["curve"]], rel=1e-3, abs=1e-5)
    assert apart[1]["epochs"] < 12


# ---- keys


def test_results_from_before_these_options_keep_their_keys() -> None:
    before = {"lr", "weight_decay", "min_lr", "epochs", "batch", "dim", "dtype", "enough", "select", "held_out", "seed"}
    assert TINY.config().keys() == before
    assert Run(ARCH, TASK, TINY).config()["training"] == {name: getattr(TINY, name) for name in before}
    for change in ({"warmup": 0.1}, {"patience": 5}, {"min_epochs": 5}):
        options = dataclasses.replace(TINY, **change)
        assert options.config().keys() == before | change.keys()
        assert Training(**options.config()) == options
        assert Run(ARCH, TASK, options).key() != Run(ARCH, TASK, TINY).key()
