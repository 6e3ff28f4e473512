"""A layer of your own scored on MAD tasks beside one of the package, in Python; `madkernels mad run --plugin` does the same.

Run it with `python docs/examples/own_layer.py`.
"""

from dataclasses import replace

import torch
from torch import nn

from madkernels.models import add_layer
from madkernels.synthetics.protocol import load_protocol, mad_score, plan, scores
from madkernels.synthetics.sweep import check
from madkernels.synthetics.train import train


class Gated(nn.Module):
    """A gate of the current token over the running mean of all tokens so far."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.value, self.gate, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seqlen, dim) to the same, causal
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        return self.out(torch.sigmoid(self.gate(x)) * (self.value(x).cumsum(1) / count))

    def state_size(self, seqlen: int) -> int:
        return self.dim  # the running sum


add_layer("gated", Gated)

# The settings of the demo with two epochs, so that this ends in seconds. Drop this line for scores that mean a little more.
demo = load_protocol("demo")
demo = replace(demo, trainings=tuple(replace(training, epochs=2) for training in demo.trainings))

runs = plan(demo, ["gated swiglu gated swiglu", "mamba swiglu mamba swiglu"], tasks="selective-copying,compression")
check(runs)  # refuses a layer whose outputs depend on later positions
results = [(run, train(run)) for run in runs]

for arch, by_task in scores(results).items():
    told = ", ".join(f"{task} {100 * score.value:.1f}" for task, score in by_task.items() if score.value is not None)
    mean = mad_score(by_task).value
    print(f"{arch}: {told}; MAD score of these tasks {100 * mean:.1f}" if mean is not None else f"{arch}: no score")
