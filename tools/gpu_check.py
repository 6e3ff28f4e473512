"""Checks and times the CUDA kernels on the GPU that is here, offline; run by `make gpu-check OUT=DIR`.

First the device vocabulary's tests, which tell how exact the 2^x of the GPU is; then it builds for it and runs the op tests,
compute-sanitizer, the benchmarks, and MAD runs that train together. Each stage has a time limit of its own and all together
have 9 minutes; one that fails does not lose the others' results: logs, JSON and a summary go to the folder. Exit code 0 if
every stage that could run passed, 1 if one failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package is not installed where this runs

import native  # noqa: E402

TESTED_WITH = ("pytest", "hypothesis")
WORKERS = 4  # processes that run op tests, where pytest-xdist is installed: most of their time is the CPU's
CUDA_BIN = "/usr/local/cuda/bin"
SECONDS = 9 * 60  # for all stages: one that begins late has what is left
LIMITS = {  # seconds, by stage; {op} and {tool} stand for several
    "device-build": 60,
    "device-tests": 20,
    "build": 200,
    "op-tests": 120,
    "smoke": 30,
    "sanitizer-{tool}": 80,
    "bench-{op}": 45,
    "together": 60,
}


@dataclass
class Outcome:
    """What came of a stage."""

    stage: str
    result: str  # passed, failed, timed out, no time left or skipped
    seconds: float
    detail: str  # the end of its output, or why it was skipped


class Checks:
    """The stages that ran, their logs in a folder."""

    def __init__(self, out: Path, seconds: float = SECONDS) -> None:
        self.out = out
        self.ends = time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self.environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:{CUDA_BIN}"}

    def run(self, stage: str, command: list[str], limit: float, **environment: str) -> bool:
        """Runs a stage for at most `limit` seconds -> whether it passed."""
        print(f"== {stage}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        if begin >= self.ends:
            self.add(stage, "no time left", 0.0, "the stages before it took all of it")
            return False
        log = self.out / f"{stage}.log"
        with log.open("w") as file:
            try:
                code = run_with_children(command, min(limit, self.ends - begin), file, self.environment | environment)
                result = "passed" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                result = "timed out"
            except OSError as error:  # there is no such command
                print(f"{command[0]}: {error.strerror}", file=file)
                result = "failed"
        lines = log.read_text(errors="replace").strip().splitlines()
        self.add(stage, result, time.monotonic() - begin, "\n".join(lines[-(1 if result == "passed" else 15) :]))
        return result == "passed"

    def skip(self, stage: str, why: str) -> None:
        self.add(stage, "skipped", 0.0, why)

    def add(self, stage: str, result: str, seconds: float, detail: str) -> None:
        self.outcomes.append(Outcome(stage, result, round(seconds, 1), detail))
        (self.out / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in self.outcomes], indent=1))

    def summary(self) -> str:
        lines = [f"{o.stage:24} {o.result:10} {o.seconds:6.1f} s  {o.detail.splitlines()[-1] if o.detail else ''}" for o in
                 self.outcomes]  # fmt: skip
        return "\n".join(lines)


def run_with_children(command: list[str], limit: float, output: IO[str], environment: dict[str, str]) -> int:
    """The exit code; on time-out the command's children go with it, so that none is left on the GPU or the CPU."""
    streams = {"stdout": output, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams) as process:
        try:
            return process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):  # they ended by themselves
                os.killpg(process.pid, signal.SIGKILL)


def commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown: there is no git here"
    return found.stdout.strip() if found.returncode == 0 else "no checkout"


def missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def facts() -> dict[str, str]:
    """What ran where."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def install_wheels(folder: str | None) -> None:
    """What the tests need, from a folder of wheels, where it is not installed."""
    if folder and (absent := missing(TESTED_WITH)):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", folder, *absent]
        subprocess.run(command, check=False, timeout=60)


def check_device_vocabulary(checks: Checks, arch: str) -> None:
    program = checks.out / "device_tests"
    sources = [
        *sorted((ROOT / "tests" / "device").glob("*.cu")),
        ROOT / "csrc/common/cuda_errors.cu",
        ROOT / "csrc/common/launch.cu",
    ]
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-O2", "-Icsrc", f'-DMADKERNELS_CUDA_ARCHS="{arch}"']
    nvcc = [
        "nvcc",
        "--threads=0",
        *flags,
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-o",
        str(program),
        *map(str, sources),
    ]
    if checks.run("device-build", nvcc, LIMITS["device-build"]):
        checks.run("device-tests", [str(program)], LIMITS["device-tests"])


def check_ops(checks: Checks) -> None:
    if absent := missing(TESTED_WITH):
        checks.skip("op-tests", f"{' and '.join(absent)} not installed: give a folder of wheels as WHEELS")
    else:
        tests = ["tests/test_op_contract.py", *(f"tests/test_{op}.py" for op in native.ops_on_gpus())]
        workers = [] if missing(("xdist",)) else ["-n", str(WORKERS)]
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "--backend", "cuda", *tests]
        checks.run("op-tests", pytest, LIMITS["op-tests"])
    checks.run("smoke", [sys.executable, "tools/gpu_smoke.py"], LIMITS["smoke"])
    sanitizer = shutil.which("compute-sanitizer", path=checks.environment["PATH"])
    for tool in ("memcheck", "racecheck"):
        if sanitizer:
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=1", sys.executable, "tools/gpu_smoke.py"]
            checks.run(f"sanitizer-{tool}", command, LIMITS["sanitizer-{tool}"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        else:
            checks.skip(f"sanitizer-{tool}", "compute-sanitizer is not on PATH")


def write_training_case(op: str, file: Path) -> None:
    """Writes the case that the op's page states an expected time for, as `madkernels bench` reads it."""
    from madkernels.benchmarks.harness import benchmark_of  # not before the build

    file.write_text(json.dumps([asdict(benchmark_of(op).training)]))


def time_training_case(checks: Checks, op: str) -> None:
    cases = checks.out / f"{op}-cases.json"
    try:
        write_training_case(op, cases)
    except ImportError as error:
        checks.add(f"bench-{op}", "failed", 0.0, str(error))
        return
    bench = [sys.executable, "-m", "madkernels.cli", "bench", op, "--device", "cuda", "--shapes", str(cases)]
    bench += ["--dtype", "bfloat16", "--json", str(checks.out / f"{op}.json")]
    checks.run(f"bench-{op}", bench, LIMITS["bench-{op}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the folder for logs, JSON and the summary")
    parser.add_argument("--wheels", help="a folder of wheels of what the tests need")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here; it needs one, and a torch with CUDA", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    checks = Checks(arguments.out.resolve())
    found = facts()
    (checks.out / "facts.json").write_text(json.dumps(found, indent=1))
    print(found, flush=True)
    arch = found["capability"].replace(".", "")
    arch += "a" if arch == "90" else ""
    install_wheels(arguments.wheels)
    check_device_vocabulary(checks, arch)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    settings = {"MADKERNELS_CUDA": "on", "MADKERNELS_CUDA_ARCHS": arch, "NVCC_APPEND_FLAGS": "--threads=2"}
    if checks.run("build", build, LIMITS["build"], **settings):
        checks.environment["PYTHONPATH"] = str(ROOT)
        check_ops(checks)
        for op in native.ops_on_gpus():
            time_training_case(checks, op)
        together = [sys.executable, "tools/gpu_together.py", "--json", str(checks.out / "together.json")]
        checks.run("together", together, LIMITS["together"])
    print(checks.summary())
    return int(any(outcome.result not in ("passed", "skipped") for outcome in checks.outcomes))


if __name__ == "__main__":
    sys.exit(main())
