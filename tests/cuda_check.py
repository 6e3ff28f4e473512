"""Compiles every CUDA kernel and shows what each takes of a GPU; run by `make cuda-check`. Needs nvcc, no GPU.

It fails where a file does not compile, where a kernel spills registers that is not in ALLOWED_SPILLS, and where a host
function calls one that is for the device only. Exit code 1 for these, 2 where there is no nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90a")
FILES_AT_A_TIME = 2
# Kernels that may spill, by their short name without template arguments: the reason.
ALLOWED_SPILLS: dict[str, str] = {}
DEVICE_ONLY = (
    "a host function calls one that is __device__ only; called from a template, nvcc says nothing and makes it exit(1):"
    " declare what is called MADKERNELS_ANYWHERE"
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture. Bytes are per thread, shared memory per block."""

    name: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int  # static; what a launch asks for comes on top

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0

    @property
    def allowed(self) -> bool:
        return not self.spills or self.name.partition("<")[0] in ALLOWED_SPILLS


@dataclass(frozen=True)
class Compiled:
    """One file on one architecture."""

    file: Path
    arch: str
    seconds: float
    kernels: list[Kernel]
    failure: str


def find_nvcc() -> str | None:
    """nvcc of PATH, CUDA_HOME or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(
        "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    )


def parse(log: str, arch: str) -> list[Kernel]:
    """The kernels in the output of ptxas -v, by their mangled names, without the functions that they call.

    Lines that are not known are passed over; a kernel without its registers is an error.
    """
    kernels = []
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = _find(r"Compiling entry function '([^']+)'", block)
        registers = _find(r"Used (\d+) registers", block)
        if not name or not registers:
            raise ValueError(f"the output of ptxas was not understood: {block[:300]}")
        # The kernel's own frame: those of functions that it calls may stand before and after.
        frame = _find(rf"Function properties for {re.escape(name)}\s*\n(.*)", block)
        stores, loads, stack = (_bytes(what, frame) for what in ("spill stores", "spill loads", "stack frame"))
        kernels.append(Kernel(name, arch, int(registers), stores, loads, stack, _bytes("smem", block)))
    return kernels


def _bytes(what: str, text: str) -> int:
    return int(_find(rf"(\d+) bytes {what}", text) or 0)


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def short_name(demangled: str) -> str:
    """`void madkernels::(anonymous namespace)::scan<float, (int)16>(Params)` -> `scan<float, 16>`."""
    name = _without_arguments(demangled.removeprefix("void "))
    name = re.sub(r"\((int|long|unsigned int|bool|short|char)\)", "", name)
    return re.sub(r"(\w+::|\(anonymous namespace\)::)+", "", name)


def _without_arguments(signature: str) -> str:
    """The text before the parenthesis that the last one closes."""
    if not signature.endswith(")"):
        return signature
    depth = 0
    for i in range(len(signature) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(signature[i], 0)
        if depth == 0:
            return signature[:i]
    return signature


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names; as they are where c++filt is absent."""
    if not names or not shutil.which("c++filt"):
        return list(names)
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def nvcc_command(nvcc: str, arch: str) -> list[str]:
    """How the build compiles for one architecture."""
    command = [nvcc, f"--options-file={ROOT / 'csrc' / 'nvcc.options'}", "-I", str(ROOT / "csrc")]
    return [*command, f'-DMADKERNELS_CUDA_ARCHS="{arch}"', "-gencode", f"arch=compute_{arch},code=sm_{arch}"]


def compile_file(nvcc: str, file: Path, arch: str) -> Compiled:
    """Compiles one file for one architecture, and throws the object away."""
    command = [*nvcc_command(nvcc, arch), "-Xptxas=-v"]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        run = subprocess.run(
            [*command, "-c", str(file), "-o", f"{folder}/out.o"], capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - begin
        log = run.stdout + run.stderr
        if run.returncode:
            return Compiled(file, arch, seconds, [], log)
        if wants_exit(Path(folder) / "out.o"):
            return Compiled(file, arch, seconds, [], DEVICE_ONLY)
    kernels = parse(log, arch)
    names = demangle([kernel.name for kernel in kernels])
    named = [replace(kernel, name=short_name(name)) for kernel, name in zip(kernels, names, strict=True)]
    return Compiled(file, arch, seconds, named, "")


def wants_exit(binary: Path, *options: str) -> bool:
    """Whether an object file or a library (with "-D") refers to `exit`, as nothing of ours does but for DEVICE_ONLY."""
    run = subprocess.run(["nm", "-u", *options, str(binary)], capture_output=True, text=True, check=True)
    return re.search(r"\bexit\b", run.stdout) is not None


def rows(compiled: Sequence[Compiled]) -> Iterator[list[str]]:
    """The table: one row a kernel and architecture, the seconds on the first of each file."""
    yield ["file", "kernel", "arch", "registers", "spill stores", "spill loads", "shared", "stack", "compiled in"]
    for one in compiled:
        for i, k in enumerate(one.kernels):
            numbers = [str(n) for n in (k.registers, k.spill_stores, k.spill_loads, k.shared, k.stack)]
            seconds = f"{one.seconds:.1f} s" if i == 0 else ""
            yield [f"{one.file.parent.name}/{one.file.name}", k.name, f"sm_{k.arch}", *numbers, seconds]


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Columns under each other."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)


def as_markdown(table: Sequence[Sequence[str]], nvcc: str) -> str:
    """The document, without the seconds: they are the compiling machine's."""
    head, *body = [list(row[:-1]) for row in table]
    lines = [
        "# What the CUDA kernels take of a GPU",
        "",
        f"Written by `make cuda-check`: what ptxas of nvcc {nvcc} says. Registers, and bytes of spills and stack, are per",
        "thread, bytes of shared memory (static; a launch may ask for more) per block.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join([file, f'`{name}`', *rest])} |" for file, name, *rest in body),
    ]
    if ALLOWED_SPILLS:
        lines += ["", "Spills that are allowed:", "", *(f"- `{name}`: {reason}" for name, reason in ALLOWED_SPILLS.items())]
    return "\n".join(lines) + "\n"


def problems(compiled: Sequence[Compiled]) -> list[str]:
    """What makes the check fail."""
    found = [f"{c.file.name} fails for sm_{c.arch}:\n{c.failure}" for c in compiled if c.failure]
    return found + [f"{k.name} spills on sm_{k.arch}" for c in compiled for k in c.kernels if not k.allowed]


def version(nvcc: str) -> str:
    """The version that nvcc gives itself."""
    return _find(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as a document, too")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit", file=sys.stderr)
        return 2
    jobs = [(file, arch) for file in sorted((ROOT / "csrc").glob("*/*.cu")) for arch in ARCHS]
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        compiled = list(pool.map(lambda job: compile_file(nvcc, *job), jobs))
    table = list(rows(compiled))
    print(as_text(table))
    if options.markdown:
        options.markdown.write_text(as_markdown(table, version(nvcc)))
    if found := problems(compiled):
        print("\n".join(found), file=sys.stderr)
        return 1
    print(f"{len(jobs)} compilations, no spill that is not allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
