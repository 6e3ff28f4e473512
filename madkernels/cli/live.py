"""`madkernels status` and `serve`: how far folders of runs are, on the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from madkernels.cli.options import Plugins
from madkernels.cli.sweeps import load_plugins

Watch = Annotated[bool, typer.Option("--watch", help="Show it again and again, until nothing runs any more or Ctrl-C.")]
Every = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")]
Runs = Annotated[
    Path, typer.Argument(help="Folder of mad run, mad search, scale run or train run, or one that holds such folders.")
]


def status(out: Runs, watch: Watch = False, every: Every = 2.0, plugin: Plugins = None) -> None:
    """Show how far runs are: done and left by architecture and task, what failed, and the time left at the pace so far."""
    from rich.console import Console

    from madkernels.live import terminal
    from madkernels.live.watched import Watched, folders_in

    load_plugins(plugin)
    folders, console = [Watched(folder) for folder in folders_in(out)], Console()
    if watch:
        terminal.watch(folders, console, every)
        return
    for folder in folders:
        terminal.show(folder, console)


def serve(
    out: Runs,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 takes one that is free.")] = 8400,
    plugin: Plugins = None,
) -> None:
    """Show runs as a page on this machine that refreshes itself while they go on. Ctrl-C ends it."""
    from madkernels.live import server

    load_plugins(plugin)
    server.serve(out, port)
