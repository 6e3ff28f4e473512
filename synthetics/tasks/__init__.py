"""The tasks, by name: the published six, and what plugins put beside them."""

from __future__ import annotations

import re

from madkernels.synthetics.fields import fields_of
from madkernels.synthetics.tasks.base import IGNORE, Split, Task
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.fuzzy_recall import FuzzyRecall
from madkernels.synthetics.tasks.memorization import Memorization
from madkernels.synthetics.tasks.noisy_recall import NoisyRecall
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.tasks.selective_copying import SelectiveCopying

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Recall, NoisyRecall, FuzzyRecall, SelectiveCopying, Compression, Memorization)
}
RESERVED = ("all", "arch", "architecture", "parameters", "state")  # what else --tasks and the columns of tables say

_user: set[str] = set()


def add_task(task: type[Task]) -> None:
    """Lets protocols use a task from outside, by its `name`.

    Args:
        task: a frozen dataclass derived from :class:`Task`; its fields, whole numbers, numbers, truth values or strings, are
            the options of a protocol.

    Raises:
        ValueError: it is no such class, or its name is taken or is none.
    """
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ValueError(f"{task!r} is no class derived from Task")
    for key in ("name", "summary"):
        if not isinstance(getattr(task, key, None), str):
            raise ValueError(f"{task.__name__} has no {key}: a string of its class")
    name = task.name
    if not re.fullmatch("[a-z][a-z0-9-]*", name) or name in RESERVED:
        raise ValueError(f"{name!r} is no name for a task: small letters, digits and hyphens, none of {', '.join(RESERVED)}")
    if name in TASKS and name not in _user:
        raise ValueError(f"there is a task {name} already")
    if "__dataclass_params__" not in vars(task):
        raise ValueError(f"{task.__name__} is no dataclass: put @dataclass(frozen=True) before it")
    for option, kind in fields_of(task).items():
        if kind not in (int, float, bool, str):
            raise ValueError(f"{task.__name__}: option {option} is none of int, float, bool and str")
    TASKS[name] = task
    _user.add(name)


__all__ = ["IGNORE", "TASKS", "Split", "Task", "add_task"]
