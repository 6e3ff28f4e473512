"""One run of the protocol: train a model on a task, and measure it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models import AutoEncoder, HybridLM, counting
from madkernels.models.init import parameter_groups
from madkernels.models.layers.moe import balance_experts
from madkernels.models.presets import resolve
from madkernels.runs.engines import Diverged
from madkernels.runs.pace import Trial, trial_of
from madkernels.synthetics.honesty import check_scored
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.schedule import chance_of, is_over, rate
from madkernels.synthetics.tasks import IGNORE, Task

EVALUATION_BATCH = 128
BETAS = (0.9, 0.98)


class Data(NamedTuple):
    """The splits of a run: inputs and targets, (examples, length) each."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]  # stops training, and chooses among runs
    test: tuple[Tensor, Tensor]


def build(run: Run) -> HybridLM | AutoEncoder:
    """The model of a run, initialised by the run's seed. ValueError where the architecture does not go with the width, or
    the code of a layer from outside fails."""
    torch.manual_seed(run.training.seed)
    try:
        arch = resolve(run.arch, run.training.dim, seqlen=run.task.length)
        if run.task.autoencoder:
            return AutoEncoder(arch, vocab_size=run.task.vocab_size, seqlen=run.task.length, dim=run.training.dim)
        return HybridLM(arch, vocab_size=run.task.vocab_size, dim=run.training.dim)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # whatever the code of another does
        raise ValueError(f"{run.arch} cannot be built: {type(error).__name__}: {' '.join(str(error).split())}") from None


def data(run: Run, device: str = "cpu") -> Data:
    """The splits of a run; made once for the runs of a setting that follow one another."""
    splits = _generate(run.task, run.training.held_out, run.training.select == "test", run.training.seed)
    return Data(*((x.to(device), y.to(device)) for x, y in splits))


@lru_cache(maxsize=4)
def _generate(task: Task, held_out: int, select_by_test: bool, seed: int) -> Data:
    test = task.generate(held_out, seed=seed, split="test")
    validation = test if select_by_test else task.generate(held_out, seed=seed, split="validation")
    return Data(task.generate(task.train_examples, seed=seed, split="train"), validation, test)


def train(run: Run, on_epoch: Callable[[int, dict[str, float]], None] | None = None, device: str = "cpu") -> dict[str, Any]:
    """Trains and measures; the same run gives the same result on the same machine with the same number of threads.

    Args:
        run: what to train.
        on_epoch: called after each epoch with the number of epochs done and its point of the curve.
        device: where.

    Returns:
        Test `accuracy` (over all scored tokens), `macro_accuracy` (the mean over classes that the authors' code takes, by
        batches of 128) and `loss` (nats); `held_out_accuracy`, on the set that the run selects by; `epochs`, `seconds`, of
        which `data_seconds` for making the data, and `curve`, one point per epoch.

    Raises:
        Diverged: the training loss became NaN or infinite.
        Refused: a layer from outside turned out to look ahead.
    """
    begun = time.perf_counter()
    options, model = run.training, build(run).to(device)
    (inputs, targets), held_out, test = data(run, device)
    data_seconds = time.perf_counter() - begun
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.lr, betas=BETAS, fused=True)
    batches = -(-len(inputs) // options.batch)
    order, chance = torch.Generator().manual_seed(options.seed), chance_of(held_out[1])
    curve: list[dict[str, float]] = []
    for epoch in range(1, options.epochs + 1):
        model.train()
        total = torch.zeros((), device=device)
        split = torch.split(torch.randperm(len(inputs), generator=order).to(device), options.batch)
        for number, batch in enumerate(split, (epoch - 1) * batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(options, number, options.epochs * batches)
            loss = step(model, inputs[batch], targets[batch], options)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            balance_experts(model)
            total += loss.detach() * len(batch)
        point = {"loss": float(total) / len(inputs)}
        check_finite(point["loss"], epoch)
        point["held_out_accuracy"] = measure(model, *held_out, options)["accuracy"]
        curve.append(point)
        if on_epoch:
            on_epoch(epoch, point)
        if is_over([p["held_out_accuracy"] for p in curve], options, chance):
            break
    check_scored(run, model, build, held_out)
    return measure(model, *test, options) | {
        "held_out_accuracy": curve[-1]["held_out_accuracy"],
        "epochs": len(curve),
        "seconds": time.perf_counter() - begun,
        "data_seconds": data_seconds,
        "curve": curve,
    }


def trial(run: Run, dearest: float) -> Trial | None:
    """As :meth:`madkernels.runs.engines.Run.trial`: as many examples of a step as cost no more than that."""
    options, model = run.training, build(run)
    flops = counting.training_flops(model, run.task.length) * run.task.length
    examples = min(options.batch, run.task.train_examples, int(dearest // flops))
    if not examples:
        return None
    inputs, targets = run.task.generate(examples, seed=options.seed, split="train")
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.lr, betas=BETAS, fused=True)

    return trial_of(lambda: step(model, inputs, targets, options), optimizer, examples * flops)


def check_finite(loss: float, epoch: int) -> None:
    """Raises Diverged where it is no number."""
    if loss != loss or abs(loss) == float("inf"):
        raise Diverged(f"the loss is {loss} in epoch {epoch}")


def step(model: nn.Module, inputs: Tensor, targets: Tensor, options: Training) -> Tensor:
    """The loss of a batch: cross-entropy over the scored positions, in float32."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def measure(model: nn.Module, inputs: Tensor, targets: Tensor, options: Training) -> dict[str, float]:
    """Accuracy over scored tokens, macro accuracy, loss in nats."""
    model.eval()
    tally = Tally()
    for x, y in zip(*(torch.split(t, EVALUATION_BATCH) for t in (inputs, targets)), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = model(x)
        tally.add(logits, y)
    return tally.measures()


class Tally:
    """What a model got right, batch by batch."""

    def __init__(self) -> None:
        self.right = self.scored = 0
        self.loss, self.macro = 0.0, list[float]()

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (batch, seqlen, vocab_size), targets (batch, seqlen)."""
        kept = targets != IGNORE
        logits, wanted = logits.float()[kept], targets[kept]
        predicted = logits.argmax(-1)
        self.right += int((predicted == wanted).sum())
        self.scored += len(wanted)
        self.loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        self.macro.append(macro_accuracy(predicted, wanted, logits.shape[-1]))

    def measures(self) -> dict[str, float]:
        return {
            "accuracy": self.right / self.scored,
            "macro_accuracy": sum(self.macro) / len(self.macro),
            "loss": self.loss / self.scored,
        }


def macro_accuracy(predicted: Tensor, targets: Tensor, classes: int) -> float:
    """The mean of each class's recall, over the classes that occur as a target or as a prediction."""
    hits = torch.bincount(targets[predicted == targets], minlength=classes)
    wanted = torch.bincount(targets, minlength=classes)
    occurs = (wanted + torch.bincount(predicted, minlength=classes)) > 0
    return float((hits[occurs] / wanted[occurs].clamp_min(1)).mean())
