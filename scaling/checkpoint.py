"""Checkpoints: model, optimiser and place in the data, through torch.distributed.checkpoint.

A checkpoint is a folder `step-NNNNNNNN`. It is written under another name and renamed when it is whole, so a half-written
one is never found. Tensors are stored in pieces that any number of processes can read back.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.optim import Optimizer

from madkernels.models import HybridLM

META = "run.json"


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, meta: dict[str, Any]) -> None:
    """Writes the checkpoint of a step, and lets go of the one before. All processes call it.

    Raises:
        OSError: it could not be written; the one before is still there.
    """
    place, unfinished = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    first = not dist.is_initialized() or dist.get_rank() == 0
    problem = None
    try:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        _wait()
        weights, moments = get_state_dict(model, optimizer)
        with _quiet():
            write_tensors({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)
        if first:
            (unfinished / META).write_text(json.dumps({"step": step} | meta))
            shutil.rmtree(place, ignore_errors=True)
            unfinished.rename(place)
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = error
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        for old in _found(folder)[:-1]:
            shutil.rmtree(old, ignore_errors=True)
    _wait()
    if problem is not None:
        raise OSError(f"cannot save the checkpoint {place}: {_cause(problem)}") from None


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint of a folder."""
    found = _found(folder)
    return found[-1] if found else None


def meta_of(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the tensors."""
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
    return meta


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Brings model and optimiser to where they were. All processes call it."""
    weights, moments = get_state_dict(model, optimizer)
    with _quiet():
        read_tensors({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def load_model(checkpoint: Path) -> HybridLM:
    """The language model of a checkpoint, on the CPU. ValueError where there is none."""
    try:
        config = meta_of(checkpoint)["config"]
    except OSError:
        raise ValueError(f"{checkpoint} is no checkpoint: {META} is missing") from None
    model = HybridLM(config["arch"], vocab_size=config["vocab_size"], dim=config["dim"], tied=config["tied"])
    weights = get_model_state_dict(model)
    stored = {f"model.{name}": tensor for name, tensor in weights.items()}
    with _quiet():
        read_tensors({"model": stored}, checkpoint_id=checkpoint)
    model.load_state_dict(weights)
    return model


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / META).exists())


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _cause(error: BaseException) -> BaseException:
    """What lies under the exceptions of all processes."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """One process is no mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        yield
