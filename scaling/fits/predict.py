"""Held-out runs: the losses that a surface predicts for them, and how far those are from what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from madkernels.reporting.tables import Table as Shown
from madkernels.scaling.fits.runs_table import Selection
from madkernels.scaling.fits.statistics import Array
from madkernels.scaling.fits.surface import Fit


@dataclass(frozen=True)
class Prediction:
    """Held-out runs, the loss predicted of each (n,), and whether the fit that it comes from has converged."""

    selection: Selection
    loss: Array
    converged: bool

    @property
    def error(self) -> Array:
        """Predicted less measured, in nats per token, (n,)."""
        return self.loss - self.selection.points.loss

    @property
    def relative(self) -> Array:
        """The error as a share of the measured loss, (n,)."""
        return self.error / self.selection.points.loss


def predicted(fit: Fit, held_out: Selection) -> Prediction:
    points = held_out.points
    return Prediction(held_out, fit.surface.loss(points.params, points.tokens), fit.proof.converged)


def prediction_json(found: Prediction) -> dict[str, Any]:
    """Losses in nats per token."""
    points, table = found.selection.points, found.selection.table
    columns = points.params, points.tokens, points.loss, found.loss, found.relative
    names = ("params", "tokens", "loss", "predicted", "relative_error")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {
        "runs": [{"place": table.place(i)} | dict(zip(names, row, strict=True)) for i, row in enumerate(rows)],
        "mean_absolute_error": float(np.abs(found.error).mean()),
        "mean_absolute_relative_error": float(np.abs(found.relative).mean()),
        "converged": found.converged,
    }


def prediction_table(found: Prediction, group: str) -> Shown:
    points, table = found.selection.points, found.selection.table
    means = f"{np.abs(found.error).mean():.4f} nats per token, {np.abs(found.relative).mean():.2%}"
    caption = f"Mean absolute error: {means}.{'' if found.converged else ' The fit has NOT CONVERGED.'}"
    title = f"Held-out runs{': ' if group else ''}{group}"
    out = Shown("run", title=title, caption=caption, spare=("tokens", "parameters"))
    for name in ("parameters", "tokens", "loss", "predicted", "relative error"):
        out.add_column(name, justify="right")
    for i, (params, tokens, loss) in enumerate(zip(points.params, points.tokens, points.loss, strict=True)):
        figures = f"{params:.3g}", f"{tokens:.3g}", f"{loss:.4f}", f"{found.loss[i]:.4f}", f"{found.relative[i]:+.3%}"
        out.add_row(table.place(i), *figures)
    return out
