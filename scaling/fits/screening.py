"""Points that do not belong to the surface, and what the fit would be without them.

Runs that diverged have no sensible loss and are dropped before any fit. Runs that are only undertrained have one, and pull:
at far fewer tokens than parameters the loss is that of the first steps, which the surface does not describe. The Chinchilla
points have five such runs; with them the exponent a is 0.56, and without them 0.51.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from madkernels.scaling.fits.form import Points, shares
from madkernels.scaling.fits.statistics import Array
from madkernels.scaling.fits.surface import Fit, fit

ABSURD = 20 * np.log(2)  # nats: worse than a guess among a million tokens
NOTHING = 1e-9  # nats
UNDERTRAINED = 1.0  # tokens per parameter
OUTLYING = 5.0  # robust standard deviations of ln L from the surface

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Screening:
    """Flags of points (n,): too few tokens, and losses far above or far below the surface."""

    undertrained: Flags
    high: Flags
    low: Flags


@dataclass(frozen=True)
class LeaveOutFit:
    """The fit after dropping some points; None where too few are left."""

    what: str
    dropped: int
    fit: Fit | None


def why_not(loss: float) -> str | None:
    """Why a loss in nats is no result of a training that went well; None where it may be one."""
    if not np.isfinite(loss):
        return f"the loss is {loss}: diverged"
    if loss <= 0:
        return f"the loss is {loss:g}: not positive"
    if loss < NOTHING:
        return f"the loss is {loss:g} nats: too small for one"
    if loss > ABSURD:
        return f"the loss is {loss:g} nats, above a guess among a million tokens: diverged, or not in nats"
    return None


def acceptable(loss: Array) -> Flags:
    """Which of the losses (n,) :func:`why_not` has nothing against."""
    return np.asarray((loss >= NOTHING) & (loss <= ABSURD), dtype=np.bool_)


def highest(loss: Array, count: int) -> Flags:
    """Which of the losses (n,) are the `count` highest."""
    if not 0 <= count < len(loss):
        raise ValueError(f"cannot drop the {count} highest of {len(loss)} losses")
    flags = np.zeros(len(loss), dtype=bool)
    flags[np.argsort(-loss, kind="stable")[:count]] = True
    return flags


def screen(points: Points, fitted: Fit) -> Screening:
    """Odd points of a fit. The fit should be robust (a small delta), else outliers hide themselves."""
    residuals = -shares(points.problem, fitted.theta[None])[0][0]
    far = OUTLYING * 1.4826 * float(np.median(np.abs(residuals)))
    far = max(far, 1e-9)  # an exact surface has no outliers in its rounding
    return Screening(points.tokens < UNDERTRAINED * points.params, residuals > far, residuals < -far)


def sensitivity(points: Points, fitted: Fit, most: int = 5) -> list[LeaveOutFit]:
    """The fit without each kind of point that there is, and without the 1 .. `most` highest losses."""
    found = screen(points, fitted)
    kinds = {
        f"under {UNDERTRAINED:g} token per parameter": found.undertrained,
        "far above the surface": found.high,
        "far below the surface": found.low,
        **{f"{count} highest": highest(points.loss, count) for count in range(1, min(most, len(points) - 1) + 1)},
    }
    return [_without(points, fitted, what, flags) for what, flags in kinds.items() if flags.any()]


def _without(points: Points, fitted: Fit, what: str, flags: Flags) -> LeaveOutFit:
    try:
        return LeaveOutFit(what, int(flags.sum()), fit(points.where(~flags), fitted.delta, tied=fitted.tied))
    except ValueError:  # too few are left
        return LeaveOutFit(what, int(flags.sum()), None)
