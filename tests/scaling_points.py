"""Points that several tests fit: the digitised Chinchilla runs where they are at hand, and surfaces with a known answer."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from madkernels.scaling.laws import Points, Surface
from madkernels.scaling.screening import highest

CHINCHILLA = Path(__file__).parents[2] / "shared" / "data" / "chinchilla_points.csv"
SURFACE = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, as rounded there


def chinchilla(drop_highest: int = 5) -> Points:
    if not CHINCHILLA.exists():
        pytest.skip(f"no {CHINCHILLA}")
    with CHINCHILLA.open() as file:
        rows = list(csv.DictReader(file))
    params, flops, loss = (np.array([float(row[name]) for row in rows]) for name in ("Model Size", "Training FLOP", "loss"))
    return Points(params, flops / (6 * params), loss).where(~highest(loss, drop_highest))


def grid(noise: float = 0.0, surface: Surface = SURFACE, seed: int = 0) -> Points:
    """8 sizes by 8 numbers of tokens, with log-normal noise on the loss."""
    params, tokens = (values.ravel() for values in np.meshgrid(np.geomspace(1e7, 1e10, 8), np.geomspace(1e9, 1e12, 8)))
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(params)))
    return Points(params, tokens, surface.loss(params, tokens) * factor)
