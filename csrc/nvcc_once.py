"""Runs nvcc once for a CUDA file and keeps what comes of it; called by nvcc.cmake.

python nvcc_once.py x.o 80,90a nvcc OPTIONS -c x.cu

makes x.o, x.80.ptx, x.80.cubin, x.90a.ptx, x.90a.cubin, and x.log: all that nvcc and ptxas said. It fails where nvcc does,
and where a host function calls one that is for the device only.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

DEVICE_ONLY = (
    "a host function calls one that is __device__ only; called from a template, nvcc says nothing and makes it exit(1):"
    " declare what is called MADKERNELS_ANYWHERE"
)


def wants_exit(object_file: Path) -> bool:
    """Whether an object refers to `exit`, as nothing of ours does but for DEVICE_ONLY."""
    run = subprocess.run(["nm", "-u", str(object_file)], capture_output=True, text=True, check=True)
    return re.search(r"\bexit\b", run.stdout) is not None


def without_resources(log: str) -> str:
    """The log without what `ptxas -v` says of every kernel."""
    lines = log.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"ptxas info |\s+\d+ bytes stack frame", line))


def take(kept: Path, object_file: Path, arch: str, kind: str) -> None:
    """Moves one architecture's code from nvcc's folder to its place. nvcc's name for it depends on what else there is."""
    stem = object_file.stem
    names = f"{stem}.compute_{arch}.{kind}", f"{stem}.sm_{arch}.{kind}", f"{stem}.{kind}"
    found = next(kept / name for name in names if (kept / name).exists())
    found.replace(object_file.with_suffix(f".{arch}.{kind}"))


def main() -> int:
    object_file, archs, command = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    kept = object_file.with_suffix(".keep")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    object_file.unlink(missing_ok=True)
    command += ["-o", str(object_file), "--keep", "--keep-dir", str(kept)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    object_file.with_suffix(".log").write_text(run.stdout)
    if run.returncode:
        print(run.stdout, end="")
        return run.returncode
    print(without_resources(run.stdout), end="")
    if wants_exit(object_file):
        object_file.unlink()
        print(f"{object_file.stem}.cu: {DEVICE_ONLY}")
        return 1
    for arch in archs:
        for kind in ("ptx", "cubin"):
            take(kept, object_file, arch, kind)
    shutil.rmtree(kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
