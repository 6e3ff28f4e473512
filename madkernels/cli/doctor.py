"""`madkernels doctor`: what was built, what this machine offers, and which op runs where."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from madkernels import OPS, __version__, cuda  # not the ops themselves: they need the extension

EXTRAS = ("ray", "datasets", "tokenizers", "transformers", "tensorboard", "triton")  # packages that some commands need
BUILD = "pip install --no-build-isolation ."


def doctor() -> None:
    """Say what was built, what the CPU and the GPU offer, which ops run where, and what to do about what is missing."""
    console = Console(highlight=False)
    extension, failure = load_extension()
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        describe_torch() + (describe_extension(extension) if extension else []) + describe_gpus() + [extras()]
    ):
        facts.add_row(f"[bold]{name}[/bold]", value)
    console.print(facts)
    console.print(ops_table())
    lines = advice(extension, failure)
    for line in lines or ["Nothing that this machine could use is missing."]:
        console.print(f"- {line}" if lines else line, markup=False, soft_wrap=True)


def load_extension() -> tuple[ModuleType | None, str]:
    """The extension, or None and why it does not load."""
    try:
        return importlib.import_module("madkernels._C"), ""
    except ImportError as error:
        return None, str(error)


def describe_torch() -> list[tuple[str, str]]:
    """Names and values for the first lines."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [("madkernels", __version__), ("torch", f"{torch.__version__} ({cuda}, {torch.get_num_threads()} threads)")]


def describe_extension(extension: ModuleType) -> list[tuple[str, str]]:
    """What was built, and what of it this CPU runs."""
    info: dict[str, str] = extension.build_info()
    sets = f"built for {info['isas'].replace(',', ', ')}; this CPU has {', '.join(extension.cpu_supported())}"
    used = extension.cpu_isa() + (" with products of bfloat16" if extension.cpu_bfloat16_dot() else "")
    return [
        ("extension", f"{info['version']}, {info['compiler']}, for torch {info['torch_target']} and later"),
        ("CPU", f"{used} in use; {sets}"),
        ("CUDA kernels", describe_cuda_part(*cuda.load())),
    ]


def describe_cuda_part(part: ModuleType | None, failure: str) -> str:
    """What was built for CUDA, or why nothing of it is loaded."""
    if part is None:
        return f"none: {failure}"
    info: dict[str, str] = part.build_info()
    return f"built for {info['archs'].replace(',', ', ')}, PTX {info['ptx']}, with nvcc {info['nvcc']}"


def describe_gpus() -> list[tuple[str, str]]:
    """One line per GPU that torch sees, and the driver's version on NVIDIA."""
    if not torch.cuda.is_available():
        return [("GPU", "none that torch can use")]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        lines.append((f"GPU {index}", f"{device.name}, {capability}, {device.total_memory / 2**30:.0f} GiB"))
    driver = nvidia_driver()
    return lines + ([("driver", driver)] if driver else [])


def extras() -> tuple[str, str]:
    """The packages that only some commands need, and which of them are here."""
    found = {}
    for name in EXTRAS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return "optional", ", ".join(f"{name} {what}" for name, what in found.items())


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    pynvml.nvmlShutdown()
    return str(version)


def ops_table() -> Table:
    """Which op has kernels for which device, by what is registered with torch."""
    table = Table("op", "cpu", "cuda")
    for op in OPS:
        on_cpu, on_cuda = has_cpu_kernel(op), op in cuda.ops_with_kernels()
        table.add_row(op, *("yes" if has else "not built" for has in (on_cpu, on_cuda)))
    table.add_row("linear_cross_entropy", "yes", "by Triton")  # of madkernels.fused
    return table


def has_cpu_kernel(op: str) -> bool:
    """Whether torch would find a kernel of the op for the CPU."""
    name = f"madkernels::{op}"
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def advice(extension: ModuleType | None, failure: str) -> list[str]:
    """What to do about what is missing."""
    if extension is None:
        return [
            f"The extension does not load: {failure}",
            f"Build it against this torch, in the folder of the sources: {BUILD}",
            "Until then only madkernels.reference would run, and asking madkernels for an op fails.",
        ]
    lines = []
    info: dict[str, str] = extension.build_info()
    supported, used = extension.cpu_supported(), extension.cpu_isa()
    if missing := [isa for isa in ("avx2", "avx512") if isa not in info["isas"].split(",")]:
        lines.append(
            f"Built without {' and '.join(missing)}: rebuild with a compiler that has them, GCC 12 or later: {BUILD}"
        )
    if supported and used != supported[-1]:
        lines.append(f"{used} is in use though this CPU has {supported[-1]}: unset MADKERNELS_CPU.")
    if info["version"] != __version__:
        lines.append(f"The extension is of version {info['version']}, the Python code of {__version__}: rebuild it: {BUILD}")
    return lines + gpu_advice()


def gpu_advice() -> list[str]:
    """What keeps the ops from a GPU that is here."""
    if torch.cuda.is_available():
        part, failure = cuda.load()
        if part is None:
            return [f"There is a GPU, but {failure}. Until then keep the ops' inputs on the CPU."]
        lines = [problem for index in range(torch.cuda.device_count()) if (problem := part.device_problem(index))]
        if part.build_info()["version"] != __version__:
            lines.append(
                f"The CUDA part is of another version than the Python code, {__version__}: rebuild it: {cuda.BUILD}"
            )
        return lines
    if not nvidia_driver():
        return []
    if not torch.version.cuda:
        return ["There is an NVIDIA GPU, but this torch was built without CUDA; the ops run on the CPU either way."]
    return [f"There is an NVIDIA driver, but torch cannot use a GPU: {torch_failure()}"]


def torch_failure() -> str:
    """Why torch with CUDA finds no GPU, in its own words: no device, or a driver too old for its CUDA."""
    try:
        torch.zeros((), device="cuda")
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "it gives no reason"
