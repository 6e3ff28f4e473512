"""One run of the protocol: train a model on a task, and measure it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models import AutoEncoder, HybridLM
from madkernels.models.init import parameter_groups
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.tasks import IGNORE

EVALUATION_BATCH = 128


class Diverged(Exception):
    """The loss is no number any more."""


def build(run: Run) -> HybridLM | AutoEncoder:
    """The model of a run, initialised by the run's seed. ValueError where the architecture does not go with the width."""
    torch.manual_seed(run.training.seed)
    if run.task.autoencoder:
        return AutoEncoder(run.arch, vocab_size=run.task.vocab_size, seqlen=run.task.length, dim=run.training.dim)
    return HybridLM(run.arch, vocab_size=run.task.vocab_size, dim=run.training.dim)


def train(run: Run, on_epoch: Callable[[int, dict[str, float]], None] | None = None) -> dict[str, Any]:
    """Trains and measures; the same run gives the same result on the same machine with the same number of threads.

    Args:
        run: what to train.
        on_epoch: called after each epoch with the number of epochs done and its point of the curve.

    Returns:
        Test `accuracy` (over all scored tokens), `macro_accuracy` (the mean over classes that the authors' code takes, by
        batches of 128) and `loss` (nats); `validation_accuracy`; `epochs`, `seconds`, and `curve`, a point an epoch.

    Raises:
        Diverged: the training loss became NaN or infinite.
    """
    begun = time.perf_counter()
    options, model = run.training, build(run)
    make = run.task.generate
    inputs, targets = make(run.task.train_examples, seed=options.seed, split="train")
    validation = make(options.held_out, seed=options.seed, split="validation")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.lr, betas=(0.9, 0.98), fused=True
    )
    steps = options.epochs * -(-len(inputs) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=options.min_lr)
    order = torch.Generator().manual_seed(options.seed)
    curve: list[dict[str, float]] = []
    for epoch in range(1, options.epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.split(torch.randperm(len(inputs), generator=order), options.batch):
            loss = step(model, inputs[batch], targets[batch], options)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        if not torch.isfinite(torch.tensor(total)):
            raise Diverged(f"the loss is {total} in epoch {epoch}")
        held_out = measure(model, *validation, options)
        curve.append({"loss": total / len(inputs), "validation_accuracy": held_out["accuracy"]})
        if on_epoch:
            on_epoch(epoch, curve[-1])
        if held_out["accuracy"] >= options.enough:
            break
    test = measure(model, *make(options.held_out, seed=options.seed, split="test"), options)
    return test | {
        "validation_accuracy": curve[-1]["validation_accuracy"],
        "epochs": len(curve),
        "seconds": time.perf_counter() - begun,
        "curve": curve,
    }


def step(model: nn.Module, inputs: Tensor, targets: Tensor, options: Training) -> Tensor:
    """The loss of a batch: cross-entropy over the scored positions, in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def measure(model: nn.Module, inputs: Tensor, targets: Tensor, options: Training) -> dict[str, float]:
    """Accuracy over scored tokens, macro accuracy, loss in nats."""
    model.eval()
    right = scored = 0
    loss, macro = 0.0, []
    for x, y in zip(*(torch.split(t, EVALUATION_BATCH) for t in (inputs, targets)), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = model(x)
        kept = y != IGNORE
        logits, y = logits.float()[kept], y[kept]
        predicted = logits.argmax(-1)
        right += int((predicted == y).sum())
        scored += len(y)
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        macro.append(macro_accuracy(predicted, y, logits.shape[-1]))
    return {"accuracy": right / scored, "macro_accuracy": sum(macro) / len(macro), "loss": loss / scored}


def macro_accuracy(predicted: Tensor, targets: Tensor, classes: int) -> float:
    """The mean of each class's recall, over the classes that occur as a target or as a prediction."""
    hits = torch.bincount(targets[predicted == targets], minlength=classes)
    wanted = torch.bincount(targets, minlength=classes)
    occurs = (wanted + torch.bincount(predicted, minlength=classes)) > 0
    return float((hits[occurs] / wanted[occurs].clamp_min(1)).mean())
