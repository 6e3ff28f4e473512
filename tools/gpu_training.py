"""Times training steps of presets on the project's ops against the same models on plain torch ops, compiled; JSON to a file.

python tools/gpu_training.py [--device cuda] [--json FILE]

The last is a slice, 8 of the 32 blocks of the 7B model. MFU is by the project's own count of FLOPs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from madkernels import reference
from madkernels.models.counting import training_flops
from madkernels.models.init import parameter_groups
from madkernels.models.layers import hyena, short_conv
from madkernels.models.presets import Preset, preset
from madkernels.scaling.training.estimate import peak_flops
from madkernels.scaling.training.trainer import BETAS, Objective

TOLERANCE = 0.02  # of the first losses, in nats: bfloat16
STEPS, WARM = 6, 3


def presets(quick: bool) -> list[tuple[Preset, int]]:
    """With the rows of a step."""
    if quick:
        small = dataclasses.replace(preset("striped-hyena-70m"), dim=64, blocks=4, seqlen=128, vocab_size=256)
        return [(small, 2)]
    slice_of_7b = dataclasses.replace(preset("striped-hyena-7b"), name="striped-hyena-7b, 8 of 32 blocks", blocks=8)
    return [(preset("striped-hyena-70m"), 8), (preset("striped-hyena-1b"), 2), (slice_of_7b, 1)]


@contextmanager
def plain_ops() -> Iterator[None]:
    """The layers on the ops' definitions in plain torch."""
    kept = [(module, name, getattr(module, name)) for module, name in
            ((hyena, "causal_conv"), (hyena, "fft_conv"), (short_conv, "causal_conv"))]  # fmt: skip
    try:
        for module, name, _ in kept:
            setattr(module, name, getattr(reference, name))
        yield
    finally:
        for module, name, op in kept:
            setattr(module, name, op)


def timed(chosen: Preset, rows: int, device: str, compiled: bool) -> dict[str, float]:
    """The first loss, and the median pace of steps."""
    torch.manual_seed(0)
    objective = Objective(chosen.model()).to(device)
    if compiled:
        for layer in objective.model.backbone.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(parameter_groups(objective, 0.1), lr=chosen.lr, betas=BETAS, fused=True)
    tokens, targets = torch.randint(0, chosen.vocab_size, (2, rows, chosen.seqlen), device=device)
    flops, losses, seconds = training_flops(objective.model, chosen.seqlen), [], []
    for _ in range(WARM + STEPS):
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = objective(tokens, targets, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device
        seconds.append(time.perf_counter() - begun)
    pace = rows * chosen.seqlen / statistics.median(seconds[WARM:])
    return {"loss": losses[0], "tokens_per_second": pace, "flops_per_second": pace * flops}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one tiny model")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for chosen, rows in presets(arguments.quick):
        ours, compiled = (timed(chosen, rows, arguments.device, compiled) for compiled in (False, True))
        with plain_ops():
            plain = timed(chosen, rows, arguments.device, compiled=True)
        results = {"ours": ours, "ours compiled": compiled, "plain compiled": plain}
        for name, result in results.items():
            if best := peak_flops(arguments.device):
                result["mfu"] = result["flops_per_second"] / best
            print(f"{chosen.name}, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()), flush=True)
        found[chosen.name] = results
        if arguments.json:  # after each, so that a time limit loses only the rest
            arguments.json.write_text(json.dumps(found, indent=1))
        if max(abs(result["loss"] - plain["loss"]) for result in results.values()) > TOLERANCE:
            print(f"{chosen.name}: the losses differ", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
