"""Options that several commands take: one name, default and help text wherever they stand.

What has few values is a Literal: the command line refuses others, lists these in its help, and completes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Checkpointing = Literal["none", "selective", "full"]
Dtype = Literal["float32", "bfloat16"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]  # device.compute_dtype says which one auto is
ShapeName = Literal["parabola", "cubic", "akima"]

Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")]

# ---- runs

Results = Annotated[Path, typer.Option(help="Folder of the results; a run found there is not done again.")]
EngineName = Annotated[
    Literal["pool", "process", "ray"],
    typer.Option(help="Where runs are trained: pool (processes here), process (this one) or ray (a cluster)."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes of the pool. Default: one per core or, with --device cuda, per GPU.")
]
Address = Annotated[str, typer.Option(help="Address of the Ray cluster, with --engine ray.")]
Device = Annotated[str, typer.Option(help="Device to train on: cpu or cuda.")]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that adds layers or tasks. Repeat for several.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how much work there is and how long it takes; do none.")]

# ---- tables of runs

File = Annotated[Path, typer.Argument(help="A CSV file with one run per row.")]
Params = Annotated[str, typer.Option(help="Column of the number of parameters.")]
Tokens = Annotated[str | None, typer.Option(help="Column of the number of training tokens.")]
Flops = Annotated[
    str | None, typer.Option(help="Column of training FLOPs C. Without tokens, D = C / (6 N); without FLOPs, C = 6 N D.")
]
Loss = Annotated[str, typer.Option(help="Column of the loss, in nats per token.")]
Groups = Annotated[
    list[str] | None,
    typer.Option("--group", help="Column to group by; each of its values gets a fit of its own. Repeat for combinations."),
]
Where = Annotated[
    str | None,
    typer.Option(
        help="Rows to fit, by a condition on columns, such as 'outlier == False and loss < 5'; a name of several words "
        "stands in backticks."
    ),
]
DropHighest = Annotated[int, typer.Option(min=0, help="Number of highest losses to drop, in each group.")]
MaxLoss = Annotated[float | None, typer.Option(help="Drop losses above this, in nats per token: runs that diverged.")]
Resamples = Annotated[int, typer.Option("--bootstrap", min=0, help="Bootstrap resamples for intervals; 0 for none.")]
Seed = Annotated[int, typer.Option(help="Seed of the bootstrap resamples.")]
Json = Annotated[str | None, typer.Option("--json", help="Write JSON to this new file, or - for standard output.")]
Files = Annotated[list[Path], typer.Argument(help="CSV files of runs, such as the runs.csv that scale run writes.")]
By = Annotated[str, typer.Option(help="Column that tells architectures apart.")]
Budget = Annotated[str, typer.Option(help="Column of the nominal budgets, in FLOPs.")]
Shape = Annotated[ShapeName, typer.Option(help="Shape of the curves over sizes: parabola, cubic or akima.")]
