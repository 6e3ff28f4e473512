"""Programs of CUDA on the simulator: the device vocabulary's tests, and kernels that are wrong on purpose."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import native
import pytest

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.backends("ptx")]
PROGRAMS = {"device_tests": "device", "simulator_tests": "simulator"}  # and the folders of their sources
SCHEDULES = ("order", "reverse", *(f"{kind}:{seed}" for kind in ("warps", "lanes") for seed in range(9)))


def names_of(program: str) -> list[str]:
    sources = sorted((Path(__file__).parent / PROGRAMS[program]).glob("*.cu"))
    return [name for source in sources for name in re.findall(r"^TEST\((\w+)\)", source.read_text(), re.MULTILINE)]


@cache
def built(program: str) -> Path:
    return native.build(program) / program


def run(program: str, *arguments: str, schedule: str = "order") -> str:
    settings = {"MADKERNELS_SIMULATED_SCHEDULE": schedule, "MADKERNELS_SIMULATED_RACES": "1"}
    command = [built(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | settings)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(("program", "name"), [(program, name) for program in PROGRAMS for name in names_of(program)])
def test_program(program: str, name: str) -> None:
    run(program, name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_list_is_complete(program: str) -> None:
    assert sorted(run(program, "--list").split()) == sorted(names_of(program))


def test_vocabulary_under_many_schedules() -> None:
    for schedule in SCHEDULES:
        run("device_tests", schedule=schedule)
