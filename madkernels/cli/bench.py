"""`madkernels bench`: ops, layers and models beside their peers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from madkernels import OPS
from madkernels.names import did_you_mean

if TYPE_CHECKING:  # torch is loaded when the command runs, not to print its help
    import torch

    from madkernels.benchmarks.cases import Case
    from madkernels.benchmarks.harness import Benchmark, Peer
    from madkernels.benchmarks.sizes import Size

DTYPES = ("float32", "bfloat16", "float16", "float64")
WHOLE = {"layer": "attention:heads=8", "layers": "", "model": "striped-hyena-70m"}  # what is not an op, with an example
STEP = "step"
LONGEST = 5.0  # seconds that a call of a peer may take at a preset
PASSES = {"fwd": ("forward",), "bwd": ("backward",), "both": ("forward", "backward")}


def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Ops, of {', '.join(OPS)}; or layer LAYER..., such as attention:heads=8; or layers, for all of them; or "
            "model PRESET...; or step, or step ARCHITECTURE..., for where the time of MAD's training steps goes. Default: "
            "all ops, at a --preset."
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Names of cases, comma-separated; 'all'; or a JSON file with a list of cases. Default: the first."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Shapes of models of a size: mad, 70m, 125m, 350m, 1b, 3b or 7b. Layers take 70m by default."),
    ] = None,
    seqlen: Annotated[
        str | None, typer.Option(help="Sequence lengths with --preset, layers and models, such as 1k,4k,16k.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"One or more of {', '.join(DTYPES)}, comma-separated; timed in the same rounds.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Device to run on: cpu, cuda, or cuda:1 and so on.")] = "cpu",
    direction: Annotated[
        Literal["fwd", "bwd", "both"],
        typer.Option("--pass", help="Pass to time: forward (of a layer also the decoding step), backward or both."),
    ] = "both",
    peers: Annotated[
        str,
        typer.Option(
            help="Other implementations: auto (those installed and quick to prepare; all installed with --preset), none, or "
            "names, comma-separated."
        ),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads. Default: torch's choice.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all measurements to this JSON file.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw a roofline and the times into this picture, such as times.svg.")
    ] = None,
    baseline_file: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            help="A file of --json to compare with, of the same device. Exit code 1 where a pass is slower and the "
            "quartiles of both runs lie apart; 2 where the file does not fit.",
        ),
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Time runs whose inputs are in cache, as those that another op has just made.")
    ] = False,
    quick: Annotated[
        bool, typer.Option(help="Time small odd cases in few runs: to look for errors, not for speed.")
    ] = False,
) -> None:
    """Time ops, layers or models beside other implementations, check their results, and compare their speed with what the
    machine can do."""
    import torch
    from rich.console import Console

    from madkernels.benchmarks import gpu, harness, machine, report
    from madkernels.benchmarks.baseline import Baseline
    from madkernels.runs.memory import give_back_memory, keep_freed_memory

    dtypes = _dtypes(dtype)
    names = what or list(OPS)
    if names[0] == STEP:
        if shapes or preset or seqlen or warm or plot_file or baseline_file or device != "cpu":
            raise ValueError(f"{STEP}: expected --dtype, --threads, --json and --quick alone")
        _bench_step(names[1:], dtypes, threads, json_file, quick)
        return
    if names[0] in WHOLE:
        if shapes or warm:
            raise ValueError(f"{names[0]}: --shapes and --warm are of ops")
        place = _device(None, device, dtypes)
        jobs = _whole_jobs(names, preset, seqlen, place, dtypes, quick)
    else:
        benchmarks = [_benchmark(op) for op in names]
        if not what and not preset:
            raise ValueError(f"expected an op, or --preset for all; ops are {', '.join(OPS)}")
        if seqlen and not preset:
            raise ValueError("--seqlen: lengths go with a --preset; the cases of --shapes have their own")
        if preset and shapes:
            raise ValueError("--preset and --shapes: expected one of them")
        place = [_device(op, device, dtypes) for op in names][-1]
        jobs = [job for benchmark in benchmarks for job in _op_jobs(benchmark, shapes, preset, seqlen, place.type, quick)]
    jobs = [job.limited_to(PASSES[direction]) for job in jobs]
    jobs = [job for job in jobs if job.passes]
    chosen = [_peers(job.benchmark, peers, place.type, all_of_them=job.limit is not None) for job in jobs]
    console = Console()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    keep_freed_memory()
    try:
        facts = machine.describe() | (gpu.describe(place) if place.type == "cuda" else {})
        wanted = [(job.benchmark.name, job.case) for job in jobs]
        baseline = Baseline(baseline_file, facts, wanted) if baseline_file else None
        console.print("; ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
        if busy := machine.busy():
            typer.echo(f"warning: {busy}", err=True)
        measured = []
        for job, others in zip(jobs, chosen, strict=True):
            runs = 3 if quick else job.runs
            measured.append(
                harness.measure(job.benchmark, job.case, dtypes, job.passes, others, runs, place, warm, job.limit)
            )
            report.show(measured[-1], console, baseline)
            give_back_memory()
        if len(jobs) > 1:
            report.overview(measured, console, baseline)
    finally:
        torch.set_num_threads(before)
    record = report.record(facts, measured)
    if json_file:
        report.write_json(json_file, record)
    if plot_file:
        report.plot(plot_file, record)
    if baseline and (slower := [line for m in measured for line in baseline.regressions(m)]):
        typer.echo("slower than the baseline, quartiles apart: " + "; ".join(slower), err=True)
        raise typer.Exit(1)


def _bench_step(
    names: Sequence[str], dtypes: Sequence[torch.dtype], threads: int | None, json_file: Path | None, quick: bool
) -> None:
    """Training steps of MAD's architectures, or of those given; bfloat16 is autocast."""
    import torch
    from rich.console import Console

    from madkernels.benchmarks import machine, report, step
    from madkernels.runs.memory import keep_freed_memory

    if others := [dtype for dtype in dtypes if dtype not in (torch.float32, torch.bfloat16)]:
        raise ValueError(f"--dtype: {STEP} takes float32 and bfloat16, not {', '.join(map(str, others))}")
    console = Console()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    keep_freed_memory()
    try:
        facts = machine.describe()
        console.print("; ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
        if busy := machine.busy():
            typer.echo(f"warning: {busy}", err=True)
        size = {"batch": 2, "seqlen": 16} if quick else {}
        steps = step.steps_of(names or list(step.ARCHITECTURES), [str(d).removeprefix("torch.") for d in dtypes], **size)
        rates = step.measure(steps, runs=3 if quick else 15)
    finally:
        torch.set_num_threads(before)
    step.table(steps, rates).show(console)
    for name, seconds in step.means(steps).items():
        console.print(f"{name}: geometric mean {1e3 * seconds:.1f} ms", highlight=False)
    if json_file:
        report.write_json(json_file, step.record(facts, steps, rates))


@dataclass(frozen=True)
class Job:
    """A case to measure. `limit`: seconds that a call of a peer may take; None for any time."""

    benchmark: Benchmark
    case: Case
    passes: tuple[str, ...] = ("forward", "backward")
    runs: int = 30
    limit: float | None = None

    def limited_to(self, passes: Sequence[str]) -> Job:
        """With those of its passes that are among the given."""
        return replace(self, passes=tuple(name for name in self.passes if name in passes))


def _op_jobs(
    benchmark: Benchmark, shapes: str | None, preset: str | None, seqlen: str | None, device: str, quick: bool
) -> list[Job]:
    if preset is None:
        return [Job(benchmark, case) for case in _cases(benchmark, shapes, quick)]
    if benchmark.of_model is None:
        raise ValueError(f"--preset: {benchmark.name} has no cases of model sizes")
    return [Job(benchmark, benchmark.of_model(size), limit=LONGEST) for size in _sizes(preset, seqlen, device)]


def _sizes(preset: str, seqlen: str | None, device: str) -> list[Size]:
    from madkernels.benchmarks.sizes import seqlens, size_of

    sizes = [size_of(preset, device, length) for length in (seqlens(seqlen) if seqlen else [None])]
    return [replace(size, name=f"{preset}-{size.seqlen}") for size in sizes] if len(sizes) > 1 else sizes


def _whole_jobs(
    names: Sequence[str], preset: str | None, seqlen: str | None, place: torch.device, dtypes: Sequence[torch.dtype],
    quick: bool,
) -> list[Job]:  # fmt: skip
    """Of layers or models: the forward and backward of a layer and its decoding step; of a model forward and training step,
    each as a forward of its own."""
    from madkernels.benchmarks import layers, models
    from madkernels.benchmarks.sizes import Size
    from madkernels.models.layers import LAYERS
    from madkernels.models.presets import preset as preset_of

    kind, *chosen = names
    if kind != "layers" and not chosen:
        raise ValueError(f"bench {kind}: expected {'a layer' if kind == 'layer' else 'a preset'}, such as {WHOLE[kind]}")
    small = Size("quick", 64, 2, 40)
    if kind == "model":
        if preset:
            raise ValueError("--preset: a model has its own size, as in bench model striped-hyena-70m")
        jobs = []
        for name in chosen:
            model = preset_of(name)
            sizes = [small] if quick else _sizes(name.rpartition("-")[2], seqlen, place.type)
            if quick:
                model = replace(model, dim=small.dim, blocks=4, vocab_size=256)
            for benchmark in (found for size in sizes for found in models.benchmarks_of(model, size)):
                models.check_memory(benchmark.training, dtypes, place)
                jobs.append(Job(benchmark, benchmark.training, ("forward",), runs=5))
        return jobs
    sizes = [small] if quick else _sizes(preset or "70m", seqlen, place.type)
    found = [layers.benchmarks_of(name, size) for name in chosen or LAYERS for size in sizes]
    return [
        job
        for whole, step in found
        for job in (Job(whole, whole.training), Job(step, step.training, ("forward",)))
    ]  # fmt: skip


def _benchmark(op: str) -> Benchmark:
    if op not in OPS:
        known = [*OPS, *WHOLE]
        raise ValueError(f"op {op!r} has no benchmark; expected {' or '.join(known)}{did_you_mean(op, known)}")
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


def _peers(benchmark: Benchmark, names: str, device: str, all_of_them: bool = False) -> list[Peer]:
    if names == "none":
        return []
    if names == "auto":
        return [peer for peer in benchmark.peers if (peer.auto or all_of_them) and device in peer.devices]
    known = {peer.name: peer for peer in benchmark.peers}
    for name in names.split(","):
        if name not in known:
            expected = f"auto, none, or {', '.join(known)}{did_you_mean(name, ['auto', 'none', *known])}"
            raise ValueError(f"--peers: {benchmark.name} has no peer {name!r}; expected {expected}")
    return [known[name] for name in names.split(",")]


def _device(op: str | None, name: str, dtypes: Sequence[torch.dtype]) -> torch.device:
    """The device of a name, made the current one if it is a GPU, and one that the op can run on."""
    import torch

    from madkernels import cuda
    from madkernels.cli.device import check_gpu, gpu_of

    if (index := gpu_of(name)) is None:
        return torch.device("cpu")
    part, _ = cuda.load()
    if op and (part is None or op not in cuda.ops_with_kernels()):
        raise ValueError(f"--device {name}: {cuda.why_not(op)}")
    if torch.float64 in dtypes:
        raise ValueError(f"--dtype: {op or 'a layer'} takes float64 on the CPU only")
    check_gpu(name, index)
    if part and (problem := part.device_problem(index)):
        raise ValueError(f"--device {name}: {problem}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
