"""The tasks, by name: the published six, and what plugins put beside them."""

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

__all__ = ["IGNORE", "TASKS", "Split", "Task"]
