"""`madkernels bench`: an op beside its peers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from madkernels import OPS
from madkernels.names import did_you_mean

if TYPE_CHECKING:  # torch is loaded when the command runs, not to print its help
    import torch

    from madkernels.benchmarks.cases import Case
    from madkernels.benchmarks.harness import Benchmark, Peer

DTYPES = ("float32", "bfloat16", "float16", "float64")
PASSES = {"fwd": ("forward",), "bwd": ("backward",), "both": ("forward", "backward")}


def bench(
    op: Annotated[str, typer.Argument(help=f"The op: {' or '.join(OPS)}.")],
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Names of cases, comma-separated; 'all'; or a JSON file with a list of cases. Default: the first."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"One or more of {', '.join(DTYPES)}, comma-separated; timed in the same rounds.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Device to run on: cpu, cuda, or cuda:1 and so on.")] = "cpu",
    direction: Annotated[
        Literal["fwd", "bwd", "both"], typer.Option("--pass", help="Pass to time: forward, backward or both.")
    ] = "both",
    peers: Annotated[
        str,
        typer.Option(
            help="Other implementations: auto (those installed and quick to prepare), none, or names, comma-separated."
        ),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads. Default: torch's choice.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all measurements to this JSON file.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw the times into this picture, such as times.svg.")
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Time runs whose inputs are in cache, as those that another op has just made.")
    ] = False,
    quick: Annotated[
        bool, typer.Option(help="Time small odd cases in few runs: to look for errors, not for speed.")
    ] = False,
) -> None:
    """Time an op beside other implementations, check its results, and compare its speed with what the machine can do."""
    import torch
    from rich.console import Console

    from madkernels.benchmarks import gpu, machine, report
    from madkernels.benchmarks.harness import measure

    benchmark = _benchmark(op)
    cases = _cases(benchmark, shapes, quick)
    dtypes = _dtypes(dtype)
    passes = PASSES[direction]
    place = _device(op, device, dtypes)
    chosen = _peers(benchmark, peers, place.type)
    console = Console()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    machine.keep_freed_memory()
    try:
        facts = machine.describe() | (gpu.describe(place) if place.type == "cuda" else {})
        console.print("; ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
        if busy := machine.busy():
            typer.echo(f"warning: {busy}", err=True)
        measured = []
        for case in cases:
            measured.append(measure(benchmark, case, dtypes, passes, chosen, 3 if quick else 30, place, warm))
            report.show(op, measured[-1], console)
    finally:
        torch.set_num_threads(before)
    record = report.record(op, facts, measured)
    if json_file:
        report.write_json(json_file, record)
    if plot_file:
        report.plot(plot_file, record)


def _benchmark(op: str) -> Benchmark:
    if op not in OPS:
        raise ValueError(f"op {op!r} has no benchmark; expected {' or '.join(OPS)}{did_you_mean(op, OPS)}")
    from madkernels.benchmarks.harness import benchmark_of

    return benchmark_of(op)


def _cases(benchmark: Benchmark, shapes: str | None, quick: bool) -> Sequence[Case]:
    if quick:
        return [case for case in benchmark.cases if case.quick]
    named = {case.name: case for case in benchmark.cases if not case.quick}
    if shapes is None:
        return list(named.values())[:1]
    if shapes.endswith(".json"):
        return _read_cases(type(benchmark.cases[0]), Path(shapes))
    if shapes == "all":
        return list(named.values())
    for name in shapes.split(","):
        if name not in named:
            expected = f"{', '.join(named)}, all, or a .json file{did_you_mean(name, named)}"
            raise ValueError(f"--shapes: no case {name!r} of {benchmark.name}; expected {expected}")
    return [named[name] for name in shapes.split(",")]


def _read_cases(kind: type[Case], path: Path) -> list[Case]:
    names = [field.name for field in fields(kind)]
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--shapes {path}: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"--shapes {path}: expected a list of objects with {', '.join(names)}")
    cases = []
    for number, entry in enumerate(entries, 1):
        if unknown := entry.keys() - set(names):
            raise ValueError(f"--shapes {path}: case {number} has {', '.join(sorted(unknown))}; expected {', '.join(names)}")
        try:
            cases.append(kind(**{"name": f"case {number}", **entry}))
        except TypeError as error:  # a field is absent
            raise ValueError(f"--shapes {path}: case {number}: {str(error).partition('() ')[2]}") from None
    return cases


def _dtypes(names: str) -> list[torch.dtype]:
    import torch

    for name in names.split(","):
        if name not in DTYPES:
            raise ValueError(f"--dtype: {name!r} is not one of {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")
    return [getattr(torch, name) for name in names.split(",")]


def _peers(benchmark: Benchmark, names: str, device: str) -> list[Peer]:
    if names in ("auto", "none"):
        return [peer for peer in benchmark.peers if peer.auto and device in peer.devices and names == "auto"]
    known = {peer.name: peer for peer in benchmark.peers}
    for name in names.split(","):
        if name not in known:
            expected = f"auto, none, or {', '.join(known)}{did_you_mean(name, ['auto', 'none', *known])}"
            raise ValueError(f"--peers: {benchmark.name} has no peer {name!r}; expected {expected}")
    return [known[name] for name in names.split(",")]


def _device(op: str, name: str, dtypes: Sequence[torch.dtype]) -> torch.device:
    """The device of a name, made the current one if it is a GPU that the op can run on."""
    import torch

    from madkernels import cuda
    from madkernels.cli.device import check_gpu, gpu_of

    if (index := gpu_of(name)) is None:
        return torch.device("cpu")
    part, _ = cuda.load()
    if part is None or op not in cuda.ops_with_kernels():
        raise ValueError(f"--device {name}: {cuda.why_not(op)}")
    if torch.float64 in dtypes:
        raise ValueError(f"--dtype: {op} takes float64 on the CPU only")
    check_gpu(name, index)
    if problem := part.device_problem(index):
        raise ValueError(f"--device {name}: {problem}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
