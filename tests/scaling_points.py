"""Points that several tests fit: the digitised Chinchilla runs where they are at hand, and surfaces with a known answer."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from madkernels.scaling.fits.form import Points, Surface
from madkernels.scaling.fits.screening import highest

CHINCHILLA = Path(__file__).parents[2] / "shared" / "data" / "chinchilla_points.csv"
GADRE = CHINCHILLA.with_name("gadre_points.csv")  # of the runs in github.com/mlfoundations/scaling
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


ARCHS = {
    "transformer": ("2*(attention:heads=4 swiglu)", dataclasses.replace(SURFACE, E=1.75)),
    "mamba": ("4*mamba:dstate=8", dataclasses.replace(SURFACE, E=1.60, A=510.0)),
    "striped": ("hyena:order=8 swiglu attention:heads=4 swiglu", dataclasses.replace(SURFACE, A=350.0)),
}
COLUMNS = (
    "kind,architecture,arch,dim,params,active_params,fixed_state,state,seqlen,budget,flops,tokens,tokens_per_param,lr,seed,"
    "loss,status"
)


def write_runs(path: Path, noise: float = 0.001) -> Path:
    """Runs of three architectures as `madkernels scale run` writes them: IsoFLOP, one overtrained ladder, one of states."""
    rng, lines = np.random.default_rng(0), [COLUMNS]

    def add(kind: str, name: str, params: float, tokens: float, budget: float, state: float, less: float = 0.0) -> None:
        arch, surface = ARCHS[name]
        loss = surface.loss(params, tokens) * np.exp(noise * rng.standard_normal()) - less
        cells = (
            kind,
            name,
            arch,
            64,
            params,
            params,
            4096,
            state,
            128,
            budget,
            6 * params * tokens,
            tokens,
            tokens / params,
        )
        lines.append(",".join(map(str, (*cells, 1e-3, 1, float(loss), "done"))))

    for name, (_, surface) in ARCHS.items():
        for budget in (1e18, 1e19, 1e20):
            for params in surface.optimum(budget).params * np.geomspace(1 / 4, 4, 5):
                add("isoflop", name, params, budget / 6 / params, budget, 4096)
    for ratio in (20, 80, 320):
        add("overtrained", "mamba", 1e8, ratio * 1e8, 6e16 * ratio, 4096)
    for state in (1024, 4096, 16384):
        add("state", "mamba", 1e8, 2e9, 1.2e18, state, less=0.28 * np.log(state / 1024))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_scores(path: Path) -> Path:
    """MAD scores as `madkernels mad run` writes them, in the order of the surfaces."""
    lines = [
        "arch,recall,compression,mad_score,recall_margin,compression_margin,mad_margin,parameters,state,flops_per_token"
    ]
    for arch, recall, score in (
        ("attention:heads=2 swiglu attention:heads=2 swiglu", 0.3, 0.35),
        ("mamba mamba", 0.6, 0.5),
        ("hyena swiglu attention swiglu", 0.9, 0.7),
    ):
        lines.append(f"{arch},{recall},0.4,{score},0.1,0.1,0.1,1000,4096,2000.0")
    path.write_text("\n".join(lines) + "\n")
    return path
