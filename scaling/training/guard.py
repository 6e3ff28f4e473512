"""The guard that skips steps with bad gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

SPIKE = 20.0  # times the usual gradient norm: beyond this a step is skipped
USUAL_AFTER = 50  # steps that the running mean of the norm covers, and that pass before it is trusted


@dataclass
class Guard:
    """Skips a step whose loss or gradient norm is not finite, or whose gradient norm is more than SPIKE times the usual.

    Skipped steps also move the usual norm (clamped to the limit), so a lasting rise is skipped for a few steps, not forever.
    Checkpoints store the fields under these names.

    Attributes:
        usual: running mean of the gradient norm.
        allowed, left_out: steps that were taken, and steps that were skipped.
        in_a_row: steps skipped since the last one that was taken.
    """

    usual: float = 0.0
    allowed: int = 0
    left_out: int = 0
    in_a_row: int = 0

    def allows(self, loss: float, norm: float) -> bool:
        finite = math.isfinite(loss) and math.isfinite(norm)
        most = SPIKE * self.usual if self.allowed >= USUAL_AFTER else math.inf
        good = finite and norm <= most
        if finite:
            self.usual += (min(norm, most) - self.usual) / min(self.allowed + 1, USUAL_AFTER)
        self.allowed += good
        self.left_out += not good
        self.in_a_row = 0 if good else self.in_a_row + 1
        return good
