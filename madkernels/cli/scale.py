"""`madkernels scale`: scaling laws, from the plan of the runs to the fits and their report."""

from __future__ import annotations

import typer

scale = typer.Typer(help="Plan, run, fit and compare scaling laws.", no_args_is_help=True)
