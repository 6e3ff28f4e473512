"""The learning rate of a step, and when a training ends: the same for runs that train one by one and together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from madkernels.synthetics.protocol import Training
from madkernels.synthetics.tasks import IGNORE

BETTER = 0.001  # of accuracy: by less it has not improved
BEGUN = 0.5  # of what guessing leaves: a model that answers less may not have begun to learn


def rate(options: Training, step: int, steps: int) -> float:
    """The learning rate of a step, from 0: it rises in a line to `lr` over the share `warmup` of the steps, then follows a
    cosine to `min_lr`."""
    rising = round(options.warmup * steps)
    if step < rising:
        return options.lr * (step + 1) / rising
    left = (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
    return options.min_lr + (options.lr - options.min_lr) * left


def is_over(accuracies: Sequence[float], options: Training, chance: float) -> bool:
    """Whether a training ends here.

    Args:
        accuracies: on the held-out set, after each epoch so far.
        chance: the accuracy of guessing.
    """
    finished = accuracies[-1] >= options.enough or len(accuracies) == options.epochs
    return finished or on_plateau(accuracies, options, chance)


def on_plateau(accuracies: Sequence[float], options: Training, chance: float) -> bool:
    """Whether the accuracy has not improved for `patience` epochs, after `min_epochs` at least, in a model that has begun to
    learn.

    Tasks of recall are learned all at once, after a long stretch in which nothing seems to happen, if not at chance: which
    values occur in a sequence is learned sooner than which belongs to a key. So a run that is below the middle between
    guessing and knowing is never on a plateau.
    """
    if not options.patience or len(accuracies) < options.min_epochs:
        return False
    best, since = -math.inf, 0
    for epoch, accuracy in enumerate(accuracies, 1):
        if accuracy >= best + BETTER:
            best, since = accuracy, epoch
    return len(accuracies) - since >= options.patience and best >= chance + BEGUN * (1 - chance)


def chance_of(targets: Tensor) -> float:
    """The accuracy of always giving the commonest answer. targets: (examples, length)."""
    answers = targets[targets != IGNORE]
    return float(torch.bincount(answers).max() / len(answers))
