"""`madkernels`: assembles the commands. What a command needs is imported when it runs, so that help is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from madkernels import __version__
from madkernels.cli.bench import bench
from madkernels.cli.live import serve, status
from madkernels.cli.mad import mad
from madkernels.cli.sample import train
from madkernels.cli.scale import scale


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"madkernels {__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(mad, name="mad")
app.add_typer(train, name="train")
app.add_typer(scale, name="scale")
app.command()(status)
app.command()(serve)
app.command()(bench)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Kernels for hybrid language models, and the MAD pipeline that designs them."""


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
