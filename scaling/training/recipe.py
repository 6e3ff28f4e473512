"""What one training of a language model is: the model, the data, and how it is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from madkernels.runs.engines import Result
from madkernels.runs.keys import Keyed, code_of

SCHEDULES = ("cosine", "wsd", "constant")
DEFAULT_SEQLEN = 2048  # tokens of a row, where neither a preset nor an option says
DECAY = 0.2  # share of the steps in which warm-up, stable, decay lets the learning rate fall


@dataclass(frozen=True)
class Recipe:
    """AdamW (betas 0.9, 0.95), a linear warm-up, then the schedule, which decays to `final` times the peak learning rate.

    Attributes:
        steps: of the optimiser.
        batch: rows of a step, over all processes.
        seqlen: tokens of a row.
        lr: peak learning rate.
        warmup: share of the steps in which the learning rate rises.
        schedule: cosine; wsd: warm-up, stable, and a linear decay over the last fifth (Hu et al. 2024, arXiv 2404.06395); or
            constant, which stays at the peak.
        weight_decay: of matrices; norms, biases and recurrence parameters have none.
        clip: of the norm of the gradient.
        dtype: float32, or bfloat16: autocast, parameters in float32.
        documents: whether documents in one row are kept apart; otherwise a row is read as one text.
        held_out: rows of the validation split, at most, that the held-out loss is measured on.
        seed: of parameters and of the order of the data.
    """

    steps: int
    batch: int
    seqlen: int
    lr: float
    final: float = 0.1
    warmup: float = 0.01
    schedule: str = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "float32"
    documents: bool = False
    held_out: int = 256
    seed: int = 12345

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seqlen", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number from 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; expected a number above 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}; expected a share from 0 to 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it takes float32 or bfloat16")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; it takes {', '.join(SCHEDULES)}")

    @property
    def tokens(self) -> int:
        """Tokens that the training reads."""
        return self.steps * self.batch * self.seqlen

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        begin = rising if self.schedule == "cosine" else max(rising, round((1 - DECAY) * self.steps))
        done = max(0.0, (step - begin) / max(1, self.steps - 1 - begin))
        left = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.lr * (self.final + (1 - self.final) * left)


@dataclass(frozen=True)
class LMRun(Keyed):
    """One training of a language model.

    Attributes:
        arch: canonical architecture string.
        dim: width.
        vocab_size: as the data has it.
        recipe: how it is trained.
        data: hash of the prepared data.
        tied: whether the unembedding is the embedding.
        plan: what a plan says of the run (kind, label of the architecture, budget), as pairs.
        corpus: folder of the data; no part of what the run is.
        out: folder for checkpoints and logs; no part of it either.
    """

    arch: str
    dim: int
    vocab_size: int
    recipe: Recipe
    data: str
    tied: bool = True
    plan: tuple[tuple[str, str | float], ...] = ()
    corpus: str = field(default="", compare=False)
    out: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        labels = dict(self.plan)
        if not labels:
            return f"{self.arch}, width {self.dim}"
        return f"{labels['kind']} {labels['budget']:.3g}: {labels['architecture']}, width {self.dim}"

    @property
    def points(self) -> int:
        """Steps."""
        return self.recipe.steps

    def config(self) -> dict[str, Any]:
        """All that the result depends on, the version of the code and that of layers from outside included."""
        return code_of(self.arch) | {
            "arch": self.arch,
            "dim": self.dim,
            "vocab_size": self.vocab_size,
            "tied": self.tied,
            "data": self.data,
            "recipe": dataclasses.asdict(self.recipe),
            "plan": dict(self.plan),
        }

    @classmethod
    def of(cls, config: dict[str, Any]) -> LMRun:
        """The run of a `config`; it does not say where its data lie."""
        kept = {name: config[name] for name in ("arch", "dim", "vocab_size", "tied", "data")}
        return cls(recipe=Recipe(**config["recipe"]), plan=tuple(config["plan"].items()), **kept)

    @property
    def tokens(self) -> float:
        """Tokens that the training reads."""
        return float(self.recipe.tokens)

    def trial(self, dearest: float) -> Callable[[], float] | None:
        """Steps of this run, to measure its pace by (:mod:`madkernels.runs.pace`)."""
        from madkernels.scaling.training.trainer import trial

        return trial(self, dearest)

    @staticmethod
    def do(job: Sequence[LMRun], on_point: Callable[[LMRun, int, dict[str, float]], None], device: str) -> list[Result]:
        """Trains the run of a job; its checkpoints let it go on where it was killed, or stopped by a signal."""
        from madkernels.scaling.training.stop import Stop
        from madkernels.scaling.training.trainer import Execution, train

        (run,) = job
        how = Execution(device=device, save_every=60)
        with Stop() as stop:
            return [train(run, how, lambda step, point: on_point(run, step, point), stop=stop)]
