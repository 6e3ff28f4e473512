"""That no score is got by looking ahead: architectures with layers from outside are looked at before anything is trained,
and once more with their trained weights before a score is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from madkernels.models.causality import check_layers_from_outside, check_trained, layers_from_outside
from madkernels.runs.engines import Refused
from madkernels.synthetics.protocol import Run
from madkernels.synthetics.tasks import IGNORE

TOKENS = 8192  # of held-out sequences that a trained model is looked at with
BLIND = 128  # held-out sequences whose answers are asked for again without what follows
LOST = 0.05  # accuracy that a causal model does not lose by that, whatever its rounding


def check_layers(runs: Sequence[Run]) -> None:
    """Looks at each layer from outside at the width, length and batch size of its runs. ValueError names one that cheats."""
    shapes = dict.fromkeys(
        (r.arch, r.training.dim, r.task.length, min(r.training.batch, r.task.train_examples)) for r in runs
    )
    for arch, dim, seqlen, batch in shapes:
        check_layers_from_outside(arch, dim=dim, batch=batch, seqlen=seqlen)


def check_scored(run: Run, model: nn.Module, make: Callable[[Run], nn.Module], held_out: tuple[Tensor, Tensor]) -> None:
    """Looks at a trained model with layers from outside.

    What it hands on from position to position is looked at with its trained weights in float64, on held-out sequences. And
    its answers, as they are scored, must be as good where the tokens after each are others. An auto-encoder is asked the
    first only: its answers come from the last position, which may see all.

    Args:
        model: the trained one; it is scored on the device that it is on, in the run's dtype.
        make: a new model of the run.
        held_out: inputs and targets, (examples, length).

    Raises:
        Refused: it looks ahead; the message names its layers from outside.
    """
    names = " or ".join(str(spec) for spec in layers_from_outside(run.arch))
    if not names:
        return
    model.eval()
    tensors = {name: t.detach().cpu() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    inputs = held_out[0][: max(min(TOKENS // run.task.length, 64), 2)].cpu()
    embedding = tensors["embedding.weight"].double()
    try:
        check_trained(lambda: loaded(make(run), tensors).backbone, names, embedding[inputs], embedding[_others(run, inputs)])
    except ValueError as error:
        raise Refused(str(error)) from None
    if not run.task.autoencoder:
        _check_blind(run, model, names, held_out)


@torch.no_grad()
def _check_blind(run: Run, model: nn.Module, names: str, held_out: tuple[Tensor, Tensor]) -> None:
    """One answer of each sequence, with the tokens after it as they are and with others."""
    inputs, targets = (split[:BLIND] for split in held_out)
    scored = [row.nonzero().flatten().tolist() for row in targets != IGNORE]
    asked = torch.tensor([places[n % len(places)] for n, places in enumerate(scored)], device=inputs.device)  # (examples,)
    ahead = torch.arange(inputs.shape[1], device=inputs.device) > asked[:, None]
    rows = torch.arange(len(inputs), device=inputs.device)
    right = []
    for tokens in (inputs, torch.where(ahead, _others(run, inputs), inputs)):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=run.training.dtype == "bfloat16"):
            logits = model(tokens)
        right.append(float((logits[rows, asked].argmax(-1) == targets[rows, asked]).double().mean()))
    if right[0] - right[1] > LOST:
        told = (
            f"{100 * right[0]:.0f} % of its answers are right, {100 * right[1]:.0f} % where the tokens after them are others"
        )
        raise Refused(f"layer {names} is not causal once trained: {told}")


def loaded(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """The model with parameters and buffers from others, by name."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = tensors[name].to(tensor.device, copy=True)
    return model


def _others(run: Run, tokens: Tensor) -> Tensor:
    """For each token another of the vocabulary."""
    shift = torch.randint(1, run.task.vocab_size, tokens.shape, generator=torch.Generator().manual_seed(0))
    return (tokens + shift.to(tokens.device)) % run.task.vocab_size
