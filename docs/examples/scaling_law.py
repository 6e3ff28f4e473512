"""A scaling law fitted to a CSV file of runs, in Python; `madkernels scale fit` does the same.

Run it with `python docs/examples/scaling_law.py [runs.csv]`.

The file has a row for each run, and columns for parameters, training tokens and held-out loss in nats per token.
"""

import sys
from pathlib import Path

from madkernels.scaling.fits import surface
from madkernels.scaling.fits.runs_table import Columns, by_group, of_kind, read_table, select

STUDY = Path(__file__).parent.parent / "studies/scaling-small/runs.csv"
columns = Columns(params="params", tokens="tokens", loss="loss")
budget = 1e13  # FLOPs; four times the largest budget of the study
table = read_table(Path(sys.argv[1]) if len(sys.argv) > 1 else STUDY)
table = of_kind(table, "isoflop", "overtrained")  # where a column `kind` tells; ladders of state follow another law

for name, rows in by_group(table, "architecture"):
    selection = select(rows, columns)  # without runs that failed
    for dropped in selection.dropped:
        print(f"dropped: {dropped.place}: {dropped.why}")

    # L(N, D) = E + A / N^alpha + B / D^beta
    fit = surface.fit(selection.points)
    if not fit.proof.converged:
        print(f"{name}: {fit.proof}")
        continue

    # Intervals: the same fit to 200 resamples of the runs. An exponent whose interval is wide is not known.
    resampled = surface.bootstrap(selection.points, fit, count=200)
    a, best = resampled.interval("a"), fit.surface.optimum(budget)
    print(
        f"{name}: {fit.count} runs, E {fit.surface.E:.2f}, alpha {fit.surface.alpha:.2f}, beta {fit.surface.beta:.2f}, "
        f"a {fit.surface.a:.2f} ({a.low:.2f} to {a.high:.2f}); "
        f"at {budget:.0e} FLOPs: {best.params:.2g} parameters, {best.tokens:.2g} tokens, loss {best.loss:.2f}"
    )
