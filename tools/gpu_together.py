"""Times a setting's grid trained as one model against its runs one by one, and compares their losses; JSON to a file.

python tools/gpu_together.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch

from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.together import train_together
from madkernels.synthetics.train import Diverged, train

ARCHS = ("2*(attention swiglu)", "4*mamba:dstate=4", "2*(hyena swiglu)")
TOLERANCE = 1e-2  # of the losses of 20 steps: rounding grows from step to step


def grid(arch: str, quick: bool) -> list[Run]:
    """The published grid at the published size; one epoch of few steps."""
    batch, dim, steps = (8, 32, 3) if quick else (128, 128, 20)
    task = Recall(vocab_size=16, seqlen=32 if quick else 128, train_examples=steps * batch)
    rates = itertools.product((1e-4, 5e-4, 1e-3), (0.0, 0.1))
    return [Run(arch, task, Training(lr, decay, epochs=1, batch=batch, dim=dim, held_out=128)) for lr, decay in rates]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small, and few steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for arch in ARCHS:
        runs = grid(arch, arguments.quick)
        seconds: dict[str, list[float]] = {"apart": [], "together": []}
        for _ in range(2):  # the first warms up
            begun = time.perf_counter()
            apart = [train(run, device=arguments.device) for run in runs]
            middle = time.perf_counter()
            together = train_together(runs, device=arguments.device)
            seconds["apart"].append(middle - begun)
            seconds["together"].append(time.perf_counter() - middle)
        if any(isinstance(one, Diverged) for one in together):
            print(f"{arch}: diverged together only", file=sys.stderr)
            return 1
        losses = [(a["loss"], b["loss"]) for a, b in zip(apart, together, strict=True) if not isinstance(b, Diverged)]
        error = max(abs(a - b) / a for a, b in losses)
        ratio = seconds["apart"][-1] / seconds["together"][-1]
        found[arch] = {"apart": seconds["apart"][-1], "together": seconds["together"][-1], "ratio": ratio, "error": error}
        if arguments.json:  # after each, since the next may be stopped
            arguments.json.write_text(json.dumps(found, indent=1))
        print(f"{arch}: {len(runs)} runs, apart over together {ratio:.2f}, losses differ by {error:.1e}", flush=True)
    return int(any(one["error"] > TOLERANCE for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
