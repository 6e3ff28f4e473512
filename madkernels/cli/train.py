"""`madkernels train`: language models on real text, and what they would take."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from madkernels.cli.device import compute_dtype
from madkernels.cli.options import Checkpointing, ComputeDtype, DryRun, Plugins
from madkernels.cli.recipe_file import RecipeFile, write
from madkernels.cli.sweeps import load_plugins

if TYPE_CHECKING:  # torch is loaded when a command runs, not to print its help
    from madkernels.models import HybridLM
    from madkernels.models.spec import Architecture
    from madkernels.scaling.training.estimate import Gpu, Setup

train = typer.Typer(help="Train language models, and say what that takes.", no_args_is_help=True)

TOKENS_PER_PARAMETER = 20  # about compute-optimal (Hoffmann et al. 2022, arXiv 2203.15556)


@train.command()
def presets() -> None:
    """List the presets; into a file or a pipe, as a table in Markdown."""
    import torch
    from rich.console import Console

    from madkernels.models import counting
    from madkernels.models.normalise import fixed_state
    from madkernels.models.presets import PRESETS
    from madkernels.reporting.tables import Table

    names = ("preset", "width", "blocks", "parameters", "used per token", "fixed state", "FLOPs per token")
    table = Table(*names, spare=("blocks", "used per token", "width", "fixed state"))
    rows = list[tuple[str, ...]]()
    for preset in PRESETS.values():
        with torch.device("meta"):
            model = preset.model()
        row: tuple[str, ...] = (
            preset.name,
            f"{preset.dim:,}",
            str(preset.blocks),
            f"{counting.params(model) / 1e6:,.1f} M",
            f"{counting.active_params(model) / 1e6:,.1f} M",
            f"{fixed_state(preset.arch, preset.dim):,}",
            f"{counting.training_flops(model, preset.seqlen):.2e}",
        )
        table.add_row(*row)
        rows.append(row)
    if (console := Console()).is_terminal:
        table.show(console)
        return
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


@train.command()
def plan(
    preset: Annotated[str | None, typer.Option(help="Preset, such as striped-hyena-7b; train presets lists them.")] = None,
    arch: Annotated[str | None, typer.Option(help='Architecture in place of a preset, such as "8*(hyena swiglu)".')] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the model, with --arch.")] = None,
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary, with --arch.")] = 50_304,
    tokens: Annotated[
        float | None, typer.Option(help="Training tokens. Default: 20 per parameter that a token uses.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per step; rounded up to a multiple of what the GPUs take at a time.")
    ] = 2**19,
    seqlen: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row (sequence length). Default: the preset's, or 2048.")
    ] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Rows that each GPU takes at a time.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[
        Literal["a100", "h100", "h200"], typer.Option(help="Model of the GPUs; or give --peak and --memory.")
    ] = "h100",
    peak: Annotated[
        float | None, typer.Option(help="Peak of one GPU in bfloat16, in TFLOP/s, in place of the datasheet's.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Memory of one GPU in GiB, in place of that model's.")] = None,
    sharding: Annotated[
        Literal["full", "none"], typer.Option(help="Sharding of parameters, gradients and moments; full is FSDP.")
    ] = "full",
    checkpointing: Annotated[
        Checkpointing, typer.Option(help="Activation checkpointing (recomputation in the backward).")
    ] = "none",
    mfu: Annotated[
        float, typer.Option(help="Model FLOPs utilisation to assume: the share of the peak that is reached.")
    ] = 0.4,
    plugin: Plugins = None,
) -> None:
    """Estimate what a training takes, without allocating it: parameters, state, FLOPs, memory on each GPU, time."""
    from madkernels.scaling.training.estimate import GPUS, Gpu, Setup

    load_plugins(plugin)
    model, length = _meta_model(preset, arch, dim, vocab, seqlen)
    machine = Gpu(GPUS[gpu].flops if peak is None else peak * 1e12, GPUS[gpu].memory if memory is None else memory)
    for option, value in (("--mfu", mfu), ("--peak", machine.flops), ("--memory", machine.memory), ("--tokens", tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{option} is {value}; expected a number above 0")
    setup = Setup(length, micro_batch, gpus, sharding, checkpointing)
    _print(
        f"Width {model.dim:,}, {len(model.arch.layers)} layers, vocabulary {model.vocab_size:,}", _size_rows(model, length)
    )
    work = _work_rows(model, setup, machine, tokens, batch_tokens, mfu)
    _print(f"GPUs: {gpus}, {machine.flops / 1e12:,.0f} TFLOP/s each", work)
    _print(f"Memory of each GPU, sharding {sharding}, checkpointing {checkpointing}", _memory_rows(model, setup, machine))


def _meta_model(
    preset: str | None, arch: str | None, dim: int | None, vocab: int, seqlen: int | None
) -> tuple[HybridLM, int]:
    """A model on the meta device, with the preset's vocabulary if it is one, and its sequence length."""
    architecture, width, length = _shape(preset, arch, dim, seqlen)

    import torch

    from madkernels.models import HybridLM
    from madkernels.models.presets import preset as named

    with torch.device("meta"):
        size = vocab if preset is None else named(preset).vocab_size
        return HybridLM(architecture, vocab_size=size, dim=width, tied=True), length


def _shape(preset: str | None, arch: str | None, dim: int | None, seqlen: int | None) -> tuple[Architecture, int, int]:
    """Architecture, width and sequence length."""
    _check_model(preset, arch, dim)

    from madkernels.models.presets import preset as named, resolve
    from madkernels.scaling.training.recipe import DEFAULT_SEQLEN

    if preset is not None:
        chosen = named(preset)
        chosen = dataclasses.replace(chosen, seqlen=seqlen or chosen.seqlen)
        return chosen.arch, chosen.dim, chosen.seqlen
    assert arch is not None
    assert dim is not None
    length = seqlen or DEFAULT_SEQLEN
    return resolve(arch, dim, seqlen=length), dim, length


def _check_model(preset: str | None, arch: str | None, dim: int | None) -> None:
    """ValueError unless a model is named in one of the two ways; before torch is loaded."""
    if (preset is None) == (arch is None) or (arch is None) != (dim is None):
        raise ValueError("give --preset, or --arch and --dim")


def _size_rows(model: HybridLM, seqlen: int) -> dict[str, str]:
    from madkernels.models import counting
    from madkernels.models.normalise import fixed_state

    return {
        "parameters": f"{counting.params(model):,}",
        "of them used per token": f"{counting.active_params(model):,}",
        "of them embeddings": f"{counting.embedding_params(model):,}",
        "fixed state of a sequence": f"{fixed_state(model.arch, model.dim):,} elements",
        f"state after {seqlen:,} tokens": f"{counting.state_size(model, seqlen):,} elements",
        "FLOPs per token, forward": f"{counting.flops_per_token(model, seqlen):.4g}",
        "FLOPs per token, training": f"{counting.training_flops(model, seqlen):.4g}",
    }


def _work_rows(
    model: HybridLM, setup: Setup, machine: Gpu, tokens: float | None, batch_tokens: int, mfu: float
) -> dict[str, str]:
    from madkernels.models import counting
    from madkernels.runs.pace import duration

    total = tokens or TOKENS_PER_PARAMETER * counting.active_params(model)
    at_a_time = setup.gpus * setup.tokens
    accumulated = -(-batch_tokens // at_a_time)
    flops = counting.training_flops(model, setup.seqlen) * total
    seconds = flops / (setup.gpus * machine.flops * mfu)
    gpu_hours = seconds * setup.gpus / 3600
    return {
        "tokens": f"{total:.4g}",
        "tokens per step": f"{accumulated * at_a_time:,} ({accumulated} times {at_a_time:,})",
        "steps": f"{math.ceil(total / (accumulated * at_a_time)):,}",
        "training FLOPs": f"{flops:.4g}",
        f"time at an MFU of {mfu:.0%}": f"{duration(seconds)} ({gpu_hours:,.{0 if gpu_hours >= 10 else 2}f} GPU hours)",
    }


def _memory_rows(model: HybridLM, setup: Setup, machine: Gpu) -> dict[str, str]:
    from madkernels.scaling.training.estimate import memory

    parts = memory(model, setup)
    total = sum(parts.values()) / 2**30
    verdict = "fits" if total <= machine.memory else "does not fit"
    return {name: f"{size / 2**30:,.2f} GiB" for name, size in parts.items()} | {
        "together": f"{total:,.2f} GiB: {verdict} in {machine.memory:g} GiB"
    }


def _print(title: str, rows: dict[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<28}  {value}")


@train.command()
def prepare(
    files: Annotated[list[str] | None, typer.Argument(help="Text files, or glob patterns with ** for any depth.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not be there yet.")] = Path("out/data"),
    tokenizer: Annotated[str, typer.Option(help="bytes, or the path of a tokenizer.json of Hugging Face.")] = "bytes",
    dataset: Annotated[str | None, typer.Option(help="A Hugging Face dataset in place of files, by name or folder.")] = None,
    validation: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.05,
) -> None:
    """Turn text into shards of tokens. Without files: the source of Python's standard library.

    A file is a document; of a .jsonl file each line is one, its text under "text".
    """
    from rich.console import Console

    from madkernels.scaling.training import prepare as text
    from madkernels.scaling.training.stop import Stop
    from madkernels.scaling.training.tokenizers import tokenizer_of

    if files and dataset:
        raise ValueError("give files or --dataset, not both")
    found = text.files_of(files) if files else text.standard_library()
    documents = text.dataset_documents(dataset) if dataset else text.documents_of(found)
    with Stop():  # what is not whole goes
        manifest = text.prepare(documents, out, tokenizer_of(tokenizer), validation=validation)
    console = Console()
    for name, shards in manifest["splits"].items():
        tokens, count = (sum(shard[what] for shard in shards) for what in ("tokens", "documents"))
        console.print(f"{name}: {tokens:,} tokens, {count:,} documents")
    console.print(f"Data: {out}, sha256 {manifest['sha256']}", soft_wrap=True)


@train.command()
def run(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Folder that madkernels train prepare wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the log and checkpoints; a run found there is resumed.")],
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of optimiser steps. More than a run in --out has extend it: the learning rate goes on as that of "
            "the longer run, which is higher where it had decayed; constant leaves it as it is.",
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows (sequences) per step, over all processes.")],
    preset: Annotated[str | None, typer.Option(help="Preset, such as striped-hyena-70m; train presets lists them.")] = None,
    arch: Annotated[str | None, typer.Option(help='Architecture in place of a preset, such as "8*(hyena swiglu)".')] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the model, with --arch.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row (sequence length). Default: the preset's, or 2048.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; required with --arch. Default: the preset's.")
    ] = None,
    schedule: Annotated[
        Literal["cosine", "wsd", "constant"],
        typer.Option(help="Learning-rate schedule after the warm-up; wsd: stable, then decay."),
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises to its peak.")] = 0.01,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay of matrices; vectors and recurrence parameters have none.")
    ] = 0.1,
    dtype: Annotated[
        ComputeDtype,
        typer.Option(help="Compute dtype; bfloat16 is autocast over float32 parameters, auto the faster one here."),
    ] = "float32",
    documents: Annotated[bool, typer.Option(help="Let no information pass between the documents of a row.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the initial parameters and of the order of the data.")] = 12345,
    device: Annotated[str, typer.Option(help="Device to train on: cpu, cuda or, in one process, cuda:<number>.")] = "cpu",
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows per forward pass of one process; gradients accumulate. Default: all of its rows."),
    ] = None,
    checkpointing: Annotated[
        Checkpointing, typer.Option(help="Activation checkpointing (recomputation in the backward).")
    ] = "none",
    compile: Annotated[bool, typer.Option(help="Compile each layer with torch.compile.")] = False,
    expert_parallel: Annotated[
        int, typer.Option(min=1, help="Processes that share the experts of moe layers, each holding a part.")
    ] = 1,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 300.0,
    log_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between lines of the log. Default: a hundredth of the run.")
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between measurements of the held-out loss, besides the end. Default: at the end only."
        ),
    ] = None,
    recipe_file: RecipeFile = None,
    dry_run: DryRun = False,
    plugin: Plugins = None,
) -> None:
    """Train one model, alone or, under torchrun, sharded over processes.

    For example: torchrun --nproc-per-node 8 -m madkernels.cli train run --preset striped-hyena-70m --data D --out O
    --steps 5000 --batch 64 --device cuda --dtype bfloat16
    """
    from madkernels.scaling.training.stop import Stop

    _check_model(preset, arch, dim)
    if preset is None and lr is None:
        raise ValueError("--arch has no learning rate of its own: give --lr")
    with Stop(alone=not _several()) as stop, _ends():
        with stop.deferred():  # a library that is half loaded takes no interrupt
            import torch
            from rich.console import Console

            from madkernels.cli.sweeps import note, progress_bars
            from madkernels.models import counting
            from madkernels.runs.memory import keep_freed_memory
            from madkernels.runs.pace import amount
            from madkernels.scaling.training import trainer as training
            from madkernels.scaling.training.data import Corpus
            from madkernels.scaling.training.estimate import peak_flops
            from madkernels.scaling.training.log import say
            from madkernels.scaling.training.recipe import LMRun, Recipe

        stop.check()
        _check_device(device)
        load_plugins(plugin)
        keep_freed_memory()
        context.params["dtype"] = compute_dtype(dtype, device)  # as the recipe of this run is to have it
        corpus = Corpus(data)
        architecture, width, length = _shape(preset, arch, dim, seqlen)
        recipe = Recipe(
            steps, batch, length, _preset_lr(preset) if lr is None else lr, warmup=warmup, schedule=schedule,
            weight_decay=weight_decay, dtype=context.params["dtype"], documents=documents, seed=seed,
        )  # fmt: skip
        how = training.Execution(
            device, micro_batch, checkpointing, compile, expert_parallel, save_every, log_every, eval_every,
            peak_flops(device),
        )  # fmt: skip
        wanted = LMRun(str(architecture), width, corpus.vocab_size, recipe, corpus.sha256, corpus=str(data), out=str(out))
        here = device == "cpu" and not _several()
        work = {wanted: counting.training_flops(training.meta_model(wanted), length) * recipe.tokens}
        if _first():
            if dtype == "auto":
                say(f"dtype: {recipe.dtype}")
            say(f"{steps:,} steps: {amount(work, 1 if here else None, threads=torch.get_num_threads())}")
        if dry_run:
            return
        console = Console()
        with training.processes(device) as first, progress_bars(console) as bars:
            bar = bars.add_task("", total=steps, note="", visible=first)

            def start(step: int) -> None:
                try:
                    write(context, out)
                except OSError as error:  # such as a full disk, which costs no run
                    say(f"warning: cannot write {out / 'recipe.toml'}: {error.strerror}")
                if step:
                    say(f"going on from step {step}")
                    bars.update(bar, completed=step)

            def show(step: int, point: dict[str, float]) -> None:
                bars.update(bar, completed=step, note=note(point, console.width - 54))
                if not console.is_terminal:
                    say(f"step {step}/{steps} ({step / steps:.0%}): {note(point)}")

            result = training.train(wanted, how, show, on_start=start, stop=stop)
            if first:
                pace = result["tokens"] / result["seconds"]
                say(f"held-out loss {result['loss']:.4f} nats per token; {pace:,.0f} tokens per second")
                say(f"Log and checkpoints: {out}")
                if warned := result["warnings"]:
                    say(f"Warnings: {len(warned)}, the last: {warned[-1]}")


def _several() -> bool:
    """Whether torchrun has started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _first() -> bool:
    """Whether this is the first process, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def _check_device(name: str) -> None:
    """Under torchrun a process takes the GPU of its place on the machine."""
    from madkernels.cli.device import check_device, check_gpu

    check_device(name, numbered=not _several())
    if _several() and name == "cuda":
        check_gpu(name, int(os.environ["LOCAL_RANK"]))


@contextmanager
def _ends() -> Iterator[None]:
    """How a training ends that does not come to its end: a line, and an exit code."""
    from madkernels.scaling.training.log import say
    from madkernels.scaling.training.stop import Stopped

    told = "stopped at once; the same command goes on from the last checkpoint"
    try:
        yield
        return
    except Stopped as stopped:
        told = str(stopped)
    except KeyboardInterrupt:
        pass
    except Exception as error:
        from madkernels.runs.engines import Diverged

        if not isinstance(error, Diverged):
            raise
        raise ValueError(f"the training diverged: {error}") from None
    if _first():
        say(told)
    raise typer.Exit(130)


def _preset_lr(preset_name: str | None) -> float:
    from madkernels.models.presets import preset as named

    assert preset_name is not None
    return named(preset_name).lr
