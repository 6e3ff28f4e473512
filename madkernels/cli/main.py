"""`madkernels`: assembles the commands. What a command needs is imported when it runs, so that help is quick."""

from __future__ import annotations

import sys

import typer

from madkernels.cli.bench import bench
from madkernels.cli.mad import mad
from madkernels.cli.sample import train
from madkernels.cli.scale import scale

app = typer.Typer(
    help="Kernels for hybrid language models, and the MAD pipeline that designs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(mad, name="mad")
app.add_typer(train, name="train")
app.add_typer(scale, name="scale")
app.command()(bench)


@app.command()
def doctor() -> None:
    """Say what was built, what this machine offers, which ops run where, and what to do about what is missing."""
    from madkernels.cli import doctor as command  # loads torch

    command.doctor()


def main() -> None:
    """The entry point. What the user can put right is one message and exit code 2, without a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
