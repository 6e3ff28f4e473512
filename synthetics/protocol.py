"""What is run to score an architecture: the settings of each task, the grid of optimiser settings, and how scores add up.

`paper` is the published protocol (Poli et al. 2024, arXiv 2403.17844): 66 settings, from a baseline of each task one
variable at a time, times 6 optimiser settings. Where the authors' code departs from what they state, the statement holds
here: the learning rate follows a cosine, the score is the accuracy over all scored tokens, and the test set is used once, at
the end; choices are made on a validation set of the same size.

`demo` is one small setting of each task, for a machine with two cores.

A task's score is the mean over its settings of the test accuracy of the run with the best validation accuracy; the MAD score
of an architecture is the mean over tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from madkernels._version import __version__
from madkernels.models.spec import parse
from madkernels.synthetics.tasks import TASKS, Task
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.fuzzy_recall import FuzzyRecall
from madkernels.synthetics.tasks.memorization import Memorization
from madkernels.synthetics.tasks.noisy_recall import NoisyRecall
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.tasks.selective_copying import SelectiveCopying


@dataclass(frozen=True)
class Training:
    """How one model is trained: AdamW (betas 0.9, 0.98), the rate on a cosine from `lr` to `min_lr`, no warm-up or clipping.

    Training stops early once the accuracy on the validation set reaches `enough`.
    """

    lr: float
    weight_decay: float = 0.0
    min_lr: float = 1e-6
    epochs: int = 200
    batch: int = 128
    dim: int = 128
    dtype: str = "float32"  # or bfloat16: autocast, parameters in float32
    enough: float = 0.999
    held_out: int = 1280  # examples of the validation set, and of the test set
    seed: int = 12345

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it takes float32 or bfloat16")


@dataclass(frozen=True)
class Run:
    """One training: an architecture (canonical string), a setting of a task, an optimiser setting."""

    arch: str
    task: Task
    training: Training

    def config(self) -> dict[str, Any]:
        """All that the result depends on, the version of the code included."""
        return {
            "version": __version__,
            "arch": self.arch,
            "task": {"name": self.task.name} | self.task.options(),
            "training": dataclasses.asdict(self.training),
        }

    def key(self) -> str:
        """A hash of `config`: a changed option is another run."""
        return hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Preset:
    """Settings by task, and the optimiser settings that each is trained with."""

    settings: dict[str, tuple[Task, ...]]
    trainings: tuple[Training, ...]


def one_at_a_time(baseline: Task, **changes: Sequence[Any]) -> tuple[Task, ...]:
    """The baseline, and each change of one variable from it."""
    changed = [dataclasses.replace(baseline, **{name: value}) for name, values in changes.items() for value in values]
    return (baseline, *changed)


VOCABULARIES = (32, 64, 128)
LENGTHS = (256, 512, 1024)
EXAMPLES = (6400, 3200, 1600, 800)

PAPER = Preset(
    settings={
        "recall": one_at_a_time(
            Recall(vocab_size=16, seqlen=128), vocab_size=VOCABULARIES, seqlen=LENGTHS, train_examples=EXAMPLES
        ),
        "noisy-recall": one_at_a_time(
            NoisyRecall(vocab_size=32, seqlen=128),
            vocab_size=(48, 80, 144),
            seqlen=LENGTHS,
            train_examples=EXAMPLES,
            frac_noise=(0.4, 0.6, 0.8),
        ),
        "fuzzy-recall": one_at_a_time(
            FuzzyRecall(vocab_size=16, seqlen=128), vocab_size=VOCABULARIES, seqlen=LENGTHS, train_examples=EXAMPLES
        ),
        "selective-copying": one_at_a_time(
            SelectiveCopying(vocab_size=16, seqlen=256),
            vocab_size=VOCABULARIES,
            seqlen=(512, 1024),
            train_examples=EXAMPLES,
            copies=(32, 64, 96),
        ),
        "compression": one_at_a_time(
            Compression(vocab_size=16, seqlen=32), vocab_size=VOCABULARIES, seqlen=(64, 128, 256), train_examples=EXAMPLES
        ),
        "memorization": one_at_a_time(Memorization(vocab_size=256, seqlen=32), vocab_size=(512, 1024, 2048, 4096, 8192)),
    },
    trainings=tuple(Training(lr=lr, weight_decay=wd) for lr, wd in product((1e-4, 5e-4, 1e-3), (0.0, 0.1))),
)

DEMO = Preset(
    settings={
        "recall": (Recall(vocab_size=24, seqlen=48, train_examples=1600),),
        "noisy-recall": (NoisyRecall(vocab_size=32, seqlen=48, noise_vocab=8, train_examples=1600),),
        "fuzzy-recall": (FuzzyRecall(vocab_size=12, seqlen=48, train_examples=1600),),
        "selective-copying": (SelectiveCopying(vocab_size=16, seqlen=40, copies=8, train_examples=1600),),
        "compression": (Compression(vocab_size=16, seqlen=12, train_examples=1600),),
        "memorization": (Memorization(vocab_size=256, seqlen=32, train_examples=1600),),
    },
    trainings=(Training(lr=5e-3, epochs=16, batch=16, dim=32, held_out=320),),
)

PRESETS = {"demo": DEMO, "paper": PAPER}


def plan(
    preset: str, archs: Iterable[str], tasks: str = "all", *, seed: int | None = None, dtype: str | None = None
) -> list[Run]:
    """The runs of a preset. `tasks`: names with commas between, or all. ValueError names what is unknown."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    overrides: dict[str, Any] = {} if seed is None else {"seed": seed}
    if dtype is not None:
        overrides["dtype"] = dtype
    trainings = [dataclasses.replace(t, **overrides) for t in chosen.trainings]
    canonical = list(dict.fromkeys(str(parse(arch)) for arch in archs))
    return [
        Run(arch, setting, training)
        for arch in canonical
        for name in task_names(tasks)
        for setting in chosen.settings[name]
        for training in trainings
    ]


def task_names(text: str) -> list[str]:
    """The tasks that `text` names, in the order of the table."""
    if text == "all":
        return list(TASKS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return [name for name in TASKS if name in names]


@dataclass(frozen=True)
class Score:
    """A task's score for an architecture, and how much of the protocol stands behind it."""

    value: float | None  # None: no run has ended
    settings_done: int
    settings: int


def scores(runs: Sequence[Run], metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Score]]:
    """Scores by architecture and task, from the metrics of the runs that have ended, by key."""
    settings: dict[tuple[str, str], dict[Task, list[dict[str, Any]]]] = {}
    for run in runs:
        done = settings.setdefault((run.arch, run.task.name), {}).setdefault(run.task, [])
        if run.key() in metrics:
            done.append(metrics[run.key()])
    table: dict[str, dict[str, Score]] = {}
    for (arch, task), by_setting in settings.items():
        best = [max(done, key=lambda m: m["validation_accuracy"])["accuracy"] for done in by_setting.values() if done]
        value = sum(best) / len(best) if best else None
        table.setdefault(arch, {})[task] = Score(value, len(best), len(by_setting))
    return table


def mad_score(by_task: dict[str, Score]) -> float | None:
    """The mean over tasks; None while one has no score."""
    values = [score.value for score in by_task.values()]
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
