"""`madkernels train`: language models on real text, and what they would take."""

from __future__ import annotations

import typer

train = typer.Typer(help="Train language models, and say what that takes.", no_args_is_help=True)
