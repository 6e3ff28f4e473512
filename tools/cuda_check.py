"""Compiles every CUDA kernel and shows what each takes of a GPU; run by `make cuda-check`. Needs nvcc, no GPU.

The objects are those of the build (csrc/nvcc.cmake), whose logs are read here. It fails where the build does, and where a
kernel spills registers that is not in ALLOWED_SPILLS. Exit code 1 for these, 2 where there is no nvcc.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from native import ROOT, build, find_nvcc

ARCHS = ("80", "90a")
# Kernels that may spill, by their short name without template arguments: the reason.
ALLOWED_SPILLS: dict[str, str] = {}


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
    """One file, on every architecture."""

    file: Path
    kernels: list[Kernel]


def parse(log: str) -> list[Kernel]:
    """The kernels in the output of ptxas -v, by their mangled names, without the functions that they call. Those of one
    architecture stand together.

    Lines that are not known are passed over; a kernel without its registers is an error.
    """
    kernels = []
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = _find(r"Compiling entry function '([^']+)'", block)
        arch = _find(r" for 'sm_(\w+)'", block)
        registers = _find(r"Used (\d+) registers", block)
        if not name or not arch or not registers:
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


def read(file: Path, folder: Path) -> Compiled:
    """What the build folder has of one file of csrc."""
    kernels = parse(kept(file, folder, "log").read_text())
    names = demangle([kernel.name for kernel in kernels])
    return Compiled(file, [replace(kernel, name=short_name(name)) for kernel, name in zip(kernels, names, strict=True)])


def kept(file: Path, folder: Path, kind: str) -> Path:
    """What nvcc made of a file of csrc in the build folder: "o", "log", "90a.ptx"."""
    return folder / "nvcc" / file.parent.name / f"{file.stem}.{kind}"


def rows(compiled: Sequence[Compiled]) -> Iterator[list[str]]:
    """The table: one row a kernel and architecture."""
    yield ["file", "kernel", "arch", "registers", "spill stores", "spill loads", "shared", "stack"]
    for one in compiled:
        for k in one.kernels:
            numbers = [str(n) for n in (k.registers, k.spill_stores, k.spill_loads, k.shared, k.stack)]
            yield [f"{one.file.parent.name}/{one.file.name}", k.name, f"sm_{k.arch}", *numbers]


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Columns under each other."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)


def as_markdown(table: Sequence[Sequence[str]], nvcc: str) -> str:
    """The document."""
    head, *body = table
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
    return [f"{k.name} spills on sm_{k.arch}" for c in compiled for k in c.kernels if not k.allowed]


def version(ptx: str) -> str:
    """The version of the nvcc that wrote it."""
    return _find(r"Cuda compilation tools, release .*V([\d.]+)", ptx)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as a document, too")
    options = parser.parse_args()
    if find_nvcc() is None:
        print(
            "cuda-check: no nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or among the packages of this Python: install the"
            " CUDA toolkit or madkernels[cuda-build]",
            file=sys.stderr,
        )
        return 2
    try:
        folder = build("cuda_objects", MADKERNELS_CUDA_ARCHS=";".join(ARCHS))
    except RuntimeError as failure:
        print(failure, file=sys.stderr)
        return 1
    compiled = [read(file, folder) for file in sorted((ROOT / "csrc").glob("*/*.cu"))]
    table = list(rows(compiled))
    print(as_text(table))
    if options.markdown:
        ptx = kept(compiled[0].file, folder, f"{ARCHS[0]}.ptx").read_text()
        options.markdown.write_text(as_markdown(table, version(ptx)))
    if found := problems(compiled):
        print("\n".join(found), file=sys.stderr)
        return 1
    print(f"{len(compiled)} files compiled for {' and '.join(ARCHS)}, no spill that is not allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
