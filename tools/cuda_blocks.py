"""Shows the instructions of a CUDA kernel block by block, to count what a path through it issues. Needs nvcc, no GPU.

python tools/cuda_blocks.py csrc/causal_conv/causal_conv_fwd.cu "convolve_forward<BFloat16, 2>" [--arch 90a] [--least 8]

A line is a stretch of code without a branch: the number of its first instruction, how many there are, the commonest, and
the branch that ends it. Which of them a whole group of steps goes through is for the reader to see: the blocks of rare cases
have scalar loads. Exit code 2 where nvcc, nvdisasm or the kernel is not found.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cuda_check import demangle, kept, short_name
from native import build, find_nvcc

BRANCH = re.compile(r"\b(BRA|EXIT|RET)\b")


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other."""

    first: int
    instructions: list[str]

    @property
    def mnemonics(self) -> collections.Counter[str]:
        """How often each operation stands here, without its modifiers and predicate."""
        return collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", i).split()[0].split(".")[0] for i in self.instructions)

    @property
    def branch(self) -> str:
        """The branch at its end, if there is one."""
        return self.instructions[-1] if BRANCH.search(self.instructions[-1]) else ""


def find_nvdisasm() -> str | None:
    """nvdisasm beside nvcc, on PATH, or in Triton's package."""
    folders = [os.environ.get("PATH", ""), str(Path(find_nvcc() or "nvcc").parent)]
    if triton := importlib.util.find_spec("triton"):
        folders += [f"{place}/backends/nvidia/bin" for place in triton.submodule_search_locations or []]
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


def functions(listing: str) -> Iterator[tuple[str, str]]:
    """The mangled name and the text of each function in what nvdisasm -c prints."""
    for text in re.split(r"(?=^\.text\.)", listing, flags=re.MULTILINE)[1:]:
        yield text[len(".text.") : text.index(":")], text


def blocks(function: str) -> list[Block]:
    """A function's blocks: they begin at labels and behind branches."""
    instructions: list[str] = []
    starts = {0}
    for line in function.splitlines():
        if re.match(r"^\.L_\S+:", line):
            starts.add(len(instructions))
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
            if BRANCH.search(found[1]):
                starts.add(len(instructions))
    ordered = sorted(starts | {len(instructions)})
    return [Block(a, instructions[a:b]) for a, b in itertools.pairwise(ordered)]


def as_line(block: Block) -> str:
    """One line of the listing."""
    common = " ".join(f"{name}:{count}" for name, count in block.mnemonics.most_common(10))
    return f"{block.first:6} {len(block.instructions):5}  {common}  {block.branch}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("kernel", help="its name with template arguments, as make cuda-check prints it")
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--least", type=int, default=1, metavar="N", help="leave out blocks of fewer instructions")
    options = parser.parse_args()
    nvdisasm = find_nvdisasm()
    if find_nvcc() is None or nvdisasm is None:
        print("cuda-blocks: needs nvcc, and nvdisasm, which Triton's package has too", file=sys.stderr)
        return 2
    folder = build(f"nvcc/{options.file.resolve().parent.name}/{options.file.stem}.o")
    cubin = kept(options.file.resolve(), folder, f"{options.arch}.cubin")
    if not cubin.exists():
        print(f"cuda-blocks: the build has no code for {options.arch}: see MADKERNELS_CUDA_ARCHS", file=sys.stderr)
        return 2
    listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = dict(functions(listing))
    names = dict(zip(map(short_name, demangle(list(found))), found, strict=True))
    if options.kernel not in names:
        print(f"cuda-blocks: no kernel {options.kernel!r}; there are {', '.join(sorted(names))}", file=sys.stderr)
        return 2
    for block in blocks(found[names[options.kernel]]):
        if len(block.instructions) >= options.least:
            print(as_line(block))
    return 0


if __name__ == "__main__":
    sys.exit(main())
