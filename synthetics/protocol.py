"""What is run to score an architecture: the settings of each task, the grid of optimiser settings, and how scores add up.

Protocols are JSON files in `protocols/`, to be read, copied and edited: `paper` as published (Poli et al. 2024, arXiv
2403.17844), `strict` with two tasks mended, `strict-small` a slice of that for two cores, and `demo` for a first look. A
task has a baseline, and changes of one variable at a time from it. Where the authors' code departs from what they state, the
statement holds: the learning rate follows a cosine, betas are 0.9 and 0.98, accuracy is over all scored tokens.

A task's score is the mean over its settings of the test accuracy of the run that is best by the accuracy its protocol
chooses by (`select`); the MAD score of an architecture is the mean over tasks. With several seeds both are means over them,
with Student's 95 % intervals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from madkernels.models.layers.user import digest
from madkernels.models.presets import canonical, is_published, resolve
from madkernels.names import unknown
from madkernels.runs.engines import Refused, Result
from madkernels.runs.keys import Keyed, code_of
from madkernels.synthetics.fields import fields_of, parse_json, read_list, read_object, read_value, required
from madkernels.synthetics.tasks import TASKS, Task

FOLDER = Path(__file__).parent / "protocols"
MEASURES = ("accuracy", "macro_accuracy")
GRID = ("lr", "weight_decay")  # every combination of their values is trained
LEAST = {
    "min_lr": 0, "warmup": 0, "patience": 0, "min_epochs": 0, "epochs": 1, "batch": 1, "dim": 1, "held_out": 1,
    "train_examples": 1,
}  # fmt: skip
SELECTIONS = ("validation", "test")
OF_PROTOCOL = ("dim", "dtype", "select", "held_out", "seed")  # fields of Training that no task has its own of
LATER = ("warmup", "patience", "min_epochs")  # fields of Training newer than results that are to keep their keys


@dataclass(frozen=True)
class Training:
    """How one model is trained: AdamW (betas 0.9, 0.98), the learning rate on a cosine from `lr` to `min_lr`, after a
    warm-up if there is one (:func:`madkernels.synthetics.schedule.rate`); no clipping.

    Training stops early once the accuracy on the held-out set that `select` names reaches `enough`, or has not improved for
    `patience` epochs (:func:`madkernels.synthetics.schedule.on_plateau`).
    """

    lr: float
    weight_decay: float = 0.0
    min_lr: float = 1e-6
    epochs: int = 200
    batch: int = 128
    dim: int = 128
    dtype: str = "float32"  # or bfloat16: autocast, parameters in float32
    enough: float = 0.999
    select: str = "validation"  # or test: which set stops training and chooses among runs
    held_out: int = 1280  # examples of the validation set, and of the test set
    seed: int = 12345
    warmup: float = 0.0  # share of the steps in which the learning rate rises
    patience: int = 0  # epochs without a better held-out accuracy, after which training stops; 0: it does not
    min_epochs: int = 0  # before that

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it takes float32 or bfloat16")
        if self.select not in SELECTIONS:
            raise ValueError(f"select is {self.select!r}; it takes {' or '.join(SELECTIONS)}")
        if self.warmup > 1:
            raise ValueError(f"warmup is {self.warmup}; it takes a share of the steps, from 0 to 1")

    def config(self) -> dict[str, Any]:
        """The fields; of those in LATER those that are not as by default."""
        fields = dataclasses.asdict(self).items()
        return {name: value for name, value in fields if name not in LATER or value != getattr(Training, name)}


@dataclass(frozen=True)
class Run(Keyed):
    """One training: an architecture, a setting of a task, an optimiser setting."""

    arch: str  # as of canonical: layers in full, or published:NAME, whose sizes follow from width and setting
    task: Task
    training: Training

    def config(self) -> dict[str, Any]:
        """All that the result depends on, the version of the code, that of a layer or task from outside and the layers that
        a name stands for included."""
        own = type(self.task).__module__.startswith("madkernels.")
        code = code_of(self.arch) | ({} if own else {"task_code": digest(type(self.task))})
        if is_published(self.arch):
            code["stands_for"] = str(resolve(self.arch, self.training.dim, seqlen=self.task.length))
        return code | {
            "arch": self.arch,
            "task": {"name": self.task.name} | self.task.options(),
            "training": self.training.config(),
        }

    @classmethod
    def of(cls, config: dict[str, Any]) -> Run:
        """The run of a `config`. ValueError where its task is not here."""
        options = dict(config["task"])
        name = options.pop("name")
        if name not in TASKS:
            raise ValueError(f"{unknown('task', name, TASKS)}; one from outside needs its --plugin")
        return cls(config["arch"], TASKS[name](**options), Training(**config["training"]))

    def __str__(self) -> str:
        return f"{self.task.name}: {self.arch}"

    @property
    def points(self) -> int:
        """Epochs at most."""
        return self.training.epochs

    @staticmethod
    def do(job: Sequence[Run], on_point: Callable[[Run, int, dict[str, float]], None], device: str) -> list[Result]:
        """Trains runs: one by itself, several as one model."""
        from madkernels.synthetics.together import train_together
        from madkernels.synthetics.train import train

        if len(job) > 1:
            return [str(r) if isinstance(r, Refused) else r for r in train_together(job, on_point, device)]
        return [train(job[0], lambda epoch, point: on_point(job[0], epoch, point), device)]

    @property
    def tokens(self) -> float:
        """Tokens that are trained on at most."""
        return float(self.training.epochs * self.task.train_examples * self.task.length)

    def trial(self, dearest: float) -> Callable[[], float] | None:
        """Steps of this run, to measure its pace by (:mod:`madkernels.runs.pace`)."""
        from madkernels.synthetics.train import trial

        return trial(self, dearest)


@dataclass(frozen=True)
class Shown:
    """How far the scores of a protocol agreed with the published ones, in a study: its page, how many architectures, and the
    rank correlation over them."""

    study: str
    architectures: int
    spearman: float

    def __str__(self) -> str:
        return f"Spearman {self.spearman:+.2f} over {self.architectures} architectures ({self.study})"


@dataclass(frozen=True)
class Protocol:
    """Settings by task, the optimiser settings that each is trained with, the seeds, and the measure that is the score.

    Attributes:
        own_trainings: optimiser settings by task, of those that have their own.
        seeds_until_apart: so many seeds at most, for architectures whose intervals overlap (of seeds.py); 0: no more.
        agreement: None where it has not been measured.
    """

    name: str
    about: str
    settings: dict[str, tuple[Task, ...]]
    trainings: tuple[Training, ...]
    seeds: tuple[int, ...]
    score: str
    own_trainings: dict[str, tuple[Training, ...]] = field(default_factory=dict)
    seeds_until_apart: int = 0
    agreement: Shown | None = None

    def trainings_of(self, task: str) -> tuple[Training, ...]:
        """The optimiser settings of a task."""
        return self.own_trainings.get(task, self.trainings)


def protocol_names() -> list[str]:
    """The protocols that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_protocol(name: str) -> Protocol:
    """A protocol by its name, or from a JSON file. ValueError says what in it is wrong."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not name.endswith(".json") and name not in protocol_names():
        raise ValueError(unknown("protocol", name, [*protocol_names(), "or a .json file"]))
    try:
        return _read_protocol(path.stem, parse_json(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"protocol {name}: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"protocol {name}: its objects are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"protocol {name}: {error}") from None


def _read_protocol(name: str, data: Any) -> Protocol:
    needed = ("about", "seeds", "score", "training", "tasks")
    data = read_object("the file", data, (*needed, "seeds_until_apart", "agreement"), needed)
    about, score = (read_value(key, data[key], str) for key in ("about", "score"))
    if score not in MEASURES:
        raise ValueError(f"score is {score!r}; it takes {' or '.join(MEASURES)}")
    seeds = read_list("seeds", data["seeds"], int)
    tasks = read_object("tasks", data["tasks"], data["tasks"], ())
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: {unknown('task', task, TASKS)}")
    if not tasks:
        raise ValueError("tasks: there is none")
    settings = {task: _read_task(f"tasks.{task}", TASKS[task], tasks[task]) for task in TASKS if task in tasks}
    own = {task: _read_own(f"tasks.{task}", data["training"], tasks[task]) for task in settings if "training" in tasks[task]}
    until_apart = read_value("seeds_until_apart", data.get("seeds_until_apart", 0), int, 0)
    shown = _read_agreement(data["agreement"]) if "agreement" in data else None
    return Protocol(name, about, settings, _read_trainings(data["training"]), tuple(seeds), score, own, until_apart, shown)


def _read_trainings(data: Any, where: str = "training") -> tuple[Training, ...]:
    """The grid of a protocol, or of a task."""
    types = {name: kind for name, kind in fields_of(Training).items() if name != "seed"}
    data = read_object(where, data, types, GRID)
    grid = [read_list(f"{where}.{name}", data[name], float, 0) for name in GRID]
    options = {k: read_value(f"{where}.{k}", v, types[k], LEAST.get(k)) for k, v in data.items() if k not in GRID}
    return tuple(Training(**dict(zip(GRID, point, strict=True)), **options) for point in product(*grid))


def _read_own(where: str, common: Any, data: Any) -> tuple[Training, ...]:
    """The grid of a task that says what of its training differs from the others'."""
    _read_trainings(common)  # so that what is wrong there is not told of the task
    own = [name for name in fields_of(Training) if name not in OF_PROTOCOL]
    return _read_trainings(common | read_object(f"{where}.training", data["training"], own, ()), f"{where}.training")


def _read_agreement(data: Any) -> Shown:
    types = fields_of(Shown)
    data = read_object("agreement", data, types, types)
    shown = Shown(
        **{
            k: read_value(f"agreement.{k}", v, types[k], {"architectures": 3, "spearman": -1}.get(k))
            for k, v in data.items()
        }
    )
    if shown.spearman > 1:
        raise ValueError(f"agreement.spearman: got {shown.spearman}; expected a number from -1 to 1")
    return shown


def _read_task(where: str, task: type[Task], data: Any) -> tuple[Task, ...]:
    """The baseline, and each change of one variable from it."""
    data, types = read_object(where, data, ("baseline", "changes", "training"), ("baseline",)), fields_of(task)
    given = read_object(f"{where}.baseline", data["baseline"], types, required(task))
    base = task(**{k: read_value(f"{where}.baseline.{k}", v, types[k], LEAST.get(k)) for k, v in given.items()})
    settings = [base]
    for name, values in read_object(f"{where}.changes", data.get("changes", {}), types, ()).items():
        place = f"{where}.changes.{name}"
        for value in read_list(place, values, types[name], LEAST.get(name)):
            if value == getattr(base, name):
                raise ValueError(f"{place}: {value} is the baseline's")
            settings.append(dataclasses.replace(base, **{name: value}))
    return tuple(settings)


def plan(
    protocol: Protocol | str,
    archs: Iterable[str],
    tasks: str = "all",
    *,
    seeds: Sequence[int] | None = None,
    dtype: str | None = None,
) -> list[Run]:
    """The runs of a protocol.

    Args:
        archs: architecture strings, or `published:NAME` (:mod:`madkernels.models.presets`).
        tasks: names with commas between, or all.

    Raises:
        ValueError: something is unknown; the message names it.
    """
    chosen = load_protocol(protocol) if isinstance(protocol, str) else protocol
    names = [name for name in task_names(tasks) if name in chosen.settings]
    if tasks != "all" and (missing := set(task_names(tasks)) - set(names)):
        raise ValueError(f"protocol {chosen.name} has no {', '.join(sorted(missing))}; it has {', '.join(chosen.settings)}")
    overrides: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return [
        Run(arch, setting, dataclasses.replace(training, seed=seed, **overrides))
        for arch in dict.fromkeys(map(canonical, archs))
        for name in names
        for setting in chosen.settings[name]
        for seed in (seeds or chosen.seeds)
        for training in chosen.trainings_of(name)
    ]


def task_names(text: str) -> list[str]:
    """The tasks that `text` names, in the order of the table."""
    if text == "all":
        return list(TASKS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(unknown("task", name, TASKS))
    return [name for name in TASKS if name in names]


@dataclass(frozen=True)
class Score:
    """A score for an architecture, and how much of the protocol stands behind it."""

    by_seed: dict[int, float]
    done: int  # settings, over all seeds, of which a run has ended
    settings: int

    @property
    def value(self) -> float | None:
        """The mean over seeds; None: no run has ended."""
        return mean(list(self.by_seed.values())) if self.by_seed else None

    @property
    def margin(self) -> float | None:
        """Half of the 95 % interval; None with fewer than two seeds."""
        return margin(list(self.by_seed.values()))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def margin(values: Sequence[float]) -> float | None:
    """Half of Student's 95 % interval of the mean; None with fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    variance = sum((v - mean(values)) ** 2 for v in values) / (n - 1)
    return float(student.ppf(0.975, n - 1)) * math.sqrt(variance / n)


Results = Sequence[tuple[Run, dict[str, Any] | None]]  # each run, and what was measured if it has ended


def results_of(rows: Sequence[dict[str, Any]]) -> Results:
    """The runs of a results file, each with what was measured."""
    return [(row["run"], row["metrics"]) for row in rows]


def best_runs(results: Results) -> dict[tuple[str, Task, int], tuple[Run, dict[str, Any]] | None]:
    """For each architecture, setting and seed the run that is best on the held-out set; None where none has ended."""
    found: dict[tuple[str, Task, int], tuple[Run, dict[str, Any]] | None] = {}
    for run, metrics in results:
        place = run.arch, run.task, run.training.seed
        best = found.setdefault(place, None)
        if metrics is not None and (best is None or metrics["held_out_accuracy"] > best[1]["held_out_accuracy"]):
            found[place] = run, metrics
    return found


def scores(results: Results, measure: str = "accuracy") -> dict[str, dict[str, Score]]:
    """Scores by architecture and task."""
    groups: dict[tuple[str, str], dict[int, list[float | None]]] = {}
    for (arch, task, seed), best in best_runs(results).items():
        by_seed = groups.setdefault((arch, task.name), {})
        by_seed.setdefault(seed, []).append(None if best is None else best[1][measure])
    table: dict[str, dict[str, Score]] = {}
    for (arch, name), by_seed in groups.items():
        known = {seed: [v for v in values if v is not None] for seed, values in by_seed.items()}
        means = {seed: mean(values) for seed, values in known.items() if values}
        done, total = sum(map(len, known.values())), sum(map(len, by_seed.values()))
        table.setdefault(arch, {})[name] = Score(means, done, total)
    return table


def mad_score(by_task: dict[str, Score]) -> Score:
    """The mean over tasks, of the seeds that have a score of each."""
    seeds = [set(score.by_seed) for score in by_task.values()]
    shared = sorted(set.intersection(*seeds)) if seeds else []
    means = {seed: mean([score.by_seed[seed] for score in by_task.values()]) for seed in shared}
    return Score(means, sum(s.done for s in by_task.values()), sum(s.settings for s in by_task.values()))
